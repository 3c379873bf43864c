"""How a run is told to stop or to save: by signals to any rank, by files, by the clock; and under plain torchrun."""

import os
import signal
import subprocess
import sys
import time

from e2e.conftest import metrics, ranks_of, run, start, survivors, wait_for_step

SHORT = ("data.heldout=null", "checkpoint.every=1000", "training.steps=9999")


def saved_steps(config) -> list[int]:
    return sorted(int(path.name[5:]) for path in (config.output / "checkpoints").glob("step-*"))


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_save_and_stop_files_are_heeded_once_and_a_signal_to_one_rank_stops_them_all(config):
    process = start("launch", "local", config.path, "--nproc", 2, *SHORT, mark="orders")
    wait_for_step(process, config.output, 2)
    (config.output / "SAVE").touch()
    wait_until(lambda: saved_steps(config))
    assert not (config.output / "SAVE").exists()
    wait_for_step(process, config.output, saved_steps(config)[0] + 2)
    (config.output / "STOP").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    last = metrics(config.output)[-1]["step"]
    assert saved_steps(config)[-1] == last
    assert err.startswith(f"Told to stop by the file {config.output}/STOP: saved step {last}. The same command goes on")
    assert "restart" not in err
    assert not (config.output / "STOP").exists()

    process = start("launch", "local", config.path, "--nproc", 2, *SHORT, mark="orders")
    wait_for_step(process, config.output, last + 2)
    for number in (signal.SIGUSR1, signal.SIGCONT, signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT, signal.SIGTERM):
        os.kill(ranks_of(process)[1], number)  # as Slurm repeats its signals
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    assert f"at step {last}." in out
    last = metrics(config.output)[-1]["step"]
    assert err.startswith(f"Told to stop: saved step {last}.")
    assert saved_steps(config)[-1] == last
    assert survivors("orders") == []


def test_a_known_end_of_the_jobs_time_makes_the_run_save_ahead_of_it(config, monkeypatch):
    begin = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(begin + 40))  # of which half at most is kept for saving
    done = run("pretrain", "train", config.path, "engine.zero_stage=0", *SHORT)
    assert done.code == 85, done.err
    assert done.err.startswith("The job's time ends at ")
    assert f"saved step {saved_steps(config)[-1]}." in done.err
    assert time.time() < begin + 40


def test_ranks_that_plain_torchrun_leaves_behind_save_and_leave(config):
    """SIGUSR1 kills torchrun, whose ranks would train on by themselves, and write where the next start writes."""
    words = ("--standalone", "--nproc-per-node", 2, "-m", "pretrain", "train", config.path)
    process = start("torch.distributed.run", *words, *SHORT, mark="plain")
    wait_for_step(process, config.output, 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == -signal.SIGUSR1
    wait_until(lambda: not survivors("plain"))
    assert saved_steps(config) == [metrics(config.output)[-1]["step"]]


BUSY = """
import sys, time
from pretrain.trainer import Trainer
Trainer._take_stock = lambda *_: print("busy", flush=True) or time.sleep(999)
from pretrain.__main__ import main
main()
"""


def test_a_second_ctrl_c_ends_a_process_that_cannot_finish_its_step_and_a_repeated_one_does_not(config, tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    command = [sys.executable, tmp_path / "busy.py", "train", config.path, "engine.zero_stage=0", *SHORT]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("busy" in line for line in process.stdout)
    for _ in range(3):  # as `timeout -s INT` sends it, to the process and to its group
        process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert err == "Told again to stop: leaving at once; the newest checkpoint stays.\n"
