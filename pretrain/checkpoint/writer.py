"""Writing behind the training loop: a copy of the state in host memory, and a thread that brings it to the disk."""

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 2**24  # bytes


@dataclass
class Job:
    """Bytes that go to one place of one file; several ranks may write to a file, each to its own place."""

    path: Path
    position: int
    chunks: Iterable[memoryview]
    bytes: int = 0
    sha256: str = ""


class Writer(threading.Thread):
    """Writes, hashes, and waits for the disk. Nothing of it is a collective: ranks agree when all are done."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.jobs = jobs
        self.problem: str | None = None
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        begin = time.perf_counter()
        try:
            for job in self.jobs:
                _write(job)
        except OSError as error:
            self.problem = in_words(error)
        except Exception as error:  # as a CUDA error: what ends the thread must not pass for a save
            self.problem = f"{type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - begin


class HostCopy:
    """The newest state, in memory that is allocated once: pinned if it comes from a GPU."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def take(self, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
        """Copies tensors; those of a GPU in its own time, after which they may change. Returns their bytes."""
        tensors = list(tensors)
        numel = sum(tensor.numel() for tensor in tensors)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if len(self.memory) < numel:
            self.memory = torch.empty(0)  # never both
            self.memory = torch.empty(numel, pin_memory=on_gpu)
        for target, tensor in zip(self.memory[:numel].split([t.numel() for t in tensors]), tensors, strict=True):
            target.copy_(tensor, non_blocking=on_gpu)
        copied = torch.cuda.Event() if on_gpu else None
        if copied:  # the stream of training: what changes the state comes after the copy, and the loop waits for none
            copied.record()
        return self._bytes(numel, copied)

    def _bytes(self, numel: int, copied: torch.cuda.Event | None) -> Iterator[memoryview]:
        if copied:
            copied.synchronize()
        yield bytes_of(self.memory[:numel])


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of an fp32 tensor, without a copy if it is in host memory and contiguous."""
    assert tensor.dtype == torch.float32
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).view("uint8").data


def in_words(error: OSError) -> str:
    """What the system says, and of which file."""
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)


def _write(job: Job) -> None:
    digest = hashlib.sha256()
    handle = os.open(job.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        for chunk in job.chunks:
            for start in range(0, len(chunk), _CHUNK):
                part = chunk[start : start + _CHUNK]
                digest.update(part)
                while part:
                    written = os.pwrite(handle, part, job.position + job.bytes)
                    job.bytes += written
                    part = part[written:]
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(job.path)) from None
    finally:
        os.close(handle)
    job.sha256 = digest.hexdigest()
