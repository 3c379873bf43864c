"""Ranks that srun starts: what they are told of their place."""

import pytest

from launch.task import environment
from pretrain.errors import ConfigError
from pretrain.parallel.mesh import own_gpu

SLURM = {"SLURM_NNODES": "2", "SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}


def test_a_task_knows_its_place_from_slurm():
    told = environment(SLURM, "n1:20007")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [told[name] for name in names] == ["11", "3", "16", "8", "n1", "20007"]


@pytest.mark.parametrize(("local_rank", "visible", "gpu"), [(0, 8, 0), (3, 8, 3), (7, 8, 7), (3, 1, 0), (0, 1, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_it_is_shown(local_rank, visible, gpu):
    assert own_gpu(local_rank, visible) == gpu


def test_more_ranks_than_gpus_are_told():
    with pytest.raises(ConfigError, match="Process 4 of this machine has no GPU of its own, since 4 are visible"):
        own_gpu(4, 4)
