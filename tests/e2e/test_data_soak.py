"""Killed at random moments and resumed on other layouts, a run consumes what it would have without a kill."""

import os
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "soak.py"


def test_eight_kills_and_other_layouts_after_each_leave_every_step_as_it_was_planned():
    # In a process of its own, which forks ranks and so must have no threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(SOAK), "8", "5"], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert figures["kills"] == "8"
    assert int(figures["rank-steps rolled back"]) > 0
    assert int(figures["steps"]) >= 45
