"""A draw is a function of its key: of nothing that was drawn before, and of no thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.randomness import Purpose, raw

words = st.integers(0, 2**64 - 1)


@given(st.integers(-(2**63), 2**64 - 1), st.sampled_from(Purpose), st.lists(words, max_size=3), st.integers(0, 9))
def test_a_draw_is_that_of_a_new_generator_whatever_was_drawn_before(
    seed: int, purpose: Purpose, counter: list[int], before: int
):
    raw(5, Purpose.SHARDS, 7, size=before)
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    start = np.array([0, *counter, 0, 0, 0][:4], dtype=np.uint64)
    assert np.array_equal(
        raw(seed, purpose, *counter, size=11), np.random.Philox(key=key, counter=start).random_raw(11)
    )


def test_threads_draw_what_one_alone_draws():
    def draw(position: int) -> list[int]:
        return [number for i in range(200) for number in raw(0, Purpose.MASKING, position, i, size=5).tolist()]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(draw, range(20))) == [draw(position) for position in range(20)]
