"""A run that is struck at any moment goes on, by itself or by the same command, as if it had not been.

One run on two ranks lives through all of it. Its launcher is killed twice; then its ranks are struck once in each of
many lives, which follow one another in place.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import pytest

from faults.harness import Ended, Life, Run, assert_intact
from faults.injector import Fault

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well


class Blow(NamedTuple):
    """A fault, what the launcher says of it, and whether the save it strikes is a checkpoint, where it strikes one."""

    fault: Fault
    said: str
    committed: bool | None = None


KILLED = "killed by SIGKILL"
SAVE = 2  # every so many steps
LATER = 2 * SAVE + 1  # the first save is done by then, since the second one waits for it
LAUNCHER = {
    "between two saves": Fault(1, "update", "SIGKILL launcher", step=LATER),
    "during a save": Fault(1, "open", "SIGKILL launcher", step=SAVE, path=r"\.tmp-{save}-\w+/"),
}
# Not more than two in a row that bring no new checkpoint: a third one would end the run.
RANKS = {
    "a rank in its forward pass": Blow(Fault(1, "forward", "SIGKILL", step=LATER), f"rank 1 {KILLED}"),
    "a save before its first file": Blow(
        Fault(0, "os.mkdir", "SIGKILL", step=SAVE, path=r"\.tmp-{save}"), f"rank 0 {KILLED}", False
    ),
    "a rank's share half way": Blow(
        Fault(1, "open", "cut", step=SAVE, path=r"\.tmp-{save}-\w+/.*\.safetensors"),
        "rank 1 killed by SIGXFSZ",
        False,
    ),
    "the main rank in its backward pass": Blow(Fault(0, "backward", "SIGKILL", step=LATER), f"rank 0 {KILLED}"),
    "all ranks as a share is flushed": Blow(
        Fault(0, "fsync", "SIGKILL all", step=SAVE, path=r"\.tmp-{save}-\w+/.*safetensors"),
        rf"(ranks 0, 1|rank 0|rank 1) {KILLED}",
        False,
    ),
    "a save before its manifest": Blow(
        Fault(0, "open", "SIGKILL", step=SAVE, path=r"\.tmp-{save}-\w+/MANIFEST"), f"rank 0 {KILLED}", False
    ),
    "all ranks in the update": Blow(
        Fault(0, "update", "SIGKILL all", step=LATER), rf"(ranks 0, 1|rank 0|rank 1) {KILLED}"
    ),
    "a save before it is sealed": Blow(
        Fault(0, "open", "SIGKILL", step=SAVE, path=r"\.tmp-{save}-\w+/COMMIT"), f"rank 0 {KILLED}", False
    ),
    "a save before it gets its name": Blow(
        Fault(0, "os.rename", "SIGKILL", step=SAVE, path="{save}$"), f"rank 0 {KILLED}", False
    ),
    "a rank that raises": Blow(Fault(1, "forward", "raise", step=LATER), "rank 1 ended with 1"),
    "a save that has its name and is not the latest": Blow(
        Fault(0, "open", "SIGKILL", step=SAVE, path="LATEST"), f"rank 0 {KILLED}", True
    ),
    "an old checkpoint's removal": Blow(
        Fault(0, "os.remove", "SIGKILL", step=SAVE, path="safetensors"), f"rank 0 {KILLED}", True
    ),
    "a rank that leaves early with 0": Blow(Fault(1, "forward", "exit 0", step=LATER), "rank 0 ended with 1"),
}


class Ordeal(NamedTuple):
    """The run after all of it."""

    run: Run
    launcher: dict[str, tuple[Ended, int]]  # and the newest checkpoint afterwards
    ranks: Ended
    life: Life
    restarts: list[str]  # what the launcher said of each
    resumed: list[int]  # where each set of ranks began


@pytest.fixture(scope="module")
def ordeal(make_run, undisturbed):
    run = make_run(checkpoint={"every": SAVE})
    launcher = {}
    for name, fault in LAUNCHER.items():
        launcher[name] = run.live(faults=[fault]), run.newest()
        assert_intact(run, undisturbed)
    faults = [replace(blow.fault, restart=number) for number, blow in enumerate(RANKS.values())]
    life = run.start(faults=faults)
    ranks = life.end()
    resumed = [int(step) for step in re.findall(r"^Resumed from .*, at step (\d+)\.$", ranks.out, re.MULTILINE)]
    restarts = re.findall(r"^launch: (.*); restart \d+ of at most \d+$", ranks.err, re.MULTILINE)
    return Ordeal(run, launcher, ranks, life, restarts, resumed)


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_killed_launcher_takes_its_ranks_along_and_the_last_checkpoint_stays(ordeal, name):
    ended, newest = ordeal.launcher[name]
    assert ended.code == -9
    assert "injected" in ended.err
    assert newest in (SAVE, 2 * SAVE)


def test_the_ranks_went_on_by_themselves_and_every_digit_is_the_undisturbed_runs(ordeal, undisturbed):
    assert ordeal.ranks.code == 0, ordeal.ranks.err
    assert ordeal.run.steps() == undisturbed
    assert_intact(ordeal.run, undisturbed)
    assert ordeal.run.leftovers() == []
    assert not (ordeal.run.checkpoints / "quarantine").exists()
    assert len(ordeal.restarts) == len(RANKS)
    assert len(ordeal.resumed) == len(RANKS) + 1


@pytest.mark.parametrize("name", RANKS)
def test_a_blow_is_named_and_costs_the_steps_since_the_last_checkpoint(ordeal, name):
    number, blow = list(RANKS).index(name), RANKS[name]
    begin, after = ordeal.resumed[number : number + 2]
    assert re.search(blow.said, ordeal.restarts[number])
    assert begin + (blow.fault.step == LATER) * SAVE <= after <= begin + 2 * SAVE
    left_behind = ordeal.life.seen()[number + 1]
    assert sum(name.startswith(".tmp-") for name in left_behind) <= 1
    assert [name for name in left_behind if name.startswith("half of step-")] == []
    if blow.committed is not None:
        assert (f"step-{begin + SAVE:09d}" in left_behind) == blow.committed
        assert (after == begin + SAVE) == blow.committed


@pytest.mark.long
def test_twenty_restarts_in_a_row_come_up(make_run, undisturbed):
    run = make_run(checkpoint={"every": 1})
    faults = [Fault(number % 2, "backward", "SIGKILL", step=3, restart=number) for number in range(20)]
    ended = run.live(faults=faults)
    assert ended.code == 0, ended.err
    assert len(re.findall("; restart [0-9]+ of at most", ended.err)) == 20
    assert run.steps() == undisturbed
    assert_intact(run, undisturbed)
