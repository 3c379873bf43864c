"""The degrees of the axes make up the processes, or the run ends in one sentence with all of the numbers."""

import pytest
import torch

from pretrain.config import EngineConfig
from pretrain.errors import ConfigError
from pretrain.parallel import mesh
from pretrain.parallel.mesh import Axis, make_mesh

CPU = torch.device("cpu")


def degrees(**given):
    return EngineConfig(zero_stage=1, **given)


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        (
            4,
            {"tensor_parallel": 3},
            "tensor_parallel 3 x engine.pipeline_parallel 1 = 3 does not divide the 4 processes",
        ),
        (4, {"pipeline_parallel": 8}, "tensor_parallel 1 x engine.pipeline_parallel 8 = 8 does not divide the 4 proc"),
        (
            8,
            {"data_parallel": 2, "tensor_parallel": 2, "pipeline_parallel": 3},
            "engine.data_parallel 2 x engine.tensor_parallel 2 x engine.pipeline_parallel 3 = 12 does not make up",
        ),
    ],
)
def test_degrees_that_do_not_fit_the_processes_are_refused_with_all_numbers(world, given, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(Axis(0, world, None), CPU, degrees(**given))


def test_tensor_parallel_stays_inside_a_node(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel 4 does not divide the 2 processes of a node"):
        make_mesh(Axis(0, 8, None), CPU, degrees(tensor_parallel=4))


@pytest.fixture
def groups(monkeypatch):
    """The ranks of every group that would be made: making it takes all of the processes."""
    made = []
    monkeypatch.setattr(mesh.dist, "new_group", lambda ranks, **_: made.append(ranks) or tuple(ranks))
    return made


def test_a_rank_makes_its_own_groups_alone_and_ranks_that_share_one_agree_on_it(groups):
    made = {}
    for rank in range(16):
        make_mesh(Axis(rank, 16, None), CPU, degrees(tensor_parallel=2, pipeline_parallel=4))
        made[rank] = list(map(tuple, groups))
        groups.clear()
    for rank, (tp, dp, pp) in made.items():
        assert all(made[peer][0] == tp for peer in tp)
        assert all(made[peer][1] == dp for peer in dp)
        assert all(made[peer][2] == pp for peer in pp)
        assert rank in set(tp) & set(dp) & set(pp)


def test_neighbours_share_layers_and_the_farthest_ranks_are_stages(groups):
    """16 processes on 4 nodes: tensor parallel inside a node, the stages of a pipeline on different nodes."""
    here = make_mesh(Axis(5, 16, None), CPU, degrees(tensor_parallel=2, pipeline_parallel=4))
    assert (here.tp.group, here.dp.group, here.pp.group) == ((4, 5), (5, 7), (1, 5, 9, 13))
    assert (here.tp.rank, here.dp.rank, here.pp.rank) == (1, 0, 1)


def test_the_data_parallel_degree_is_inferred_or_checked(groups):
    assert make_mesh(Axis(0, 8, None), CPU, degrees(tensor_parallel=2)).dp.size == 4
    assert make_mesh(Axis(0, 8, None), CPU, degrees(tensor_parallel=2, data_parallel=4)).dp.size == 4
