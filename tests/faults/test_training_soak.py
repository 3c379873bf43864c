"""Killed at random moments and resumed on other layouts, a run takes the steps it would have taken without a kill."""

import os
import subprocess
import sys

import pytest

from warm import TESTS

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well


def test_eight_kills_and_random_layouts_after_them_change_no_step():
    # In a process of its own, since the ranks are forked.
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "soak_training.py"), "8", "1"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    figures = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert figures["kills"] == "8"
    assert int(figures["steps taken again"]) > 0
