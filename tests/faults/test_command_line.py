"""The whole of it once more by the command line itself, with all that a start costs: nothing is forked warm here."""

import re

import pytest

from faults.harness import assert_intact, resumed_at
from faults.injector import Fault

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well


@pytest.mark.long
def test_ranks_killed_in_a_step_and_in_a_save_go_on_and_so_does_the_command_after_its_own_kill(make_run, undisturbed):
    run = make_run()
    faults = [
        Fault(1, "forward", "SIGKILL", step=5),
        Fault(0, "os.rename", "SIGKILL all", step=2, path="{save}$", restart=1),
        Fault(1, "backward", "SIGKILL launcher", step=5, restart=2),
    ]
    killed = run.start(faults=faults, cold=True).end()
    assert killed.code == -9, killed.err
    assert len(re.findall("killed by SIGKILL; restart [12] of", killed.err)) == 2, killed.err
    assert_intact(run, undisturbed)
    newest = run.newest()
    ended = run.live(cold=True)
    assert ended.code == 0, ended.err
    assert resumed_at(ended) == newest
    assert run.steps() == undisturbed
