"""Decoding processes: how they start, how their errors reach the user, and how they end.

A dataset here is map-style and its item is a whole micro-batch, so what comes out never depends on how many
processes make it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipelines.batch import Batch
from data_pipelines.errors import DataError, UserError

PREFETCH_FACTOR = 4  # micro-batches a worker keeps ready


class BatchDataset(Dataset[Batch | UserError], ABC):
    """Makes micro-batches by key. A user's error is returned, not raised: torch would bury it in a traceback."""

    def __getitem__(self, key: Any) -> Batch | UserError:
        try:
            return self.make(key)
        except UserError as error:
            return error

    @abstractmethod
    def make(self, key: Any) -> Batch:
        """The micro-batch of one key."""


def stream(dataset: BatchDataset, keys: Iterable[Any], workers: int) -> Iterator[Batch]:
    """The micro-batches of `keys`, in their order, made by `workers` processes or, with 0, in this one.

    Raises:
        UserError: As the dataset raised it.
        DataError: A worker died.
    """
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")  # a fork would copy CUDA's and NCCL's threads half-way
        context.set_forkserver_preload(["data_pipelines.forkserver"])
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
    batches = iter(loader)
    ours = set(multiprocessing.active_children()) - others
    _running.update(ours)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                # Of a dead worker, torch reports the death or fails to open the last tensors it sent.
                if wait([process.sentinel for process in ours], timeout=1):
                    raise DataError(
                        f"A data worker died, most often because memory or /dev/shm ran out: lower data.workers "
                        f"({workers} per rank), or ask for more memory."
                    ) from None
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


def _start_worker(worker: int) -> None:
    # One core a worker: their number is the parallelism.
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
