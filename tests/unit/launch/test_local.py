"""`python -m launch local`: the command it builds, and a run's end as the user sees it.

The runs are real ones, torchrun and two processes, with a stand-in for the trainer.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.local import default_processes, torchrun_command

REPOSITORY = Path(__file__).parents[3]

TRAINER = """
import os, signal, sys, time
from pathlib import Path

def leave(code):
    Path(os.environ["PRETRAIN_EXIT_CODE_FILE"]).write_text(f"{code}\\n")
    sys.exit(code)

behaviour, rank = sys.argv[3], int(os.environ["RANK"])
stopping = []
if behaviour == "save":
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
if behaviour == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"pid={os.getpid()} threads={os.environ['OMP_NUM_THREADS']}", flush=True)
if behaviour == "mistake" and rank == 1:
    print("data.train names no file", file=sys.stderr)
    leave(4)
if behaviour == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "done":
    sys.exit()
while not stopping:
    time.sleep(0.02)
time.sleep(0.5)
leave(85)
"""

CONFIG = """
from data_pipelines.errors import UserError

def load_config(path, overrides):
    if "model.width=10" in overrides:
        raise UserError("model.width 10 is not a multiple of model.heads 3")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose `pretrain` package is a stand-in."""
    package = tmp_path / "pretrain"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(TRAINER)
    (package / "config.py").write_text(CONFIG)
    return tmp_path


def launch(folder: Path, *words: str, module: str = "launch", **options: Any) -> subprocess.Popen[str]:
    """Start `python -m launch` as if from a shell without GPUs."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def local(folder: Path, behaviour: str, **options: Any) -> subprocess.Popen[str]:
    return launch(folder, "local", "x.yaml", "--nproc", "2", behaviour, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a run; return its exit code, its output and the last line of its errors."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.strip().splitlines()[-1] if err.strip() else ""


def started_pids(process: subprocess.Popen[str]) -> list[int]:
    """Wait until both ranks have started."""
    assert process.stdout is not None
    text = ""
    while len(pids := re.findall(r"pid=(\d+)", text)) < 2:  # two ranks may write on one line
        line = process.stdout.readline()
        assert line, text
        text += line
    return [int(pid) for pid in pids]


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_command_hands_config_and_overrides_to_the_trainer():
    command = torchrun_command(Path("configs/x.yaml"), ["training.steps=10"], processes=4)
    assert command[:3] == [sys.executable, "-m", "launch.torchrun"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[-5:] == ["-m", "pretrain", "train", "configs/x.yaml", "training.steps=10"]


def test_the_doctor_starts_as_training_does(folder: Path):
    code, out, _ = finish(launch(folder, "local", "x.yaml", "--doctor", "--dry-run", "--nproc", "2", "a.b=1"))
    assert code == 0
    assert out.endswith("-m pretrain doctor x.yaml a.b=1\n")


@pytest.mark.parametrize(("gpus", "cores", "processes"), [(8, 64, 8), (1, 64, 1), (0, 64, 2), (0, 1, 1)])
def test_a_process_a_gpu_or_two_on_the_cpu(gpus: int, cores: int, processes: int):
    assert default_processes(gpus, cores) == processes


def test_help_answers_without_torch():
    code = "import sys; sys.argv = ['launch', 'local', '--help']\nfrom launch.__main__ import main\n"
    code += "try: main(sys.argv[1:])\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True).endswith("False\n")


def test_a_dry_run_prints_a_command_for_the_shell_and_starts_nothing(folder: Path):
    code, out, _ = finish(launch(folder, "local", "x.yaml", "--dry-run", "--nproc", "2", "note=a b"))
    assert code == 0
    assert "-m pretrain train x.yaml 'note=a b'" in out
    assert "DS_ACCELERATOR=cpu" in out
    assert "OMP_NUM_THREADS" not in out, "the user's own setting is left alone"


def test_a_mistake_in_the_config_is_one_sentence_before_any_process_starts(folder: Path):
    code, out, last = finish(launch(folder, "local", "x.yaml", "model.width=10"))
    assert (code, out, last) == (4, "", "model.width 10 is not a multiple of model.heads 3")


def test_an_unknown_option_is_refused(folder: Path):
    code, _, last = finish(launch(folder, "local", "x.yaml", "--nprocs-per-node=2"))
    assert code == 2
    assert "unrecognized arguments: --nprocs-per-node=2" in last


def test_a_finished_run_ends_with_0_and_the_ranks_see_the_users_threads(folder: Path):
    code, out, last = finish(local(folder, "done"))
    assert (code, last) == (0, "")
    assert out.count("threads=3") == 2


def test_a_ranks_own_exit_code_and_sentence_reach_the_user(folder: Path):
    process = local(folder, "mistake")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    sentence, last = err.strip().splitlines()
    assert sentence == "data.train names no file"
    assert last.startswith("launch: rank 1 ended with 4; exit code 4 (the config, the data")
    assert not any(is_running(int(pid)) for pid in re.findall(r"pid=(\d+)", out))


def test_a_killed_rank_is_named_and_the_other_stopped(folder: Path):
    code, out, last = finish(local(folder, "killed"))
    assert code == 137
    assert last == "launch: rank 1 killed by SIGKILL; exit code 137 (out of memory is the usual reason)"
    assert not any(is_running(int(pid)) for pid in re.findall(r"pid=(\d+)", out))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_lets_the_ranks_save_however_often_it_comes(folder: Path, name: str):
    process = local(folder, "save")
    pids = started_pids(process)
    process.send_signal(signal.Signals[name])
    for _ in range(3):  # a third SIGTERM is the one that makes plain torchrun abandon the ranks
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    code, _, last = finish(process)
    assert code == 85
    assert last == "launch: stopped as asked; exit code 85 (saved what there was; the same command goes on from there)"
    assert not any(is_running(pid) for pid in pids)


def test_a_second_ctrl_c_kills_ranks_that_do_not_stop(folder: Path):
    process = local(folder, "ignore")
    pids = started_pids(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert all(is_running(pid) for pid in pids)
    process.send_signal(signal.SIGINT)
    code, _, last = finish(process)
    assert code == 143
    assert last.endswith("exit code 143 (stopped before it could save; the newest checkpoint, if there is one, stays)")
    assert not any(is_running(pid) for pid in pids)


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(folder: Path):
    """As by `nohup ... &`, whose terminal is closed, and Ctrl-C in a shell that runs it in the background."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = local(folder, "save", preexec_fn=ignore)
    pids = started_pids(process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert all(is_running(pid) for pid in pids)
    process.send_signal(signal.SIGTERM)
    code, _, last = finish(process)
    said = "launch: stopped as asked; exit code 85 (saved what there was; the same command goes on from there)"
    assert (code, last) == (85, said)


def test_a_run_starts_by_torchruns_own_words(folder: Path):
    words = ["--standalone", "--nnodes=1:1", "--nproc_per_node=2", "-m", "pretrain", "train", "x.yaml", "done"]
    code, out, last = finish(launch(folder, *words, module="launch.torchrun"))
    assert (code, last) == (0, "")
    assert out.count("threads=3") == 2
