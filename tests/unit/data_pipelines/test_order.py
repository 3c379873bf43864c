"""The order of the data is arithmetic: no sample twice, nothing depends on the layout, resuming is exact."""

import hashlib
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.order.order import Order, default_lanes
from data_pipelines.randomness import Purpose, raw


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[int], Order]:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    grain, lanes, window = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 50))
    sizes[0] += max(0, lanes * grain - sum(sizes))
    return sizes, Order(sizes, seed=draw(st.integers(0, 2**64 - 1)), grain=grain, lanes=lanes, window=window)


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    places = [order.locate(epoch, grain) for grain in range(order.grains_per_epoch)]
    return [pair for shards, indices in places for pair in zip(shards.tolist(), indices.tolist(), strict=True)]


@given(orders(), st.integers(0, 10**6))
def test_an_epoch_takes_no_sample_twice_and_leaves_out_fewer_than_one_grain_a_lane(
    made: tuple[list[int], Order], epoch: int
):
    sizes, order = made
    taken = epoch_of(order, epoch)
    assert len(set(taken)) == len(taken)
    assert set(taken) <= {(shard, index) for shard, size in enumerate(sizes) for index in range(size)}
    assert sum(sizes) - len(taken) < order.lanes * order.grain


@given(orders(), st.data())
def test_the_replacements_of_a_sample_are_the_rest_of_its_window_from_it_onwards(
    made: tuple[list[int], Order], data: st.DataObject
):
    _, order = made
    lane = data.draw(st.integers(0, order.lanes - 1))
    in_lane = [
        pair
        for grain in range(lane, order.grains_per_epoch, order.lanes)
        for pair in zip(*(array.tolist() for array in order.locate(3, grain)), strict=True)
    ]
    at = data.draw(st.integers(0, len(in_lane) - 1))
    start = at // order.window * order.window
    window = in_lane[start : start + order.window]
    own = at - start
    grain = at // order.grain * order.lanes + lane
    assert list(order.replacements(3, grain, at % order.grain)) == window[own + 1 :] + window[:own]


def test_a_corpus_of_billions_of_samples_is_located_beyond_what_32_bits_can_count():
    sizes = [2**31 - 1000, 2**31]  # the first window of the second lane crosses 2^31
    order = Order(sizes, seed=1, grain=16, lanes=2, window=2048)
    first, second = order._epoch_plan(0)[0].tolist()
    assert order.lane_samples < 2**31 < order.lane_samples + order.window
    for lane in range(order.lanes):
        lowest = lane * order.lane_samples
        places = {lowest + place for place in range(order.window)}
        expected = {(first, p) if p < sizes[first] else (second, p - sizes[first]) for p in places}
        own = list(zip(*(array.tolist() for array in order.locate(0, lane)), strict=True))
        assert set(own) | set(order.replacements(0, lane, 0)) == expected
        assert set(own) < expected


def test_epochs_seeds_and_lanes_have_orders_of_their_own():
    base = Order([300], seed=0, grain=4, lanes=3, window=50)
    other = Order([300], seed=1, grain=4, lanes=3, window=50)
    assert epoch_of(base, 0) != epoch_of(base, 1)
    assert epoch_of(base, 0) != epoch_of(other, 0)
    lanes = [np.concatenate([base.locate(0, g)[1] for g in range(lane, 75, 3)]) - 100 * lane for lane in range(3)]
    assert not np.array_equal(lanes[0], lanes[1])


def test_what_was_asked_before_changes_nothing():
    used = Order([40, 60], seed=0, grain=4, lanes=2, window=64)
    for epoch in (0, 1, 0, 2):
        assert epoch_of(used, epoch) == epoch_of(Order([40, 60], seed=0, grain=4, lanes=2, window=64), epoch)


def test_large_seeds_differ_in_their_last_digit():
    draws = [raw(seed, Purpose.MASKING, 1, 2, size=4).tolist() for seed in (2**63, 2**63 + 1, -1, 5)]
    assert len({tuple(draw) for draw in draws}) == 4


def test_purposes_and_counters_have_numbers_of_their_own():
    keys = [(Purpose.MASKING, 1), (Purpose.AUGMENTATION, 1), (Purpose.MASKING, 2), (Purpose.MASKING, 1, 1)]
    draws = np.concatenate([raw(0, *key, size=100) for key in keys])
    assert len(np.unique(draws)) == 400


def test_the_order_is_that_of_every_release():
    order = Order([100, 7, 250, 31], seed=5, grain=4, lanes=6, window=32)
    digest = hashlib.sha256(repr([epoch_of(order, epoch) for epoch in range(3)]).encode()).hexdigest()
    assert digest[:16] == "23c69211c04a98d2"


def test_an_order_goes_to_a_worker_unchanged():
    order = Order([100, 7], seed=5, grain=4, lanes=None, window=32)
    assert epoch_of(pickle.loads(pickle.dumps(order)), 1) == epoch_of(order, 1)


def test_shuffling_reaches_across_shards_and_batches_mix_lanes():
    order = Order([100] * 50, seed=0, grain=4, lanes=None, window=512)
    shards = np.concatenate([order.locate(0, grain)[0] for grain in range(order.lanes)])
    assert order.lanes == 12
    assert len(set(shards.tolist())) > 20


@pytest.mark.parametrize(
    ("samples", "grain", "lanes"), [(10**9, 16, 960), (20_000, 16, 12), (500, 16, 1), (1_599, 16, 1), (3_200, 16, 2)]
)
def test_lanes_are_the_most_that_lose_one_percent(samples: int, grain: int, lanes: int):
    assert default_lanes(samples, grain) == lanes


def test_a_billion_samples_cost_microseconds_and_little_memory():
    order = Order([10_000] * 100_000, seed=0, grain=16, lanes=None, window=2048)
    order.locate(0, 0)
    start = time.perf_counter()
    for grain in range(10**6, 10**6 + 960 * 4):
        order.locate(0, grain)
    per_sample = (time.perf_counter() - start) / (960 * 4 * 16)
    assert per_sample < 50e-6  # about 5 on an idle core, first windows included


def test_too_few_samples_are_an_error_with_all_numbers():
    with pytest.raises(DataError, match=r"10 samples are too few for 4 lanes .* grain of 4: lower data\.grain or"):
        Order([10], seed=0, grain=4, lanes=4, window=8)
