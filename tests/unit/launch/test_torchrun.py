"""How a run ended, told from how its ranks did."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.endings import describe, read_exit_code, root_cause
from launch.environment import count_cores
from launch.torchrun import environment_for, main


@pytest.mark.parametrize(
    ("exit_codes", "code", "words"),
    [
        ({0: 1, 1: -9, 2: 1}, 137, "ranks 0, 2 ended with 1; rank 1 killed by SIGKILL"),
        ({0: -15, 1: 5}, 5, "rank 1 ended with 5"),
        ({0: 1, 1: -11}, 139, "rank 0 ended with 1; rank 1 killed by SIGSEGV"),
        ({0: 1, 1: 1}, 1, "ranks 0, 1 ended with 1"),
        ({0: -15, 1: -15}, 143, "ranks 0, 1 killed by SIGTERM"),
    ],
)
def test_the_rank_that_failed_first_is_told_from_those_that_fell_with_it(
    exit_codes: dict[int, int], code: int, words: str
):
    assert root_cause(exit_codes) == code
    assert describe(exit_codes) == words


@pytest.mark.parametrize(("text", "code"), [("85\n", 85), ("4", 4), ("", None), ("0", None), ("1", None), ("x", None)])
def test_only_the_codes_of_a_run_count_in_the_exit_code_file(tmp_path: Path, text: str, code: int | None):
    path = tmp_path / "exit-code"
    path.write_text(text)
    assert read_exit_code(path) == code


def test_a_run_that_left_no_exit_code_file_has_no_code_of_its_own(tmp_path: Path):
    assert read_exit_code(tmp_path / "exit-code") is None


@pytest.mark.parametrize(
    ("nproc_per_node", "nnodes", "processes", "alone"),
    [
        ("2", "1", 2, True),
        ("2", "1:1", 2, True),
        ("4", "1:2", 4, False),
        ("1", "3", 1, False),
        ("cpu", "1", count_cores(), True),
        ("auto", "1:1", count_cores(), True),
    ],
)
def test_torchruns_words_for_numbers_are_read_as_torchrun_reads_them(
    monkeypatch, nproc_per_node: str, nnodes: str, processes: int, alone: bool
):
    monkeypatch.setattr("launch.torchrun.count_cores", lambda: 64)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    found = environment_for(nproc_per_node, nnodes)
    assert found["OMP_NUM_THREADS"] == str(64 // processes)
    assert ("GLOO_SOCKET_IFNAME" in found) == alone


def test_a_process_for_each_gpu_that_torch_finds(monkeypatch):
    monkeypatch.setattr("launch.torchrun.count_cores", lambda: 64)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert environment_for("gpu", "1")["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nproc-per-node gpu", "--nproc-per-node gpu starts no process here: give a number, cpu, auto, or gpu"),
        ("--nproc-per-node many", "--nproc-per-node many starts no process here"),
        ("--nproc-per-node 0", "--nproc-per-node 0 starts no process here"),
        ("--nproc-per-node=-1", "--nproc-per-node -1 starts no process here"),
        ("--nnodes 0", "--nnodes 0 is no number of machines: give one, or FEWEST:MOST, such as 1:2."),
        ("--nnodes 2:1", "--nnodes 2:1 is no number of machines"),
        ("--nnodes 1:2:3", "--nnodes 1:2:3 is no number of machines"),
        ("--nnodes x", "--nnodes x is no number of machines"),
        ("--max-restarts=-1", "max_restarts must be >= 0"),
        ("--local-ranks-filter x", "must be a comma-separated list of integers"),
    ],
)
def test_arguments_that_torchrun_cannot_use_are_one_sentence(capsys, monkeypatch, words: str, said: str):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.environ", {})
    assert main([*words.split(), "-m", "pretrain", "train", "x.yaml"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("launch: ")
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("endpoint", "options"), [("localhost:0", "is_host=1,join_timeout=1"), ("no.such.host.invalid:29", "is_host=0")]
)
def test_machines_that_do_not_meet_are_one_sentence(endpoint: str, options: str):
    words = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
    words += ["--rdzv-conf", f"{options},timeout=1,read_timeout=1", "-m", "this"]
    done = subprocess.run([sys.executable, "-m", "launch.torchrun", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"launch: the 2 machines did not meet at {endpoint}: see that" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("gpus", "usable", "said"), [(8, False, True), (8, True, False), (0, False, False)])
def test_gpus_that_torch_cannot_use_are_said_once(capsys, monkeypatch, gpus: int, usable: bool, said: bool):
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr("launch.torchrun.count_gpus", lambda environ: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    monkeypatch.setattr("launch.torchrun.run", lambda arguments: None)
    monkeypatch.setattr("launch.torchrun.stop_once", lambda: None)
    assert main(["--nproc-per-node", "2", "-m", "pretrain", "train", "x.yaml"]) == 0
    errors = capsys.readouterr().err
    assert errors.count("8 GPUs are here, and torch") == said
    assert errors.count("\n") == said
