"""What saving costs the training loop, and what the index of thousands of ranks costs: `make bench-checkpoint`.

The figures of docs/measurements.md; tests/unit/pretrain/test_checkpoint_scale.py holds their ratios to bounds.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from pretrain.checkpoint.boxes import Box
from pretrain.checkpoint.index import INTERVALS, TABLE, Index
from pretrain.checkpoint.layout import Holding, Layout
from pretrain.checkpoint.store import CheckpointStore, Saved
from pretrain.checkpoint.writer import Job, Writer
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE, Axis
from pretrain.parallel.tensor import Part, whole

KINDS = ("master", "exp_avg", "exp_avg_sq")
SORTS = SYNCHRONOUS, ASYNCHRONOUS = "synchronous", "asynchronous"
STEP_S = 0.05
PAUSE_S = 1.0  # saves of a run are minutes apart: what the one before made superfluous is gone
TENSOR_PARALLEL, PIPELINE_PARALLEL, NODE = 8, 8, 8


def state(mib: int) -> list[Fragment]:
    """A rank's state of so many MiB, in matrices of 3 MiB: 1 for each kind."""
    return [
        Fragment(f"layer{number}.weight", whole(torch.empty(512, 512)), 0, {kind: torch.rand(2**18) for kind in KINDS})
        for number in range(mib // 3)
    ]


def measure_stalls(fragments: list[Fragment], folder: Path, saves: int) -> dict[str, tuple[float, float]]:
    """Seconds that the loop stands still for a save, and seconds until it is there: medians, the sorts in turns.

    The loop's steps leave the processor to others, as those of a GPU do. The first save of each sort, which gets its
    memory, is left out.
    """
    stores = {sort: CheckpointStore(folder / sort, ALONE, asynchronous=sort == ASYNCHRONOUS) for sort in SORTS}
    figures: dict[str, list[tuple[float, float]]] = {sort: [] for sort in SORTS}
    for step in range(saves + 1):
        for sort, store in stores.items():
            figures[sort].append(measure_save(store, step, fragments, wait=sort != ASYNCHRONOUS))
            time.sleep(PAUSE_S)
    medians = {sort: [statistics.median(column) for column in zip(*figures[sort][1:], strict=True)] for sort in SORTS}
    return {sort: (stall, total) for sort, (stall, total) in medians.items()}


def measure_save(store: CheckpointStore, step: int, fragments: list[Fragment], wait: bool) -> tuple[float, float]:
    begin = time.perf_counter()
    store.save(step, fragments, {})
    outcome = store.settle(wait=True) if wait else None
    stall = time.perf_counter() - begin
    while outcome is None:
        time.sleep(STEP_S)
        border = time.perf_counter()
        outcome = store.settle(wait=False)
        stall += time.perf_counter() - border
    assert isinstance(outcome, Saved)
    return stall, time.perf_counter() - begin


@dataclass(frozen=True)
class PretendedWorld(Axis):
    """The first of so many ranks, with what all of them send to it."""

    parts: Iterator[list[bytes]]

    def to_first(self, value: bytes) -> Iterator[bytes]:
        return iter(next(self.parts))


def pretended_holding(rank: int, ranks: int, parameters: int) -> Holding:
    """ZeRO-3 on a mesh of tensor-parallel neighbours, then data-parallel ranks, then stages of a pipeline."""
    data_parallel = ranks // (TENSOR_PARALLEL * PIPELINE_PARALLEL)
    tp, rest = rank % TENSOR_PARALLEL, rank // TENSOR_PARALLEL
    dp, pp = rest % data_parallel, rest // data_parallel
    part = Part((1024, 64), (128 * tp, 0), (128, 64), is_cut=True)
    length = 128 * 64 // data_parallel
    views = dict.fromkeys(KINDS, torch.empty(length, device="meta"))
    names = (f"stage{pp}.block{number // 12}.weight{number % 12}" for number in range(parameters))
    return Holding([Fragment(name, part, dp * length, views) for name in names], rank // NODE * NODE)


class IndexFigures(NamedTuple):
    """What the index of a pretended world costs."""

    intervals: int
    megabytes: float
    commit_s: float
    commit_mib: float
    open_s: float
    find_s: float


def measure_index(ranks: int, parameters: int, folder: Path) -> IndexFigures:
    """On the first rank: from what all ranks have sent to an index on the disk. On each: until it has found its own.

    Seconds are the processor's, which do not see what else the machine does.
    """
    heads, intervals, entries = [], [], []
    for rank in range(ranks):
        holding = pretended_holding(rank, ranks, parameters)
        heads.append(holding.head)
        intervals.append(holding.intervals.tobytes())
        entries.append(holding.entries)
    entries = [mine if mine not in entries[:rank] else b"" for rank, mine in enumerate(entries)]
    mine = pretended_holding(0, ranks, parameters)

    def commit() -> None:
        index = Layout(torch.stack(heads)).gather_index(
            PretendedWorld(0, ranks, None, iter([entries, intervals])), mine
        )
        assert index is not None
        table = memoryview(index.table.model_dump_json().encode())
        numbers = index.intervals.reshape(-1).view("uint8").data
        writer = Writer([Job(folder / TABLE, 0, [table]), Job(folder / INTERVALS, 0, [numbers])])
        writer.join()
        assert writer.problem is None

    def find() -> None:
        for parameter in index.table.parameters[:parameters]:
            assert list(index.find(parameter, Box((0, 0), (1, 64))))

    commit_s = _core_s(commit)
    tracemalloc.start()
    commit()
    commit_mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    open_s = _core_s(lambda: Index.open(folder))
    index = Index.open(folder)
    size = sum((folder / name).stat().st_size for name in (TABLE, INTERVALS))
    return IndexFigures(len(index.intervals), size / 1e6, commit_s, commit_mib, open_s, _core_s(find))


def _core_s(task: Callable[[], object]) -> float:
    begin = time.process_time()
    task()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the stall of a save, and the index of thousands of ranks.")
    parser.add_argument("--mib", type=int, default=768, help="state of one rank (default 768)")
    parser.add_argument("--saves", type=int, default=5, help="of each sort (default 5)")
    parser.add_argument("--ranks", type=int, default=4096, help="of the pretended run (default 4096)")
    parser.add_argument("--parameters", type=int, default=1000, help="that each of them holds (default 1000)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir="."))
    try:
        fragments = state(options.mib)
        stalls = measure_stalls(fragments, folder, options.saves)
        print("| saving | the loop stands still, s | until it is there, s |\n|---|---|---|")
        for sort, (stall, total) in stalls.items():
            print(f"| {sort} | {stall:.3f} | {total:.2f} |")
        share = stalls[ASYNCHRONOUS][0] / stalls[SYNCHRONOUS][0]
        print(f"\n{options.mib:,} MiB: the stall is {share:.1%} of a synchronous save's.\n", flush=True)
        figures = measure_index(options.ranks, options.parameters, folder)
        print("| ranks | intervals | index, MB | commit, core-s | commit, MiB | open, core-s | find own, core-s |")
        print("|---|---|---|---|---|---|---|")
        print(
            f"| {options.ranks:,} | {figures.intervals:,} | {figures.megabytes:.0f} | {figures.commit_s:.2f} "
            f"| {figures.commit_mib:.0f} | {figures.open_s:.2f} | {figures.find_s:.2f} |"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
