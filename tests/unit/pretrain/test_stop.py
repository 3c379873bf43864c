"""Which signals ask a run to stop."""

import signal

import pytest

from pretrain.stopping import Stop


@pytest.fixture
def handlers():
    """The handlers of the two signals, put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_stops_a_run_unless_it_was_ignored_at_the_start(handlers, number, ignored):
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    stop = Stop()
    signal.raise_signal(number)
    assert stop.requested != ignored
