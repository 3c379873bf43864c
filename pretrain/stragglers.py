"""Which rank the others wait for: each one's own time per step, without the time in which it waits for others.

A step's duration is the same on all ranks, since they meet in its collectives. Compared are the time that a rank waits
for its data, and how fast it computes: on a CPU by the time in which its thread ran or wanted to run, on a GPU, where
kernels and collectives overlap, by a fixed product of matrices.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain.parallel.mesh import Mesh

FACTOR = 1.5  # beyond the median of the ranks that do the same work
_LEAST_SHARE = 0.2  # of a step, which it costs at least
_LEAST_STEPS = 10  # over which the times are averaged
_SIZE = 4096  # of the product: 0.14 TFLOP, a third of a millisecond on an H100
_KINDS = ("data", "compute")


@dataclass(frozen=True)
class Slowest:
    """The rank whose own time exceeds the median by the largest factor."""

    rank: int
    kind: str
    own_s: float
    median_s: float
    confirmed: bool
    """It is beyond FACTOR for the second look in a row: no moment's noise, and not said yet."""

    @property
    def factor(self) -> float:
        return self.own_s / max(self.median_s, 1e-3)

    def metrics(self) -> dict[str, float]:
        return {"time/slowest_rank": self.rank, "time/slowest_over_median": self.factor}

    def __str__(self) -> str:
        what = "waits for its data" if self.kind == "data" else "computes"
        return (
            f"rank {self.rank} holds up the others: it {what} {self.own_s:.3g} s per step, the median is "
            f"{self.median_s:.3g} s"
        )


@dataclass
class Stragglers:
    """Adds up this rank's own times, and compares them with the others' now and then."""

    mesh: Mesh
    _sums: list[float] = field(default_factory=lambda: [0.0] * 3)
    _steps: int = 0
    _suspect: tuple[int, str] | None = None
    _looks: int = 0
    _busy_s: float = 0.0

    def begin(self) -> None:
        """A step's own work begins."""
        self._busy_s = busy_s()

    def end(self, data_s: float, step_s: float) -> None:
        """It has ended; `data_s` is how long the data was waited for before."""
        for index, value in enumerate((data_s, busy_s() - self._busy_s, step_s)):
            self._sums[index] += value
        self._steps += 1

    def compare(self) -> Slowest | None:
        """The slowest rank since the last answer. All ranks call it together; None where nothing can be compared."""
        if self._steps < _LEAST_STEPS or self.mesh.world.size == self.mesh.pp.size:
            return None
        data_s, compute_s, step_s = (total / self._steps for total in self._sums)
        self._sums, self._steps = [0.0] * 3, 0
        if self.mesh.device.type == "cuda":
            compute_s = _product_s(self.mesh.device)
        world, stages = self.mesh.world, self.mesh.pp.size
        times = torch.zeros(world.size, len(_KINDS), dtype=torch.float64)
        times[world.rank] = torch.tensor([data_s, compute_s])
        times = world.sum(times).view(stages, -1, len(_KINDS))  # a stage's ranks do the same work
        if self.mesh.device.type == "cuda":  # the step is as long as the slowest GPU makes it
            times[..., 1] *= step_s / times[..., 1].max()
        medians = times.median(dim=1, keepdim=True).values.expand_as(times)
        rank, kind = divmod(int((times - medians).argmax()), len(_KINDS))
        own_s, median_s = (float(table.reshape(-1, len(_KINDS))[rank, kind]) for table in (times, medians))
        slow = own_s > FACTOR * median_s and own_s - median_s > _LEAST_SHARE * step_s
        suspect = (rank, _KINDS[kind]) if slow else None
        self._looks = self._looks + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        return Slowest(rank, _KINDS[kind], own_s, median_s, suspect is not None and self._looks == 2)


def busy_s() -> float:
    """How long this thread has run, or was ready to run while others had the core."""
    try:
        running_ns, ready_ns, _ = Path(f"/proc/self/task/{os.getpid()}/schedstat").read_text().split()
        return (int(running_ns) + int(ready_ns)) / 1e9
    except (OSError, ValueError):  # a kernel without these statistics
        return time.thread_time()


def _product_s(device: torch.device) -> float:
    matrix = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(matrix, matrix)  # the first one chooses a kernel
    begin.record(torch.cuda.current_stream(device))
    for _ in range(4):
        torch.mm(matrix, matrix)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
