"""Decoding processes: how they start, how their errors reach the user, and how they end.

A dataset here is map-style and its item is a whole micro-batch, so what comes out never depends on how many
processes make it.
"""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data_pipelines.errors import DataError, UserError

PREFETCH_FACTOR = 4  # micro-batches a worker keeps ready
MAX_OPEN_FILES = 1 << 16  # asked for, where the system allows them; many start a process with 1,024

# Read by the destructor of an iterator whose constructor failed.
_MultiProcessingDataLoaderIter._shutdown = True  # pyright: ignore[reportAttributeAccessIssue]

Item = TypeVar("Item")


class BatchDataset(Dataset[Item | UserError], ABC, Generic[Item]):
    """Makes micro-batches by key. A user's error is returned, not raised: torch would bury it in a traceback."""

    def __getitem__(self, key: Any) -> Item | UserError:
        try:
            return self.make(key)
        except UserError as error:
            return error

    @abstractmethod
    def make(self, key: Any) -> Item:
        """The micro-batch of one key."""


def usable_workers(workers: int) -> int:
    """No more of them than cores that this process may use: beyond that, torch warns and they take turns."""
    return min(workers, len(os.sched_getaffinity(0)))


def stream(dataset: BatchDataset[Item], keys: Iterable[Any], workers: int) -> Iterator[Item]:
    """What the dataset makes of `keys`, in their order, in `usable_workers` processes or, with 0, in this one.

    Raises:
        UserError: As the dataset raised it.
        DataError: A worker died, could not start, or could not hand over what it had made.
    """
    workers = usable_workers(workers)
    context = None
    if workers:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_OPEN_FILES)), hard))
        context = multiprocessing.get_context("forkserver")  # a fork would copy CUDA's and NCCL's threads half-way
        context.set_forkserver_preload(["data_pipelines.stream.forkserver"])
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        multiprocessing_context=context,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    others = set(multiprocessing.active_children())
    ours: set[BaseProcess] = set()
    batches = None
    try:
        try:
            batches = iter(loader)
        except OSError as error:
            raise _no_hand_over("Data workers cannot be started", error, workers) from None
        finally:
            ours = set(multiprocessing.active_children()) - others
            _running.update(ours)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # After a worker's death, torch reports it or fails to open the last tensors that it sent.
                if wait([process.sentinel for process in ours], timeout=1):
                    raise DataError(
                        f"A data worker died, most often because memory or /dev/shm ran out: lower data.workers "
                        f"({workers} per rank), or ask for more memory."
                    ) from None
                if _resource_lacking(error):
                    raise _no_hand_over("A batch of a data worker cannot be received", error, workers) from None
                raise
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        del batches  # asks the workers to end and joins them, unless a traceback still holds the loader
        for process in ours:
            process.kill()
            process.join()
        _running.difference_update(ours)


def _no_hand_over(what: str, error: Exception, workers: int) -> DataError:
    """Batches travel from worker to trainer through shared memory, each tensor as an open file."""
    match _resource_lacking(error):
        case errno.ENOSPC:
            why = "/dev/shm is full, through which batches travel"
            fix = "give it more room (`docker run --shm-size=8g`)"
        case errno.EMFILE:
            why, fix = "too many files are open", "raise the limit of open files (`ulimit -n`)"
        case _:
            why, fix = " ".join(str(error).split()), "set it to 0 to decode in the training process"
    return DataError(f"{what}: {why}. Lower data.workers ({workers} per rank), or {fix}.")


_SIGNS = {  # torch raises RuntimeErrors with the system's words; `ancdata`: a file descriptor was lost on its way
    errno.ENOSPC: ("No space left", "Cannot allocate memory"),
    errno.EMFILE: ("Too many open files", "ancdata"),
}


def _resource_lacking(error: BaseException | None) -> int | None:
    """The errno of what ran out on the way, as far as an error and its causes say."""
    while error is not None:
        if isinstance(error, EOFError):  # a live worker had no file descriptor left for its answer
            return errno.EMFILE
        for number, signs in _SIGNS.items():
            if getattr(error, "errno", None) == number or any(sign in str(error) for sign in signs):
                return number
        error = error.__cause__ or error.__context__
    return None


def _answer_with_error(queue: Queue[Any], error: Exception, item: Any) -> None:
    """Sends an error instead of the batch that could not be sent: else the trainer would wait for ever."""
    if not isinstance(item, tuple):  # pickled already: the pipe itself is broken
        os._exit(1)
    info = get_worker_info()
    workers = info.num_workers if info else 0
    queue.put((item[0], _no_hand_over("A data worker cannot hand over a batch", error, workers)))


def _start_worker(worker: int) -> None:
    Queue._on_queue_feeder_error = _answer_with_error  # pyright: ignore[reportAttributeAccessIssue]; else: a traceback
    # Threads that pass open files on, or whose queue the trainer has closed, print nothing: the trainer reports it.
    sys.excepthook = threading.excepthook = lambda *_: None
    # One core per worker: their number is the parallelism.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C and Slurm's SIGTERM reach the whole job; the trainer still needs data to finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    # Torch watches the fork server instead, which outlives a killed trainer for as long as it has workers.
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


_running: set[BaseProcess] = set()


@atexit.register
def _kill_workers() -> None:
    # After a crash the stream may never have been closed, and interpreter exit would wait for workers that
    # ignore SIGTERM.
    for process in _running:
        process.kill()
