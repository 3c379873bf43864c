"""Which signals ask a run to stop."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.train import stop_on_signal


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
    trainer: Any = SimpleNamespace(stop_requested=False)
    stop_on_signal(trainer)
    signal.raise_signal(number)
    assert trainer.stop_requested != ignored
