"""What a run is told by files in its folder, and by the clock."""

import time

import pytest

from pretrain import orders as module
from pretrain.orders import Orders
from pretrain.time_limit import STARTED, time_limit

NEXT_DAY = time.mktime(time.strptime("1970-01-02T00:00:00", "%Y-%m-%dT%H:%M:%S"))


class Silent:
    requested = False


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def test_files_are_looked_for_once_per_second_and_removed(tmp_path, clock):
    orders = Orders(Silent(), tmp_path)
    (tmp_path / "SAVE").touch()
    assert orders.pending() == (0, 0)
    clock[0] += 1
    assert orders.pending() == (1, 0)
    clock[0] += 1
    assert orders.pending() == (0, 0)
    (tmp_path / "STOP").touch()
    clock[0] += 1
    assert orders.pending() == (0, 1)
    assert orders.reason == f"Told to stop by the file {tmp_path}/STOP"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_removed_is_heeded_once_and_said(tmp_path, clock, capsys):
    (tmp_path / "SAVE").mkdir()
    orders = Orders(Silent(), tmp_path)
    found = []
    for _ in range(3):
        clock[0] += 1
        found.append(orders.pending())
    assert found == [(1, 0), (0, 0), (0, 0)]
    assert f"{tmp_path}/SAVE is heeded once, since it cannot be removed (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step_s", "save_s", "hours", "margin_s"),
    [
        (1.0, None, 24, 152),  # 2 steps, 2 saves that nobody has measured yet, and the reserve
        (1.0, 5.0, 24, 42),
        (90.0, 400.0, 24, 1010),
        (90.0, 400.0, 0.1, 180),  # half of six minutes
    ],
)
def test_the_margin_before_the_end_follows_the_slowest_step_and_save(tmp_path, clock, step_s, save_s, hours, margin_s):
    end = clock[0] + 3600 * hours
    orders = Orders(Silent(), tmp_path, (clock[0], end))
    clock[0] += step_s
    assert orders.pending() == (0, 0)
    if save_s is not None:
        orders.saved(save_s)
        orders.saved(save_s / 2)
    assert orders.margin_s() == margin_s
    orders._last_border = clock[0] = end - margin_s
    assert orders.pending() == (0, 1)
    assert orders.reason == f"The job's time ends at {time.strftime('%F %T', time.localtime(end))}"


ARRAY = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.mark.parametrize(
    ("minutes", "environ", "expected"),
    [
        (None, {}, None),
        (2.0, {STARTED: "1000"}, (1000, 1120)),
        (None, {STARTED: "1000", "SLURM_JOB_END_TIME": "5000"}, (1000, 5000)),
        (2.0, {STARTED: "1000", "SLURM_JOB_END_TIME": "5000"}, (1000, 1120)),
        (None, {STARTED: "1000", "SLURM_JOB_ID": "7"}, (1000, NEXT_DAY)),
        (None, {STARTED: "1000", "SLURM_JOB_ID": "8"}, None),  # Slurm says that the time has no end
        (None, {STARTED: "1000", "SLURM_JOB_ID": "9"}, None),  # nor does it answer
        (None, {STARTED: "1000", "SLURM_JOB_ID": "9", **ARRAY}, (1000, NEXT_DAY)),  # the array's own number
    ],
)
def test_the_end_of_a_job_is_the_configs_or_slurms_whichever_comes_first(
    tmp_path, monkeypatch, minutes, environ, expected
):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\ncase $3 in 7|9_1) echo 1970-01-02T00:00:00 ;; 8) echo N/A ;; *) exit 1 ;; esac\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert time_limit(minutes, environ) == expected
