"""What a run's environment holds, and that the user's own setting wins."""

from pathlib import Path

import pytest

from launch.environment import count_gpus, missing, variables


@pytest.mark.parametrize(
    ("cores", "processes", "threads"),
    [(8, 2, "4"), (7, 2, "3"), (2, 2, "1"), (1, 4, "1")],
)
def test_the_ranks_share_the_cores_and_each_has_one_at_least(cores: int, processes: int, threads: str):
    assert variables(processes=processes, gpus=0, cores=cores, nodes=1)["OMP_NUM_THREADS"] == threads


def test_deepspeed_is_told_of_the_cpu_only_where_there_is_no_gpu():
    assert variables(processes=1, gpus=0, cores=1, nodes=1)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in variables(processes=1, gpus=1, cores=1, nodes=1)


def test_ranks_on_several_machines_do_not_meet_on_the_loopback_interface():
    assert variables(processes=1, gpus=0, cores=1, nodes=1)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in variables(processes=1, gpus=0, cores=1, nodes=2)


def test_the_users_own_setting_wins():
    needed = variables(processes=2, gpus=0, cores=8, nodes=1)
    kept = missing(needed, {"OMP_NUM_THREADS": "16", "TOKENIZERS_PARALLELISM": ""})
    assert "OMP_NUM_THREADS" not in kept
    assert "TOKENIZERS_PARALLELISM" not in kept
    assert kept["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 3), ("0,2", 2), ("GPU-1a2b", 1), ("", 0), ("-1", 0)],
)
def test_gpus_are_counted_from_their_device_files(tmp_path: Path, visible: str | None, count: int):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(environ, devices=tmp_path) == count


def test_naming_gpus_on_a_machine_without_any_does_not_make_them(tmp_path: Path):
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, devices=tmp_path) == 0
