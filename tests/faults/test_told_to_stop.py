"""A run that is told to stop saves and leaves, all ranks together, wherever it was; the same command goes on.

One run on two ranks is told again and again, each time another way; then it goes on to the end.
"""

import re
from typing import NamedTuple

import pytest

from faults.conftest import STEPS
from faults.harness import Ended, Run, assert_intact, resumed_at
from faults.injector import Fault

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well


class Order(NamedTuple):
    """Faults that tell a run to stop, its exit code, and what it says."""

    faults: list[Fault]
    code: int
    said: str
    overrides: tuple[str, ...] = ()


SAVED = r"Told to stop: saved step \d+\. The same command goes on from there\."
IN_SAVE = {"at": "open", "path": r"\.tmp-step-\d+-\w+/"}
LOOK = Fault(1, "forward", "sleep 1.1", step=3)  # until the main rank looks for files again
ORDERS = {
    "SIGTERM in a forward pass": Order([Fault(0, "forward", "SIGTERM launcher", step=3)], 85, SAVED),
    "SIGUSR1 in a backward pass": Order([Fault(0, "backward", "SIGUSR1 launcher", step=3)], 85, SAVED),
    "SIGINT in the update": Order([Fault(0, "update", "SIGINT launcher", step=3)], 85, SAVED),
    "SIGTERM for one rank alone": Order([Fault(1, "forward", "SIGTERM", step=3)], 85, SAVED),
    "SIGUSR1 for one rank alone": Order([Fault(1, "forward", "SIGUSR1", step=3)], 85, SAVED),
    "the file STOP": Order(
        [Fault(0, "forward", "file STOP", step=3), LOOK], 85, r"Told to stop by the file \S+STOP: saved step \d+\."
    ),
    "SIGTERM while it starts": Order(
        [Fault(0, "loaded", "SIGTERM launcher")], 85, "Told to stop before the first step: there is nothing to save"
    ),
    "SIGTERM before it listens": Order([Fault(0, "start", "SIGTERM launcher")], 143, "stopped before it could save"),
    "SIGTERM in an evaluation": Order(
        [Fault(0, "evaluate", "SIGTERM launcher")], 85, SAVED, ("training.evaluate_every=2",)
    ),
    "SIGTERM in a save": Order([Fault(0, deed="SIGTERM launcher", **IN_SAVE)], 85, SAVED),
    "SIGTERM and again in the save it asked for": Order(
        [Fault(0, "forward", "SIGTERM launcher", step=1), Fault(0, deed="SIGTERM launcher", **IN_SAVE)], 85, SAVED
    ),
    "Ctrl-C, and again after a second": Order(
        [
            Fault(0, "forward", "SIGINT launcher", step=1),
            Fault(0, deed="sleep 1.5", **IN_SAVE),
            Fault(0, deed="SIGINT launcher", **IN_SAVE),
            Fault(1, deed="sleep 60", **IN_SAVE),
        ],
        143,
        "stopped before it could save; the newest checkpoint, if there is one, stays",
    ),
}


class Told(NamedTuple):
    """A life that was told to stop, and the newest checkpoint before and after."""

    ended: Ended
    before: int | None
    after: int | None


class Obedience:
    """The run, told once in each way."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.told: dict[str, Told] = {}

    def tell(self, name: str) -> Told:
        if name not in self.told:
            before = self.run.newest()
            ended = self.run.live(*ORDERS[name].overrides, faults=ORDERS[name].faults)
            self.told[name] = Told(ended, before, self.run.newest())
        return self.told[name]


@pytest.fixture(scope="module")
def obedience(make_run):
    return Obedience(make_run())


# A launcher that is told while it still starts its ranks may wait for them until torchrun's patience ends.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if "listens" in name else ()) for name in ORDERS]
)
def test_it_saves_and_leaves_with_its_exit_code(obedience, undisturbed, name):
    order, (ended, before, after) = ORDERS[name], obedience.tell(name)
    assert "injected" in ended.err
    assert ended.code == order.code, ended.err
    assert re.search(order.said, ended.err), ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("Told to stop") <= 1
    assert resumed_at(ended) == (None if "start" in name or "listens" in name else before)
    assert_intact(obedience.run, undisturbed)
    if order.said == SAVED:
        assert f"saved step {after}." in ended.err
        assert (after or 0) > (before or 0)
        assert obedience.run.steps()[-1]["step"] == after  # nothing is done twice
    if "STOP" in name:
        assert not (obedience.run.output / "STOP").exists()


def test_the_file_save_makes_a_checkpoint_and_the_run_goes_on_to_the_undisturbed_end(obedience, undisturbed):
    before = obedience.run.newest() or 0
    ended = obedience.run.live("checkpoint.every=1000", faults=[Fault(0, "forward", "file SAVE", step=3), LOOK])
    assert ended.code == 0, ended.err
    saved = [int(step) for step in re.findall(r"^Saved step (\d+) in", ended.out, re.MULTILINE)]
    assert len(saved) == 2
    assert before + 3 <= saved[0] < saved[1] == STEPS
    assert not (obedience.run.output / "SAVE").exists()
    assert obedience.run.steps() == undisturbed
    assert_intact(obedience.run, undisturbed)
