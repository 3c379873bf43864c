"""Kills a training run again and again, goes on with another layout, and compares every step with an undisturbed run's.

Ranks run the real trainer with the tiny model; they are forked by a process that has imported everything, and meet over
loopback. A kill is a SIGKILL of all ranks, or of one whose loss the others notice, at a random moment: while they
start, between two steps, in a step or in a save. `python tests/soak_training.py 200` is the long run of what
tests/faults/test_training_soak.py does in short.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from data_pipelines.batch import IDS
from data_pipelines.config import DataConfig
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.stream.loader import TrainingData
from distributed.layouts import LAYOUTS
from pretrain.checkpoint.store import CheckpointStore
from pretrain.parallel.mesh import ALONE
from warm import Nursery

RANKS = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}
GLOBAL_BATCH, CHECKPOINT_EVERY = 32, 2
STEPS = 20_000  # more than any soak takes, so that the learning rate depends on no end
CLOSE = 1e-6  # relative, between losses of different layouts
LONGEST_LIFE_S = 1.0  # after the first step, or after the start of a quarter of the generations
SAME_LAYOUT = 0.3  # the share of generations that go on with the layout of the one before
NOT_REPEATED = re.compile("time/|memory/|checkpoint/")
PATIENCE_S = 120.0


class Life(NamedTuple):
    """What is known of a generation from outside."""

    layout: str
    start: int  # the step it went on from
    lines: list[dict[str, Any]]  # of metrics.jsonl when it was over
    writers: list[str]  # the layout that has written each of them


class Soak:
    """The run's folder, and the generations that lived in it."""

    def __init__(self, folder: Path, nursery: Nursery, seed: int) -> None:
        self.nursery, self.seed, self.folder = nursery, seed, folder
        self.corpus, self.output = folder / "demo", folder / "run"
        self.checkpoints = self.output / "checkpoints"
        self.lives: list[Life] = []
        self.kills_at_start = self.kills_of_one = self.kills_in_a_save = 0
        self.repeated = self.repeated_exactly = 0
        self.differences: list[float] = []
        demo = [*("data_pipelines", "demo", str(self.corpus)), "--train", "350", "--heldout", "8", "--size", "16"]
        subprocess.run([sys.executable, "-m", *demo], check=True, capture_output=True)
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(self.tree()))

    def tree(self) -> dict[str, Any]:
        tower = {"width": 32, "depth": 1, "heads": 2}
        return {
            "output": str(self.output),
            "data": {
                "train": str(self.corpus / "train" / "manifest.json"),
                "tokenizer": str(self.corpus / "tokenizer.model"),
                "workers": 0,
                "grain": 4,
            },
            "model": {
                "size": "tiny",
                "image": {"size": 16, "patch": 8, **tower},
                "text": {"length": 12, **tower},
                "fusion": {"depth": 1, "heads": 2},
                "embed": 16,
            },
            "objectives": {"matching": {"pool": 4}},
            "engine": {"precision": "fp32"},
            "training": {"steps": STEPS, "global_batch": GLOBAL_BATCH, "accumulation": 2, "log_every": 1},
            # Rounding, which differs between layouts, must not grow: no division by tiny second moments.
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 5, "eps": 1e-3},
            "checkpoint": {"every": CHECKPOINT_EVERY},
        }

    def start(self, name: str, layout: str, *overrides: str) -> list[int]:
        """The ranks of a generation."""
        ranks, changes = LAYOUTS[layout]
        settings = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        size = RANKS[ranks]
        processes = []
        for rank in range(size):
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            environment |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
            environment |= {"WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}", "MASTER_PORT": f"{port}"}
            words = ["pretrain", "train", str(self.config), *settings, *overrides]
            with self.log(name, rank).open("wb") as log:
                processes.append(self.nursery.start(words, environment, log.fileno(), log.fileno()))
        return processes

    def log(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}-{rank}.log"

    def live(self, last_step: int | None = None) -> None:
        """Lets a generation live for a random time, or until it has taken a step, and checks where it began."""
        number = len(self.lives)
        rng = Random(f"{self.seed}/{number}")
        layouts = sorted(LAYOUTS)
        keeps = self.lives and rng.random() < SAME_LAYOUT
        layout = self.lives[-1].layout if keeps else rng.choice(layouts)
        found = CheckpointStore(self.checkpoints, ALONE).newest_valid(quarantine=False)
        start = int(found.name.removeprefix("step-")) if found else 0
        file_before = self.metrics_file()
        name, main = f"life-{number}", self.log(f"life-{number}", 0)
        processes = self.start(name, layout)
        try:
            if last_step is not None:
                self.wait_for(rf"^step {last_step}/", processes, main)
                os.kill(processes[0], signal.SIGTERM)
                codes = self.reap(processes)
                assert set(codes) == {85}, f"{codes}: {main.read_text()}"
            else:
                self.kill(processes, main, rng)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        said = main.read_text()
        if resumed := re.search(r"^Resumed from .*, at step (\d+)\.$", said, re.MULTILINE):
            assert int(resumed[1]) == start, f"{said}: {start} is the newest that is whole"
        assert "is not whole" not in said, said
        leftovers = [*self.checkpoints.glob(".tmp-*")]
        assert len(leftovers) <= 1, leftovers
        self.kills_in_a_save += len(leftovers)
        self.kills_at_start += not re.search("^step ", said, re.MULTILINE)
        lines = self.lines(self.output)
        # A life that takes a step has first written the file anew, without what lies beyond its start.
        writers = self.lives[-1].writers if self.lives else []
        if self.metrics_file() != file_before:
            writers = [*writers[:start], *[layout] * (len(lines) - start)]
        self.lives.append(Life(layout, start, lines, writers))
        self.compare_with_the_life_before()

    def compare_with_the_life_before(self) -> None:
        """Steps that were taken again are those they were; on the same layout, to the last digit."""
        if len(self.lives) < 2:
            return
        before, now = self.lives[-2:]
        if now.writers is before.writers:
            return
        for step in range(now.start, min(len(before.lines), len(now.lines))):
            layouts = now.writers[step], before.writers[step]
            exact = layouts[0] == layouts[1]
            self.differences.append(compare(now.lines[step], before.lines[step], exact, ", ".join(layouts)))
            self.repeated += 1
            self.repeated_exactly += exact

    def kill(self, processes: Sequence[int], main: Path, rng: Random) -> None:
        """All ranks at once, or one and soon the rest, at a random moment."""
        if rng.random() > 0.25:
            self.wait_for("^step ", processes, main)
        time.sleep(rng.uniform(0, LONGEST_LIFE_S))
        victims = list(processes)
        if len(processes) > 1 and rng.random() < 0.3:
            self.kills_of_one += 1
            victims = [rng.choice(processes)]
        for process in victims:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.0 if len(victims) == len(processes) else 0.3)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        codes = self.reap(processes)
        # A rank may have noticed the loss of another, and no other end is right.
        assert set(codes) <= {-signal.SIGKILL, 1 if len(victims) < len(processes) else -signal.SIGKILL}, codes

    def wait_for(self, pattern: str, processes: Sequence[int], main: Path) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, main.read_text(), re.MULTILINE):
            ended = [code for process in processes if (code := self.nursery.poll(process)) is not None]
            assert not ended, f"{ended}: {main.read_text()}"
            assert time.monotonic() < deadline, main.read_text()
            time.sleep(0.01)

    def reap(self, processes: Sequence[int]) -> list[int]:
        codes: dict[int, int] = {}
        deadline = time.monotonic() + PATIENCE_S
        while len(codes) < len(processes):
            assert time.monotonic() < deadline, f"{codes} of {processes}"
            for process in processes:
                if process not in codes and (code := self.nursery.poll(process)) is not None:
                    codes[process] = code
            time.sleep(0.01)
        return [codes[process] for process in processes]

    def metrics_file(self) -> int | None:
        path = self.output / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def lines(self, output: Path) -> list[dict[str, Any]]:
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        return [{name: value for name, value in line.items() if not NOT_REPEATED.match(name)} for line in whole]

    def undisturbed(self, last_step: int) -> list[dict[str, Any]]:
        """One process that nobody kills."""
        output = self.folder / "undisturbed"
        processes = self.start("undisturbed", "ZeRO-0, 1 rank", f"output={output}", "checkpoint.every=100000")
        self.wait_for(rf"^step {last_step}/", processes, self.log("undisturbed", 0))
        os.kill(processes[0], signal.SIGTERM)
        self.reap(processes)
        return self.lines(output)[:last_step]

    def planned_ids(self, last_step: int) -> list[int]:
        """The batch ids of the plan, of which each epoch has each sample once."""
        config = DataConfig.model_validate(self.tree()["data"])
        spec = BatchSpec(config, Tokenizer.load(config.tokenizer), IDS, 16, 12, 0.15, seed=0)
        data = TrainingData(spec, global_batch=GLOBAL_BATCH)
        batches = [batch.tensors for batch in islice(data.batches(data.initial_state()), last_step)]
        taken = [pair for batch in batches for pair in zip(*(batch[name].tolist() for name in IDS), strict=True)]
        epoch = data.sources[0].order.grains_per_epoch * data.sources[0].order.grain
        for first in range(0, len(taken) - epoch + 1, epoch):
            assert len(set(taken[first : first + epoch])) == epoch, "a sample came twice"
        return [int(batch["image_ids"].sum()) % 2**53 for batch in batches]


def compare(ours: dict[str, Any], other: dict[str, Any], exact: bool, layouts: str = "") -> float:
    """The relative difference of two lines of one step: of the largest of the losses, or 0 where all must be equal."""
    where = f"step {ours['step']} ({layouts})"
    assert ours["step"] == other["step"]
    assert ours["batch_id"] == other["batch_id"], f"{where} took other samples"
    if exact:
        differing = [name for name in {**ours, **other} if ours.get(name) != other.get(name)]
        assert not differing, f"{where}: {[(name, ours.get(name), other.get(name)) for name in differing]}"
        return 0.0
    difference = max(abs(ours[name] / other[name] - 1) for name in ours if name.split("/")[0] == "loss")
    assert difference <= CLOSE, f"{where}: losses differ by {difference:.1e}"
    return difference


def soak(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Runs, kills, and checks.

    Raises:
        AssertionError: a step is not what it would have been.
    """
    begin = time.monotonic()
    nursery = Nursery()
    run = Soak(folder, nursery, seed)
    for _ in range(kills):
        run.live()
    newest = CheckpointStore(run.checkpoints, ALONE).newest_valid(quarantine=False)
    run.live(last_step=(int(newest.name.removeprefix("step-")) if newest else 0) + 5)
    final = run.lives[-1].lines
    last_step = final[-1]["step"]
    expected = run.undisturbed(last_step)
    nursery.close()
    assert not (run.checkpoints / "quarantine").exists()
    assert [line["step"] for line in final] == list(range(1, last_step + 1))
    assert [line["batch_id"] for line in final] == run.planned_ids(last_step)
    run.differences += [compare(*lines, exact=False) for lines in zip(final, expected, strict=True)]
    return {
        "kills": kills,
        "of one rank alone": run.kills_of_one,
        "before a first step": run.kills_at_start,
        "that left a save unfinished": run.kills_in_a_save,
        "layouts": len({life.layout for life in run.lives}),
        "ranks": dict(sorted(Counter(RANKS[LAYOUTS[life.layout][0]] for life in run.lives).items())),
        "steps": last_step,
        "steps taken again": run.repeated,
        "of these to the last digit, on the same layout": run.repeated_exactly,
        "largest relative difference of a loss": f"{max(run.differences):.1e}",
        "seconds": round(time.monotonic() - begin),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), int(sys.argv[1]), int(sys.argv[2]))
    for name, value in figures.items():
        print(f"{name}: {value}")
