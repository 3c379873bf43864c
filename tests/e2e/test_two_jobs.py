"""A job that is frozen while another takes over its folder: thawed, it ends with 8 and has changed nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e.conftest import metrics, processes, wait_for_step

# The real command with a shorter silence, of which the real one is a minute and a half.
IMPATIENT = "from pretrain import lease; lease.SILENCE_S = 4.0; from pretrain.__main__ import main; main()"
LAUNCHED = ("-m", "launch", "local", "--nproc", "2")


def begin(words: tuple[str, ...], config, mark: str, **environment: str) -> subprocess.Popen[str]:
    overrides = ("training.steps=9999", "checkpoint.keep=100", "checkpoint.every=2", "data.heldout=null")
    return subprocess.Popen(
        [sys.executable, *words, str(config.path), *overrides],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "E2E_MARK": mark} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def signal_all(mark: str, number: signal.Signals) -> None:
    for pid in processes(mark):
        os.kill(pid, number)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "requeued"),
    [
        pytest.param(LAUNCHED, True, id="requeued by Slurm, two ranks"),
        pytest.param(("-c", IMPATIENT, "train"), False, id="silent, one process"),
    ],
)
def test_a_frozen_job_whose_folder_was_taken_over_ends_with_8_and_changes_no_byte(config, words, requeued):
    slurm = ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}) if requeued else ({}, {})
    stale = begin(words, config, "stale", **slurm[0])
    wait_for_step(stale, config.output, 5)
    signal_all("stale", signal.SIGSTOP)
    new = begin(words, config, "new", **slurm[1])
    try:
        wait_until(lambda: (config.output / ".lease" / "000000002.json").exists())
        wait_until(lambda: metrics(config.output)[-1]["step"] > 12)
        signal_all("new", signal.SIGSTOP)  # so that nobody but the stale job could change anything
        before = content(config.output)
        signal_all("stale", signal.SIGCONT)
        _, err = stale.communicate(timeout=60)
        assert stale.returncode == 8, err
        assert err.count("which took it over from this one: this job ends, and leaves alone what is there.") == 1
        assert ("another job owns the run's folder now" in err) == requeued
        assert content(config.output) == before
        signal_all("new", signal.SIGCONT)
        new.send_signal(signal.SIGTERM)
        _, err = new.communicate(timeout=60)
        assert new.returncode == 85, err
    finally:
        for mark in ("stale", "new"):
            signal_all(mark, signal.SIGKILL)
    steps = [line["step"] for line in metrics(config.output)]
    assert steps == list(range(1, len(steps) + 1))
