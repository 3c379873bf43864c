"""A run that is struck at any moment goes on, by the same command, as if it had not been.

One run on two ranks lives through all of them: each life goes on from where the one before was struck.
"""

import re
from dataclasses import dataclass, replace

import pytest

from faults.harness import Ended, Run, assert_intact, resumed_at
from faults.injector import Fault

KILLED = r"killed by SIGKILL.*; exit code 137 \(out of memory is the usual reason\)"
KILLED0, KILLED1 = f"rank 0 {KILLED}", f"rank 1 {KILLED}"


@dataclass(frozen=True)
class Blow:
    """A fault and what it leads to.

    Attributes:
        fault: its `step`, and `{save}` in its `path`, are counted from where this life began.
        code: the exit code of the run.
        said: the last words, a pattern; none if the launcher was killed.
        committed: whether the save that was struck is a checkpoint; None where none was struck.
        cold: by the command line itself, imports and all.
    """

    fault: Fault
    code: int
    said: str
    committed: bool | None = None
    cold: bool = False


SAVE = 2  # steps after the beginning of a life: the save that is struck
BLOWS = {
    "a rank in its forward pass": Blow(Fault(1, "forward", "SIGKILL", step=3), 137, KILLED1, cold=True),
    "the main rank in its forward pass": Blow(Fault(0, "forward", "SIGKILL", step=3), 137, KILLED0),
    "a rank in its backward pass": Blow(Fault(1, "backward", "SIGKILL", step=3), 137, KILLED1),
    "all ranks in the update": Blow(
        Fault(0, "update", "SIGKILL all", step=3), 137, f"ranks 0, 1 {KILLED}|rank [01] {KILLED}", cold=True
    ),
    "the launcher after a step": Blow(Fault(1, "step", "SIGKILL launcher", step=3), -9, "", cold=True),
    "a save before it copies": Blow(Fault(0, "os.mkdir", "SIGKILL", path=r"\.tmp-{save}"), 137, KILLED, False),
    "a rank's share half way": Blow(
        Fault(1, "open", "cut", path=r"\.tmp-{save}-\w+/rank"), 153, "rank 1 killed by SIGXFSZ; exit code 153", False
    ),
    "all ranks as a share is flushed": Blow(
        Fault(0, "fsync", "SIGKILL all", path=r"\.tmp-{save}-\w+/rank"), 137, KILLED, False
    ),
    "a save before its manifest": Blow(
        Fault(0, "open", "SIGKILL", path=r"\.tmp-{save}-\w+/MANIFEST"), 137, KILLED0, False
    ),
    "a save before it is sealed": Blow(
        Fault(0, "open", "SIGKILL", path=r"\.tmp-{save}-\w+/COMMIT"), 137, KILLED0, False
    ),
    "a save before it gets its name": Blow(
        Fault(0, "os.rename", "SIGKILL all", path="{save}$"), 137, KILLED, False, cold=True
    ),
    "a save that has its name and is not the latest": Blow(
        Fault(0, "open", "SIGKILL", path="LATEST"), 137, KILLED0, True
    ),
    "the launcher during a save": Blow(
        Fault(1, "open", "SIGKILL launcher", path=r"\.tmp-{save}-\w+/rank"), -9, "", None
    ),
    "the removal of an old checkpoint": Blow(
        Fault(0, "os.remove", "SIGKILL", path="rank-"), 137, KILLED0, True, cold=True
    ),
    "a rank that raises": Blow(Fault(1, "forward", "raise", step=3), 1, "exit code 1"),
    "a rank that leaves early with 0": Blow(Fault(1, "forward", "exit 0", step=3), 1, "rank 0 ended with 1"),
}


class Chain:
    """The run, and what each blow came to."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.at: int | None = None  # the checkpoint that the next life has to go on from
        self.done: dict[str, tuple[Ended, int | None]] = {}  # its life, and the step it had to go on from

    def strike(self, name: str) -> tuple[Ended, int | None]:
        """Strikes, once."""
        if name not in self.done:
            blow, begin = BLOWS[name], self.at
            start = begin or 0
            path = blow.fault.path.replace("{save}", f"step-{start + SAVE:09d}")
            fault = replace(blow.fault, step=start + blow.fault.step, path=path)
            self.done[name] = self.run.live(faults=[fault], cold=blow.cold), begin
            self.at = self.run.newest()
        return self.done[name]


@pytest.fixture(scope="module")
def chain(make_run):
    return Chain(make_run())


@pytest.mark.parametrize("name", BLOWS)
def test_it_ends_in_order_and_leaves_what_the_next_life_needs(chain, undisturbed, name):
    blow = BLOWS[name]
    ended, begin = chain.strike(name)
    assert "injected" in ended.err, ended.err
    assert ended.code == blow.code, ended.err
    assert re.search(blow.said, ended.err.splitlines()[-1] if blow.said else ""), ended.err
    assert resumed_at(ended) == begin
    assert_intact(chain.run, undisturbed, removing="removal" in name)
    said = [int(step) for step in re.findall(r"^Saved step (\d+) in", ended.out, re.MULTILINE)]
    start = begin or 0
    assert (chain.at or 0) >= max(said, default=start)
    if blow.committed is not None:
        assert (chain.at == start + SAVE) == blow.committed


def test_the_last_life_reaches_the_end_and_every_digit_is_the_undisturbed_runs(chain, undisturbed):
    ended = chain.run.live()
    assert ended.code == 0, ended.err
    assert resumed_at(ended) == chain.at
    assert chain.run.steps() == undisturbed
    assert chain.run.leftovers() == []
    assert not (chain.run.checkpoints / "quarantine").exists()
