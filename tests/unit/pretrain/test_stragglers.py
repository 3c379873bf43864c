"""The rank that the others wait for is told from those that wait."""

from dataclasses import replace

import pytest
import torch

from pretrain.parallel.mesh import ALONE, Axis, Mesh
from pretrain.stragglers import Slowest, Stragglers


class World(Axis):
    """An axis whose other ranks have said what `others` holds."""

    others: torch.Tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.others


def compared(own: tuple[float, float], others: list[tuple[float, float]], stages: int = 1, steps: int = 10):
    """What two looks in a row find; a step takes a second."""
    world = World(0, 1 + len(others), None)
    object.__setattr__(world, "others", torch.tensor([(0.0, 0.0), *others], dtype=torch.float64))
    stragglers = Stragglers(replace(Mesh(torch.device("cpu")), world=world, pp=replace(ALONE, size=stages)))
    found: list[Slowest | None] = []
    for _ in range(2):
        for _ in range(steps):
            stragglers.end(own[0], 1.0)
        stragglers._sums[1] = own[1] * steps
        found.append(stragglers.compare())
    return found


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        (
            (0.0, 0.3),
            [(0.0, 0.3), (0.0, 0.9)],
            "rank 2 holds up the others: it computes 0.9 s per step, the median",
        ),
        ((0.0, 0.3), [(0.0, 0.9)], "rank 1 holds up the others: it computes 0.9 s per step, the median is 0.3"),
        (
            (0.8, 0.3),
            [(0.01, 0.3)],
            "rank 0 holds up the others: it waits for its data 0.8 s per step",
        ),
    ],
)
def test_a_rank_that_is_slow_twice_in_a_row_is_named(own, others, said):
    first, second = compared(own, others)
    assert not first.confirmed
    assert second.confirmed
    assert str(second).startswith(said)
    assert second.metrics()["time/slowest_rank"] == second.rank


@pytest.mark.parametrize(
    ("own", "others", "stages"),
    [
        ((0.0, 0.3), [(0.0, 0.4), (0.0, 0.4)], 1),  # within the factor
        ((0.001, 0.3), [(0.1, 0.3)], 1),  # a tenth of a step
        ((0.0, 0.3), [(0.0, 0.3), (0.0, 0.9), (0.0, 0.9)], 2),  # the second stage has more to do, on all of its ranks
    ],
)
def test_a_rank_that_costs_little_or_has_more_to_do_is_not_named(own, others, stages):
    assert not any(slowest.confirmed for slowest in compared(own, others, stages))


def test_a_few_steps_or_a_rank_alone_are_not_compared():
    assert compared((0.0, 0.3), [(0.0, 0.9)], steps=4)[0] is None
    assert compared((0.0, 0.3), []) == [None, None]
    assert compared((0.0, 0.3), [(0.0, 0.9)], stages=2) == [None, None]
