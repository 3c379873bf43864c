"""Lives of a run: each is the same command again, and ends in the way of its fault; and what holds after each."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.injector import VARIABLE, Fault, as_variable
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError
from pretrain.parallel.mesh import ALONE
from warm import TESTS, Nursery

PATIENCE_S = 400.0  # for a life of many restarts, on a machine that others use as well
NOT_REPEATED = ("time/", "memory/", "checkpoint/")  # metrics that no two runs share


@dataclass(frozen=True)
class Ended:
    """A life that is over."""

    code: int
    out: str
    err: str


@dataclass
class Life:
    """A process that was started, cold or warm, and all that it starts."""

    process: int
    folder: Path
    _nursery: Nursery | None
    _popen: "subprocess.Popen[bytes] | None"

    def poll(self) -> int | None:
        return self._popen.poll() if self._popen else self._nursery.poll(self.process)  # pyright: ignore

    def end(self, patience_s: float = PATIENCE_S) -> Ended:
        """Waits for its end.

        Raises:
            AssertionError: it does not end; then it is killed.
        """
        deadline = time.monotonic() + patience_s
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        if code is None:
            self.kill()
            raise AssertionError(f"did not end in {patience_s} s:\n{out}\n{err}")
        return Ended(code, out, err)

    def kill(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, 9)

    def processes(self) -> list[int]:
        """Whoever is alive and says what this life says: the launcher, the ranks, their data workers."""
        alive = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "fd" / "1").readlink() == self.folder / "out":
                    alive.append(int(process.name))
        return alive

    def seen(self) -> list[list[str]]:
        """The names in the checkpoints' folder at the start of each set of ranks."""
        return [json.loads(line) for line in (self.folder / "seen").read_text().splitlines()]


class Run:
    """A config and its folder, and the lives that were spent on it."""

    def __init__(self, tree: dict[str, Any], folder: Path, nursery: Nursery | None = None) -> None:
        self.folder = folder
        self.output = Path(tree["output"])
        self.checkpoints = self.output / "checkpoints"
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.nursery = nursery
        self.lives: list[Life] = []

    def start(self, *overrides: str, ranks: int = 2, faults: Sequence[Fault] = (), cold: bool = False) -> Life:
        """`python -m launch local`."""
        folder = self.folder / f"life-{len(self.lives)}"
        folder.mkdir()
        words = ["launch", "local", str(self.config), *overrides, "--nproc", str(ranks)]
        traps = as_variable(faults, self.checkpoints, folder / "seen")
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", VARIABLE: traps}
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            if cold or self.nursery is None:
                # What Python runs at every start, and the only way into ranks that a launcher starts.
                (folder / "sitecustomize.py").write_text("from faults import injector\n\ninjector.install()\n")
                environment["PYTHONPATH"] = f"{folder}:{TESTS}:{TESTS.parent}"
                popen = subprocess.Popen(
                    [sys.executable, "-m", *words], stdout=out, stderr=err, env=environment, start_new_session=True
                )
                life = Life(popen.pid, folder, None, popen)
            else:
                process = self.nursery.start(words, environment, out.fileno(), err.fileno())
                life = Life(process, folder, self.nursery, None)
        self.lives.append(life)
        return life

    def live(self, *overrides: str, ranks: int = 2, faults: Sequence[Fault] = (), cold: bool = False) -> Ended:
        return self.start(*overrides, ranks=ranks, faults=faults, cold=cold).end()

    def steps(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, without times and the like."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            {name: value for name, value in json.loads(line).items() if not name.startswith(NOT_REPEATED)}
            for line in lines
            if line.endswith("}")
        ]

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole, as a reader beside the run finds it."""
        try:
            found = CheckpointStore(self.checkpoints, ALONE).newest_valid(quarantine=False)
        except CheckpointError:
            return None
        return int(found.name.removeprefix("step-")) if found else None

    def leftovers(self) -> list[str]:
        """Folders of saves that were never finished."""
        return [path.name for path in self.checkpoints.glob(".tmp-*")]


def assert_intact(run: Run, expected: Sequence[dict[str, Any]], removing: bool = False) -> None:
    """What holds after any fault: nobody is left, the steps so far are the undisturbed run's, no checkpoint is half.

    Args:
        run: the run.
        expected: the steps of the undisturbed one.
        removing: the fault struck while an old checkpoint was removed, so that the oldest may be half.
    """
    deadline = time.monotonic() + 20
    while left := [process for life in run.lives for process in life.processes()]:
        assert time.monotonic() < deadline, f"processes left: {left}"
        time.sleep(0.05)
    steps = run.steps()
    assert steps == list(expected[: len(steps)])
    assert len(run.leftovers()) <= 1
    for checkpoint in sorted(run.checkpoints.glob("step-*"))[removing:]:
        step = int(checkpoint.name.removeprefix("step-"))
        store = CheckpointStore(run.checkpoints, ALONE)
        assert store.newest_valid(quarantine=False, step=step) == checkpoint


def resumed_at(ended: Ended) -> int | None:
    """The step that a life went on from; None for a fresh start."""
    found = re.search(r"^Resumed from .*, at step (\d+)\.$", ended.out, re.MULTILINE)
    return int(found[1]) if found else None


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`, of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if problem := mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        pytest.skip(f"no small disk can be mounted here: {problem}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*words: object) -> str:
    """Why it cannot be, if so."""
    return subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False).stderr.strip()
