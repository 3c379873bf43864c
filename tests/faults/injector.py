"""Strikes a rank at a named moment, from inside its process; the product knows nothing of it.

A life of a run gets the environment variable FAULTS. Moments are what no rewrite of the product moves: the n-th step
and where in it, a file that is opened for writing, a rename, a file that goes.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

VARIABLE, FILLER = "FAULTS", ".filler"
PLENTY = 1 << 16  # bytes of a file that are written before its writer is struck in mid-write


@dataclass(frozen=True)
class Fault:
    """A deed at a moment.

    Attributes:
        rank: whom it strikes.
        at: start, loaded (a checkpoint), evaluate; forward, backward or update, of `step`; or one of Python's audit
            events: open (for writing), os.rename, os.remove, os.mkdir, of a `path`; or fsync of one.
        deed: a signal to itself, or to all ranks, the launcher or the newest child ("SIGKILL", "SIGKILL all");
            an OSError by name ("EIO"); raise, exit, sleep, nan; "cut" and "cut EFBIG", in the midst of writing a
            file; diverge, into a collective of its own; "file NAME", which appears in the run's folder; "fill", the
            disk of the checkpoints to its last byte.
        step: counted from where the process began, the first one being 1.
        path: a pattern found in the path; of a rename, in its target. `{save}` is the checkpoint after `step`.
        restart: strikes only after so many restarts in place; None for any.
    """

    rank: int
    at: str
    deed: str
    step: int = 0
    path: str = ""
    restart: int | None = 0


def as_variable(faults: Sequence[Fault], watched: Path, seen: Path) -> str:
    """What a rank is given: its faults, and a folder of which it writes down the contents at its start."""
    return json.dumps({"faults": [asdict(fault) for fault in faults], "watched": str(watched), "seen": str(seen)})


def install() -> None:
    """Lays the traps for this process, if it is a rank that has any."""
    if "RANK" not in os.environ or VARIABLE not in os.environ or "pretrain" not in sys.orig_argv + sys.argv:
        return
    given = json.loads(os.environ[VARIABLE])
    rank, restart = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if rank == 0:
        with Path(given["seen"]).open("a") as file:
            file.write(json.dumps(sorted(map(_described, Path(given["watched"]).glob("*")))) + "\n")
    faults = [Fault(**values) for values in given["faults"]]
    mine = [fault for fault in faults if fault.rank == rank and fault.restart in (None, restart)]
    if mine:
        progress = _watch_steps()
    for fault in mine:
        strike = _once(fault)
        if fault.at in ("forward", "backward", "update"):
            _at_step(fault, progress, strike)
        elif fault.at in ("start", "loaded", "evaluate"):
            progress.strikes[fault.at] = strike
        elif fault.at == "fsync":
            _at_fsync(fault, progress, strike)
        else:
            _at_event(fault, progress, strike)
    if mine and "start" in progress.strikes:
        progress.strikes["start"]()


def _described(entry: Path) -> str:
    """The name, and whether a checkpoint lacks a file that it lists."""
    try:
        listed = json.loads((entry / "MANIFEST.json").read_text()) if entry.name.startswith("step-") else {}
        whole = all((entry / name).is_file() for name in listed)
    except OSError:
        whole = False
    return entry.name if whole else f"half of {entry.name}"


@dataclass
class Progress:
    """Of this process."""

    loaded: int = 0  # the step it has resumed from
    lived: int = 0  # steps it has taken
    stepping: bool = False
    strikes: dict[str, Callable[[], None]] = field(default_factory=dict)

    def names(self, fault: Fault, path: str) -> bool:
        """Whether a fault means this path."""
        return bool(re.search(fault.path.replace("{save}", f"step-{self.loaded + fault.step:09d}"), path))


def _watch_steps() -> Progress:
    from pretrain.parallel.replicated import ReplicatedEngine  # the rank is about to import it as well
    from pretrain.parallel.zero import ZeroEngine
    from pretrain.parallel.zero_pipeline import ZeroPipelineEngine

    progress = Progress()

    def step(function: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
        progress.stepping = True
        result = function(*arguments, **words)
        progress.stepping = False
        progress.lived += 1
        return result

    def loaded(function: Callable[..., Any], engine: Any, steps: int) -> Any:
        progress.loaded = steps
        progress.strikes.get("loaded", _nothing)()
        return function(engine, steps)

    def run(function: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
        progress.strikes.get("evaluate", _nothing)()
        return function(*arguments, **words)

    for engine in (ReplicatedEngine, ZeroEngine, ZeroPipelineEngine):
        for name, around in (("step", step), ("loaded", loaded), ("run", run)):
            if name in vars(engine):
                setattr(engine, name, partialmethod(_call, around, vars(engine)[name]))
    return progress


def _nothing() -> None:
    pass


def _call(engine: Any, around: Callable[..., Any], function: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    return around(function, engine, *arguments, **words)


def _at_step(fault: Fault, progress: Progress, strike: Callable[[], None]) -> None:
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def due(moment: str) -> bool:
        return moment == fault.at and progress.stepping and progress.lived + 1 == fault.step

    def after_forward(module: Any, inputs: Any, output: Any) -> Any:
        if not (isinstance(output, torch.Tensor) and output.is_floating_point() and output.requires_grad):
            return None
        if due("backward"):
            output.register_hook(lambda gradient: strike())
        if due("forward"):
            if fault.deed == "nan":
                return output * float("nan")
            strike()
        return None

    def before_update(*_: Any) -> None:
        if due("update"):
            strike()

    register_module_forward_hook(after_forward)
    register_optimizer_step_pre_hook(before_update)


def _at_event(fault: Fault, progress: Progress, strike: Callable[..., None]) -> None:
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == fault.at and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            path = arguments[1 if event == "os.rename" else 0]
            if isinstance(path, (str, os.PathLike)) and progress.names(fault, os.fspath(path)):
                strike(os.fspath(path))

    sys.addaudithook(hear)


def _at_fsync(fault: Fault, progress: Progress, strike: Callable[[], None]) -> None:
    fsync = os.fsync

    def before(descriptor: int) -> None:
        if progress.names(fault, str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            strike()
        fsync(descriptor)

    os.fsync = before


def _once(fault: Fault) -> Callable[..., None]:
    struck: list[bool] = []

    def strike(path: str | None = None) -> None:
        if not struck:
            struck.append(True)
            _do(fault.deed, path)

    return strike


def _do(deed: str, path: str | None) -> None:
    word, _, whom = deed.partition(" ")
    print(f"injected: {deed}", file=sys.stderr, flush=True)
    if word.startswith("SIG"):
        number, launcher = signal.Signals[word], os.getppid()
        if whom == "launcher":
            os.kill(launcher, number)
        elif whom == "child":
            os.kill(int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1]), number)
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
        raise OSError(getattr(errno, word), os.strerror(getattr(errno, word)), path)
    elif word == "file":
        (Path(json.loads(os.environ[VARIABLE])["watched"]).parent / whom).touch()
    elif word == "fill":
        with (
            contextlib.suppress(OSError),
            (Path(json.loads(os.environ[VARIABLE])["watched"]) / FILLER).open("wb") as file,
        ):
            while True:
                file.write(bytes(4096))
                file.flush()
    elif word == "diverge":
        import torch.distributed as dist

        dist.monitored_barrier()  # in which the other ranks never take part
    elif word == "raise":
        raise RuntimeError("injected")
    elif word == "exit":
        os._exit(int(whom))
    elif word == "sleep":
        time.sleep(float(whom))
    else:
        raise AssertionError(f"no such deed: {deed}")
