"""Which losses are spikes, and how many steps may be skipped."""

import json
import math
import random

import pytest

from distributed.tiny import tiny_config
from pretrain.errors import TrainingError
from pretrain.health import Health


def health(**changes):
    return Health(tiny_config(**{f"training__{name}": value for name, value in changes.items()}).training)


def limits_of(losses, **changes):
    """The limit that each loss met."""
    watched, limits = health(**{"spike_window": 10} | changes), []
    for step, loss in enumerate(losses, start=1):
        limits.append(watched.limit())
        watched.judge(step, loss, applied=True)
    return limits


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([2.0] * 10 + [2.1, 2.3], [11]),  # a curve without scatter: 10 % above is a spike
        ([2.0 + 0.1 * (i % 3) for i in range(20)] + [3.0, 9.0], [21]),  # with scatter: 1.48 deviations of 0.1
        ([9.0 - 0.4 * i for i in range(20)], []),  # it falls
        ([5.0] * 5 + [2.0] * 10 + [6.0], [15]),  # a window that began high
        ([5.0, 50.0] + [5.0] * 8 + [50.0], [10]),  # an early spike does not hide a later one
        ([math.inf, math.nan] + [2.0] * 9 + [50.0], []),  # what is not finite does not count: the window is not full
        ([0.0] * 12, []),
        ([-1.0] * 12 + [-0.5], [12]),
    ],
)
def test_a_spike_is_far_above_the_median_of_the_window(losses, spikes):
    found = [i for i, (loss, limit) in enumerate(zip(losses, limits_of(losses), strict=True)) if loss > limit]
    assert found == spikes


def test_a_threshold_is_in_standard_deviations():
    draw = random.Random(0)
    losses = [draw.gauss(3.0, 0.2) for _ in range(1001)]
    limit = limits_of(losses, spike_window=1000, spike_threshold=5.0)[-1]
    assert limit == pytest.approx(3.0 + 5 * 0.2, rel=0.03)


def test_a_loss_that_stays_high_is_told_once_and_becomes_normal():
    watched = health(spike_window=10)
    verdicts = [watched.judge(step, 2.0 if step <= 10 else 9.0, applied=True) for step in range(1, 21)]
    assert [step for step, verdict in enumerate(verdicts, start=1) if verdict.said] == [11]
    assert verdicts[10].said == "the loss jumped to 9, above 2.2; training.spikes says what can follow."
    assert watched.limit() > 9
    assert all(verdict.go_back is None for verdict in verdicts)


@pytest.mark.parametrize(
    ("policy", "applied", "loss", "said", "go_back"),
    [
        ("warn", True, 9.0, "the loss jumped to 9, above 2.2; training.spikes", None),
        ("warn", False, 9.0, "skipped: the loss or the gradient norm is not finite (1 of the last 100", None),
        ("skip", False, 9.0, "skipped: the loss jumped to 9, above 2.2 (1 of the last 100 steps, 1 in all)", None),
        ("skip", False, math.nan, "skipped: the loss or the gradient norm is not finite", None),
        ("rollback", True, 9.0, None, "the loss jumped to 9, above 2.2"),
        ("rollback", False, math.nan, "skipped: the loss or the gradient norm is not finite", None),
        *((policy, True, 2.1, None, None) for policy in ("warn", "skip", "rollback")),
    ],
)
def test_each_policy_says_and_does_its_part(policy, applied, loss, said, go_back):
    watched = health(spike_window=10, spikes=policy)
    for step in range(1, 11):
        assert watched.judge(step, 2.0, applied=True) == (None, None)
    verdict = watched.judge(11, loss, applied)
    assert verdict.go_back == go_back
    assert verdict.said is None if said is None else verdict.said.startswith(said)


@pytest.mark.parametrize(
    ("skipped", "ends_at"),
    [
        ([5, 6, 7], 7),  # in a row
        ([1, 50, 100], 100),  # the last three lie within a hundred
        ([1, 50, 101], None),
        ([1, 90, 180, 189], 189),
    ],
)
def test_a_run_ends_at_so_many_skipped_steps_of_the_last_hundred(skipped, ends_at):
    watched = health(max_skipped_steps=3)
    for step in range(1, 201):
        if step == ends_at:
            with pytest.raises(TrainingError, match=f"3 of the last 100 steps, up to step {step}, were skipped"):
                watched.judge(step, 1.0, applied=False)
            return
        watched.judge(step, 1.0, applied=step not in skipped)
    assert ends_at is None


def test_with_rollback_it_goes_back_instead():
    watched = health(max_skipped_steps=2, spikes="rollback")
    verdicts = [watched.judge(step, math.nan, applied=False) for step in (1, 2)]
    assert [verdict.go_back for verdict in verdicts] == [None, "2 of the last 100 steps were skipped"]
    assert watched.skips_too_many


def test_what_is_saved_goes_on_with_the_same_verdicts():
    watched, again = health(spike_window=10, spikes="skip"), health(spike_window=10, spikes="skip")
    for step in range(1, 13):
        watched.judge(step, 2.0 + step / 7, applied=step % 5 > 0)
    again.restore(json.loads(json.dumps(watched.state())))
    assert again.limit() == watched.limit()
    assert again.judge(13, 99.0, applied=False) == watched.judge(13, 99.0, applied=False)
    shorter = health(spike_window=11)
    shorter.restore(watched.state())
    assert shorter.limit() == math.inf
