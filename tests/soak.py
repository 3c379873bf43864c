"""Kills a run again and again, goes on with another layout, and compares all that was consumed with the plan.

Ranks are processes that play the trainer, with real data workers. A kill is a SIGKILL of the whole process group at a
random moment; the next ranks resume from the newest checkpoint, and are another number, with other numbers of workers
and micro-steps. `python tests/soak.py 200` is the long run of what tests/e2e/test_data_soak.py does in short.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import util
from pathlib import Path
from random import Random
from threading import Barrier
from typing import Any, NamedTuple

from PIL import Image

from data_pipelines.batch import IDS, known_tensors
from data_pipelines.config import DataConfig
from data_pipelines.order.mixture import DataState
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer, train_sentencepiece
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import write_atomically
from data_pipelines.shards.sample import hash64
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.loader import TrainingData

GLOBAL_BATCH, GRAIN, LANES = 48, 2, 3
CHECKPOINT_EVERY = 3  # steps
STEPS_AT_LEAST = 40  # so that weights change in the shortest run
SOURCES = {"many": (90, 41, 67), "few": (50, 34)}  # samples of each shard; the sums are whole grains of three lanes
WEIGHTS = {"many": {0: 3, 20: 1, 60: 0, 90: 2}, "few": {0: 1}}
BAD = 7  # the sample of each source whose image cannot be decoded
LONGEST_LIFE_S = 1.5  # after the first step, or after the start of a quarter of the generations
PR_SET_CHILD_SUBREAPER = 36

Row = tuple[int, int, int]  # position, image id, caption id


class Layout(NamedTuple):
    """How a generation of ranks shares the global batch."""

    ranks: int
    accumulation: int
    workers: int

    @classmethod
    def drawn(cls, rng: Random, last: Layout | None) -> Layout:
        ranks = rng.choice([number for number in (1, 2, 3, 4, 6) if last is None or number != last.ranks])
        accumulations = [number for number in (1, 1, 2, 3, 4) if GLOBAL_BATCH // GRAIN % (ranks * number) == 0]
        return cls(ranks, rng.choice(accumulations), rng.choice((0, 1, 2, 3)))


@dataclass(frozen=True)
class Run:
    """A folder with the corpora, the checkpoint and what each rank has logged."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.json"

    def log(self, generation: int, rank: int) -> Path:
        return self.folder / f"log-{generation}-{rank}.jsonl"

    def write_corpora(self) -> None:
        texts = [text.decode() for name in SOURCES for _, text in self.pairs(name)]
        train_sentencepiece(iter(texts), self.folder / "tokenizer.model", 40)
        for name, sizes in SOURCES.items():
            pairs, shards = self.pairs(name), []
            for number, size in enumerate(sizes):
                shards.append(self.folder / f"{name}-{number}.tar")
                first = sum(sizes[:number])
                samples = [
                    {"__key__": f"{at:04d}", "png": b"nothing" if at == BAD else pairs[at][0], "txt": pairs[at][1]}
                    for at in range(first, first + size)
                ]
                write_shard(shards[-1], samples)
            build_manifest(shards, self.folder / f"{name}.json", processes=1)[0].save()

    def pairs(self, name: str) -> list[tuple[bytes, bytes]]:
        """(image, caption) of each sample of a source."""
        pairs: list[tuple[bytes, bytes]] = []
        for number in range(sum(SOURCES[name])):
            path = self.folder / "picture.png"
            Image.new("RGB", (16, 16), (number, len(name), 0)).save(path)
            pairs.append((path.read_bytes(), f"square {number} of {name}".encode()))
        return pairs

    def training(self, layout: Layout, rank: int) -> TrainingData:
        sources = {
            name: {"manifest": self.folder / f"{name}.json", "weight": weight} for name, weight in WEIGHTS.items()
        }
        config = DataConfig.model_validate(
            {
                "train": sources,
                "tokenizer": self.folder / "tokenizer.model",
                "workers": layout.workers,
                "grain": GRAIN,
                "lanes": LANES,
                "window": 16,
            }
        )
        spec = BatchSpec(config, Tokenizer.load(config.tokenizer), known_tensors(), 8, 12, 0.15, seed=3)
        return TrainingData(
            spec,
            global_batch=GLOBAL_BATCH,
            accumulation=layout.accumulation,
            dp_rank=rank,
            dp_size=layout.ranks,
        )

    def saved(self) -> DataState | None:
        if not self.checkpoint.exists():
            return None
        return DataState.from_dict(json.loads(self.checkpoint.read_text()))


# A generation of ranks ---------------------------------------------------------------------------------------


def _train(barrier: Barrier, run: Run, generation: int, layout: Layout, rank: int, last_step: int | None) -> None:
    data = run.training(layout, rank)
    saved = run.saved()
    state = data.initial_state() if saved is None else data.resumed(saved)
    batches = data.batches(state)
    log = os.open(run.log(generation, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    barrier.wait()  # no rank may write a checkpoint that another has yet to resume from
    while state.step != last_step:
        taken = list(islice(batches, layout.accumulation))
        columns = [[batch.tensors[name] for name in IDS] for batch in taken]
        rows = [row for parts in columns for row in zip(*(part.tolist() for part in parts), strict=True)]
        bad = [sample.key for batch in taken for sample in batch.bad]
        os.write(log, f"{json.dumps({'step': state.step, 'rows': rows, 'bad': bad})}\n".encode())
        state = data.advance(state)
        barrier.wait()  # as the sums of gradients do
        if rank == 0 and (state.step % CHECKPOINT_EVERY == 0 or state.step == last_step):
            text = json.dumps(state.to_dict())
            write_atomically(run.checkpoint, lambda path, text=text: path.write_text(text))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def _fork_rank(group: int, prefix: str, barrier: Barrier, *arguments: Any) -> int:
    process = os.fork()
    if process:
        with suppress(OSError):  # the rank may have done it, and even ended
            os.setpgid(process, group)
        return process
    code = 1
    try:
        os.setpgid(0, group)
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
        multiprocessing.current_process()._config["semprefix"] = prefix  # pyright: ignore[reportAttributeAccessIssue]
        _train(barrier, *arguments)
        # Or the semaphores of its queues are said to be leaked.
        util._run_finalizers()  # pyright: ignore[reportAttributeAccessIssue]
        code = 0
    except BaseException:
        traceback.print_exc()
        barrier.abort()
    finally:
        os._exit(code)


def _fork_server(_: str, arguments: list[str], inherited: list[int]) -> int:
    # What `spawnv_passfds` does, without the new interpreter that would import torch for two seconds: a rank was
    # forked before it had any thread, so that what it forks is as good as new once other files are closed.
    process = os.fork()
    if process:
        return process
    try:
        for descriptor in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
            if descriptor > 2 and descriptor not in inherited:
                with suppress(OSError):  # that of the listing
                    os.close(descriptor)
        exec(arguments[-1], {})
    finally:
        os._exit(1)


class Life(NamedTuple):
    """What is known of a generation from outside."""

    layout: Layout
    start: int  # step


def _live(run: Run, generation: int, layout: Layout, rng: Random, last_step: int | None) -> Life:
    """Lets a generation of ranks live for a random time, or up to a step."""
    saved = run.saved()
    barrier = multiprocessing.get_context("fork").Barrier(layout.ranks)
    prefix, group, ranks = f"/soak-{os.getpid()}", 0, []
    for rank in range(layout.ranks):
        ranks.append(_fork_rank(group, prefix, barrier, run, generation, layout, rank, last_step))
        group = ranks[0]
    starts_up, life_s = rng.random() < 0.25, rng.uniform(0, LONGEST_LIFE_S)
    try:
        if last_step is None:
            if not starts_up:
                _wait_for_bytes(run.log(generation, layout.ranks - 1))
            time.sleep(life_s)
            os.killpg(group, signal.SIGKILL)
        ended = _reap(20 if last_step is None else 200)
    finally:
        with suppress(ProcessLookupError):  # as it should be
            os.killpg(group, signal.SIGKILL)
    wanted = 0 if last_step is not None else -signal.SIGKILL
    assert [ended[rank] for rank in ranks] == [wanted] * layout.ranks, "a rank ended by itself"
    for semaphore in Path("/dev/shm").glob(f"sem.{prefix[1:]}-*"):  # whoever would have removed them was killed
        semaphore.unlink()
    return Life(layout, saved.step if saved else 0)


def _wait_for_bytes(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, f"no step in a minute: {path}"
        time.sleep(0.005)


def _reap(patience_s: float) -> dict[int, int]:
    """Waits until no process is left of a generation, data workers and their servers included."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + patience_s
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if process:
            ended[process] = os.waitstatus_to_exitcode(status)
        else:
            assert time.monotonic() < deadline, "processes outlived the SIGKILL of their group"
            time.sleep(0.005)


# The whole run -------------------------------------------------------------------------------------------------


@contextmanager
def _quick_servers() -> Iterator[None]:
    spawn, util.spawnv_passfds = util.spawnv_passfds, _fork_server
    with tempfile.TemporaryDirectory() as short:  # the path of a socket may have 107 bytes
        tempfile.tempdir = short
        try:
            yield
        finally:
            tempfile.tempdir, util.spawnv_passfds = None, spawn


def soak(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Runs, kills, and checks.

    Raises:
        AssertionError: What was consumed is not what was planned.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans are reaped here, and none goes unseen
    run, begin = Run(folder), time.monotonic()
    run.write_corpora()
    lives: list[Life] = []
    layout = None
    with _quick_servers():
        for generation in range(kills + 1):
            rng = Random(f"{seed}/{generation}")
            layout = Layout.drawn(rng, layout)
            saved = run.saved()
            end = max(STEPS_AT_LEAST, saved.step if saved else 0) + 5 if generation == kills else None
            lives.append(_live(run, generation, layout, rng, end))
    run_s = time.monotonic() - begin
    saved = run.saved()
    assert saved is not None
    consumed, rolled_back = _consumed(run, lives, saved.step)
    _check_plan(run, consumed, rolled_back)
    epochs = _check_epochs(run, [row for step in consumed for row in step.rows])
    return {
        "kills": kills,
        "steps": saved.step,
        "samples": saved.step * GLOBAL_BATCH,
        "epochs": epochs,
        "rank-steps rolled back": len(rolled_back),
        "kills before a first step": sum(not _read_log(run.log(number, 0)) for number in range(kills)),
        "ranks": dict(sorted(Counter(life.layout.ranks for life in lives).items())),
        "accumulation": dict(sorted(Counter(life.layout.accumulation for life in lives).items())),
        "workers per rank": dict(sorted(Counter(life.layout.workers for life in lives).items())),
        "seconds": round(run_s),
    }


@dataclass
class Step:
    """What was consumed in a step."""

    rows: list[Row]  # by position
    bad: list[str]  # sorted keys


def _consumed(run: Run, lives: list[Life], last_step: int) -> tuple[list[Step], list[tuple[int, Step]]]:
    """Every step that counts, by all ranks together; and what single ranks had done of steps that were rolled back."""
    steps: list[Step] = []
    rolled_back: list[tuple[int, Step]] = []
    for generation, life in enumerate(lives):
        stop = lives[generation + 1].start if generation + 1 < len(lives) else last_step
        logs = [_read_log(run.log(generation, rank)) for rank in range(life.layout.ranks)]
        for log in logs:
            assert [step for step, _ in log] == [life.start + number for number in range(len(log))]
            assert len(log) >= stop - life.start
        for number in range(stop - life.start):
            parts = [log[number][1] for log in logs]
            rows = sorted(row for part in parts for row in part.rows)
            steps.append(Step(rows, sorted(key for part in parts for key in part.bad)))
        rolled_back += [entry for log in logs for entry in log[stop - life.start :]]
    return steps, rolled_back


def _read_log(path: Path) -> list[tuple[int, Step]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may have been cut by the kill
    contents = [json.loads(line) for line in lines]
    return [(line["step"], Step([tuple(row) for row in line["rows"]], line["bad"])) for line in contents]


def _check_plan(run: Run, consumed: list[Step], rolled_back: list[tuple[int, Step]]) -> None:
    """One process that nobody kills takes the same samples in the same steps."""
    data = run.training(Layout(1, 1, 0), 0)
    planned: list[Step] = []
    for batch in islice(data.batches(data.initial_state()), len(consumed) + CHECKPOINT_EVERY):
        rows = sorted(zip(*(batch.tensors[name].tolist() for name in IDS), strict=True))
        planned.append(Step(rows, sorted(sample.key for sample in batch.bad)))
    for number, (ours, plan) in enumerate(zip(consumed, planned, strict=False)):
        assert ours == plan, f"step {number}"
        assert [row[0] for row in ours.rows] == [*range(number * GLOBAL_BATCH, (number + 1) * GLOBAL_BATCH)]
    for number, part in rolled_back:
        assert set(part.rows) <= set(planned[number].rows), f"step {number}, rolled back"


def _check_epochs(run: Run, rows: list[Row]) -> dict[str, int]:
    """Each epoch of each source has all of its good samples, and one of them again in the place of the bad one."""
    epochs: dict[str, int] = {}
    seen = 0
    for name in SOURCES:
        pairs = run.pairs(name)
        captions = {_id(image): _id(text) for number, (image, text) in enumerate(pairs) if number != BAD}
        ours = [(image, caption) for _, image, caption in rows if image in captions]
        assert all(captions[image] == caption for image, caption in ours)
        seen += len(ours)
        epochs[name] = len(ours) // len(pairs)
        for epoch in range(epochs[name] + 1):
            images = [image for image, _ in ours[epoch * len(pairs) : (epoch + 1) * len(pairs)]]
            repeated = len(images) - len(set(images))
            assert repeated == 1 if len(images) == len(pairs) else repeated <= 1, f"epoch {epoch} of {name}"
    assert seen == len(rows)
    return epochs


def _id(content: bytes) -> int:
    return int(hash64(content, "<i8"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), int(sys.argv[1]), int(sys.argv[2]))
    for name, value in figures.items():
        print(f"{name}: {value}")
