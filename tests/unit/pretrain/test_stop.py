"""Which signals ask a run to stop, and which end it at once."""

import os
import signal

import pytest

from pretrain import stopping
from pretrain.stopping import REPEAT_S, Interrupted, Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of the signals, put back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_stops_a_run_unless_it_was_ignored_at_the_start(number, ignored):
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    stop = Stop()
    signal.raise_signal(number)
    assert stop.requested != ignored


@pytest.mark.parametrize(
    ("first", "second", "after_s", "parent_left", "leaves"),
    [
        (signal.SIGINT, signal.SIGINT, REPEAT_S, False, True),
        (signal.SIGTERM, signal.SIGINT, REPEAT_S, False, True),
        (signal.SIGINT, signal.SIGINT, REPEAT_S / 2, False, False),  # sent on by a launcher, or to a whole group
        (signal.SIGTERM, signal.SIGTERM, 300.0, False, False),  # Slurm's, at the end of the grace that it gave
        (signal.SIGUSR1, signal.SIGTERM, 300.0, False, False),
        (signal.SIGTERM, signal.SIGTERM, 300.0, True, False),  # plain torchrun died of Slurm's third
        (signal.SIGINT, signal.SIGTERM, REPEAT_S, True, True),  # plain torchrun died of a second Ctrl-C
    ],
)
def test_only_a_persons_second_ctrl_c_leaves_at_once(monkeypatch, first, second, after_s, parent_left, leaves):
    now, left = [10.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping.signal, "raise_signal", left.append)
    parent = os.getppid()
    stop = Stop()
    os.kill(os.getpid(), first)
    now[0] += after_s
    if parent_left:
        monkeypatch.setattr(stopping.os, "getppid", lambda: parent + 1)
    os.kill(os.getpid(), second)
    assert stop.requested
    assert left == ([signal.SIGINT] if leaves else [])


def test_a_start_is_left_at_the_first_signal_and_its_way_out_is_not_disturbed_by_the_next():
    stop = Stop()
    with pytest.raises(Interrupted), stop.interrupting():
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), stop.interrupting():
        raise AssertionError("not reached")
