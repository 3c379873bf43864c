"""Strikes a rank at a named moment, from inside its process; the product knows nothing of it.

A life of a run gets the environment variable FAULTS, a JSON list of `Fault`s. Moments are what no rewrite of the product
moves: the n-th optimizer step and where it is in it, a file that is opened for writing, a rename, a folder that goes.
"""

import ctypes
import errno
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

VARIABLE = "FAULTS"
PLENTY = 1 << 16  # bytes of a file that are written before its writer is struck in mid-write


@dataclass(frozen=True)
class Fault:
    """A deed at a moment.

    Attributes:
        rank: whom it strikes.
        at: forward, backward, update, step (after it), of `step`; or one of Python's audit events: open (for writing),
            os.rename, os.remove, os.rmdir, os.mkdir, of a `path`; or fsync of one.
        deed: a signal to itself, to all ranks or to the launcher ("SIGKILL", "SIGKILL all", "SIGKILL launcher");
            an OSError by name ("EIO"); raise, exit, sleep, nan; "cut" and "cut EFBIG", in the midst of writing a file.
        step: of the run, counted from 1; where it is negative, of this process.
        path: a pattern found in the path; of a rename, in its target.
        restart: strikes only in this in-place restart; None for any.
    """

    rank: int
    at: str
    deed: str
    step: int = 0
    path: str = ""
    restart: int | None = 0


def as_variable(faults: list[Fault]) -> str:
    return json.dumps([asdict(fault) for fault in faults])


def install() -> None:
    """Lays the traps for this process, if it is a rank that has any."""
    if "RANK" not in os.environ:
        return
    rank, restart = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = [Fault(**values) for values in json.loads(os.environ.get(VARIABLE, "[]"))]
    mine = [fault for fault in faults if fault.rank == rank and fault.restart in (None, restart)]
    for fault in mine:
        if fault.at in ("forward", "backward", "update", "step"):
            _at_step(fault)
        elif fault.at == "fsync":
            _at_fsync(fault)
        else:
            _at_event(fault)


def _at_step(fault: Fault) -> None:
    import torch  # the rank is about to do it as well
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from pretrain.parallel.replicated import ReplicatedEngine
    from pretrain.parallel.zero import ZeroEngine
    from pretrain.parallel.zero_pipeline import ZeroPipelineEngine

    strike, state = _once(fault), {"steps": 0, "lived": 0, "in": False}

    def due(moment: str) -> bool:
        here = state["steps"] + 1 == fault.step or state["lived"] + 1 == -fault.step
        return moment == fault.at and state["in"] and here

    def after_forward(module: Any, inputs: Any, output: Any) -> Any:
        first = output if isinstance(output, torch.Tensor) else None
        if first is None or not first.is_floating_point() or not first.requires_grad:
            return None
        if due("backward"):
            first.register_hook(lambda gradient: strike())
        if due("forward"):
            if fault.deed != "nan":
                strike()
            return first * float("nan")
        return None

    def before_update(*_: Any) -> None:
        if due("update"):
            strike()

    register_module_forward_hook(after_forward)
    for engine in (ReplicatedEngine, ZeroEngine, ZeroPipelineEngine):
        if "step" in vars(engine):
            _wrap(engine, "step", _stepping(state, due, strike))
        if "loaded" in vars(engine):
            _wrap(engine, "loaded", _loading(state))
    register_optimizer_step_pre_hook(before_update)


def _stepping(state: dict[str, Any], due: Callable[[str], bool], strike: Callable[[], None]) -> Any:
    def step(function: Any, *arguments: Any, **words: Any) -> Any:
        state["in"] = True
        result = function(*arguments, **words)
        if due("step"):
            strike()
        state["in"] = False
        state["steps"] += 1
        state["lived"] += 1
        return result

    return step


def _loading(state: dict[str, Any]) -> Any:
    def loaded(function: Any, engine: Any, steps: int) -> Any:
        state["steps"] = steps
        return function(engine, steps)

    return loaded


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    function = getattr(owner, name)
    setattr(owner, name, wraps(function)(lambda *arguments, **words: around(function, *arguments, **words)))


def _at_event(fault: Fault) -> None:
    strike = _once(fault)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event != fault.at or not _is_writing(event, arguments):
            return
        path = arguments[1 if event == "os.rename" else 0]
        if isinstance(path, (str, os.PathLike)) and re.search(fault.path, os.fspath(path)):
            strike()

    sys.addaudithook(hear)


def _is_writing(event: str, arguments: tuple[Any, ...]) -> bool:
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


def _at_fsync(fault: Fault) -> None:
    strike, fsync = _once(fault), os.fsync

    def before(descriptor: int) -> None:
        if re.search(fault.path, os.readlink(f"/proc/self/fd/{descriptor}")):
            strike()
        fsync(descriptor)

    os.fsync = before


def _once(fault: Fault) -> Callable[[], None]:
    struck: list[bool] = []

    def strike() -> None:
        if not struck:
            struck.append(True)
            _do(fault.deed)

    return strike


def _do(deed: str) -> None:
    word, _, whom = deed.partition(" ")
    print(f"injected: {deed}", file=sys.stderr, flush=True)
    if word.startswith("SIG"):
        number, launcher = signal.Signals[word], os.getppid()
        if whom == "launcher":
            os.kill(launcher, number)
        elif whom == "all":
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            for process in sorted(map(int, children), key=lambda process: process == os.getpid()):
                os.kill(process, number)
        else:
            os.kill(os.getpid(), number)
    elif word == "cut":
        # The next write beyond it meets SIGXFSZ, which kills as SIGKILL does, or EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (PLENTY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if not whom:
            ctypes.CDLL(None).signal(signal.SIGXFSZ, 0)
    elif word in errno.errorcode.values():
        raise OSError(getattr(errno, word), os.strerror(getattr(errno, word)))
    elif word == "raise":
        raise RuntimeError("injected")
    elif word == "exit":
        os._exit(int(whom))
    elif word == "sleep":
        time.sleep(float(whom))
    else:
        raise AssertionError(f"no such deed: {deed}")
