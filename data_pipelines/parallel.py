"""Jobs in parallel processes that end with the one that started them, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from data_pipelines.errors import DataError

_LOOK_UP_S = 0.2  # how late Ctrl-C may be noticed
_WAITING = 4  # jobs queued per process: enough to keep it busy, and few to pickle ahead

Item = TypeVar("Item")
Result = TypeVar("Result")


def each_done(
    job: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None
) -> Iterator[tuple[int, Result]]:
    """Calls `job` on every item and yields (number of the item, result) as each is done, in any order.

    Args:
        job: Sent once to each process.
        items: Sent one by one.
        processes: By default one per core; 1 works in this process.

    Raises:
        DataError: A process died. What a job raises is raised here, and the others are stopped.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(items))
    if processes <= 1:
        yield from enumerate(map(job, items))
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (job,))
    running: dict[Future[Any], int] = {}
    waiting = enumerate(items)
    with _interrupts_noted() as check_interrupted:
        try:
            while True:
                while len(running) < processes * _WAITING and (entry := next(waiting, None)) is not None:
                    running[_submit(pool, entry[1])] = entry[0]
                if not running:
                    break
                done = wait(running, timeout=_LOOK_UP_S, return_when=FIRST_COMPLETED).done
                check_interrupted()
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                f"One of {processes} processes died, most often because memory ran out: use fewer with --processes."
            ) from None
        finally:
            if running:
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], None]]:
    """Ctrl-C is raised where the function given is called, and nowhere else.

    At another moment it could leave a lock of the pool taken, for which the pool would then wait for ever.
    """
    noted: list[int] = []

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # a background job of a shell ignores it, and stays so
        signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _submit(pool: ProcessPoolExecutor, item: Any) -> Future[Any]:
    # A process that starts here never sees Ctrl-C, which reaches the whole group: it would print a traceback.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_run, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_job: Callable[[Any], Any]


def _start(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(item: Any) -> Any:
    return _job(item)


def _end_with_parent() -> None:
    # Without this, the processes of a pool would wait for ever after their parent was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
