"""Ranks that make no progress are found from outside, leave their stacks, and are started again; the run is the same.

One run on two ranks hangs in every way, one after the other, in place.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import pytest

from faults.harness import assert_intact
from faults.injector import Fault

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

LIMIT_S = 3.0
LATE = 8  # a step by which every phase has been seen thrice, so that its limit is that of a run on its way
SETTINGS = {"hang_timeout_s": LIMIT_S}


class Hang(NamedTuple):
    """A fault, and what the launcher says of it."""

    fault: Fault
    said: str


HANGS = {
    "a rank that is stopped": Hang(
        Fault(1, "forward", "SIGSTOP", step=LATE), r"rank 1 \(stopped by a signal; step, step \d+\) holds up the run"
    ),
    "a rank that sleeps": Hang(
        Fault(0, "backward", "sleep 600", step=LATE), r"rank 0 \(step, step \d+\) holds up the run"
    ),
    "ranks that take different branches": Hang(
        Fault(1, "forward", "diverge", step=LATE), r"no progress for \d+ s: .*(rank|ranks).*(hold|wait)"
    ),
}


@pytest.fixture(scope="module")
def hung(make_run):
    """The run, its life, and the seconds in which each set of ranks made no progress."""
    run = make_run(training=SETTINGS)
    faults = [replace(hang.fault, restart=number) for number, hang in enumerate(HANGS.values())]
    life = run.start(faults=faults)
    return run, life, life.end()


def test_they_are_started_again_and_the_run_is_the_undisturbed_one(hung, undisturbed):
    run, _, ended = hung
    assert ended.code == 0, ended.err
    assert len(re.findall("launch: hung; restart", ended.err)) == len(HANGS)
    assert run.steps() == undisturbed
    assert_intact(run, undisturbed)


@pytest.mark.parametrize("name", HANGS)
def test_who_holds_up_the_run_is_named_in_time_and_the_stacks_of_all_are_kept(hung, name):
    run, _, ended = hung
    number = list(HANGS).index(name)
    said = [line for line in ended.err.splitlines() if "no progress for" in line]
    assert re.search(HANGS[name].said, said[number])
    (seconds,) = re.findall(r"no progress for (\d+) s", said[number])
    assert LIMIT_S <= int(seconds) <= 10 * LIMIT_S  # or five times the slowest step that it has seen
    kept = sorted((run.output / "stacks").glob("*-rank-*.txt"))
    assert len(kept) == 2 * len(HANGS)
    texts = [path.read_text() for path in kept[2 * number : 2 * number + 2]]
    assert all(re.match(r"rank \d \(process \d+ on ", text) for text in texts)
    if "stopped" not in name:
        assert all("most recent call first" in text for text in texts)
    else:
        assert "no stacks: stopped by a signal" in texts[1]
        assert "most recent call first" in texts[0]
