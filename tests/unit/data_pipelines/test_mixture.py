"""Shares of a mixture are kept exactly, in closed form, and a change of them leaves what came before as it was."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.order.mixture import BLOCK, DataState, Segment, SourceIdentity, integer_shares

shares = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    parts = draw(shares)
    taken = draw(st.lists(st.integers(0, 1000), min_size=len(parts), max_size=len(parts)))
    return Segment(draw(st.integers(0, 2**64 - 1)), sum(taken), tuple(taken), tuple(parts))


@given(segments(), st.integers(0, 1000))
def test_each_source_gives_its_grains_in_order_without_gaps(segment: Segment, number: int):
    following = list(segment.taken)
    for grain in range(segment.start, segment.start + number):
        source, found = segment.place(grain)
        assert found == following[source]
        following[source] += 1
    assert segment.taken_before(segment.start + number) == tuple(following)


@given(segments(), st.integers(0, 10**9))
def test_at_a_blocks_border_each_source_has_had_its_share(segment: Segment, block: int):
    grains = block * BLOCK
    taken = segment.taken_before(segment.start + grains)
    for share, before, after in zip(segment.shares, segment.taken, taken, strict=True):
        assert abs((after - before) * sum(segment.shares) - grains * share) <= len(segment.shares) * sum(segment.shares)
    assert sum(taken) == segment.start + grains


@given(segments())
def test_a_source_without_a_share_rests(segment: Segment):
    drawn = {segment.place(segment.start + grain)[0] for grain in range(3 * BLOCK)}
    assert all(segment.shares[source] for source in drawn)


def test_no_rank_is_bound_to_a_source():
    segment = Segment(0, 0, (0, 0), (1, 1))
    ranks = Counter((grain % 2, segment.place(grain)[0]) for grain in range(4096))
    assert all(900 < count < 1150 for count in ranks.values())


@given(segments(), segments(), st.integers(0, 500))
def test_a_change_of_shares_goes_on_where_each_source_stood(segment: Segment, later: Segment, number: int):
    border = segment.start + number
    taken = segment.taken_before(border)
    parts = (later.shares * 6)[: len(taken)]
    if not any(parts):
        return
    second = Segment(segment.seed, border, taken, parts)
    following = list(taken)
    for grain in range(border, border + 200):
        source, found = second.place(grain)
        assert found == following[source]
        following[source] += 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 3], (1, 3)), ([0.5, 1.5], (1, 3)), ([0.1, 0.2, 0.7], (1, 2, 7)), ([5.0], (1,)), ([0, 2], (0, 1))],
)
def test_weights_become_the_smallest_integers_in_their_proportion(weights: list[float], expected: tuple[int, ...]):
    assert integer_shares(weights) == expected
    with pytest.raises(ValueError, match="every weight is 0"):
        integer_shares([0.0 for _ in weights])


SOURCE = SourceIdentity(manifest="ab" * 32, lanes=4, window=16)
STATE = DataState(step=2, grains=48, seed=1, grain=4, sources={"train": SOURCE}, segment=Segment(1, 0, (0,), (1,)))


def test_a_state_goes_through_json_unchanged():
    assert DataState.from_dict(STATE.to_dict()) == STATE


@pytest.mark.parametrize(
    ("change", "where"), [({"step": "two"}, "step"), ({"extra": 1}, "extra"), ({"segment": {}}, r"segment\.seed")]
)
def test_a_state_that_is_none_is_refused_with_what_is_wrong(change: dict[str, object], where: str):
    with pytest.raises(DataError, match=rf"cannot be read \(see {where}.*\): resume with the version"):
        DataState.from_dict(STATE.to_dict() | change)


def changed(**source: object) -> DataState:
    return STATE.model_copy(update={"sources": {"train": SOURCE.model_copy(update=source)}})


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (changed(manifest="cd" * 32), r"data\.train \(saved abababababab, now cdcdcdcdcdcd\)"),
        (STATE.model_copy(update={"seed": 9}), r"seed \(saved 1, now 9\)"),
        (STATE.model_copy(update={"grain": 8}), r"data\.grain \(saved 4, now 8\)"),
        (changed(lanes=2), r"data\.lanes \(saved 4, now 2\)"),
        (changed(window=8), r"data\.window \(saved 16, now 8\)\. Set these back"),
        (
            STATE.model_copy(update={"sources": {"web": SOURCE}}),
            r"data\.train has no train \(give it back, with weight",
        ),
    ],
)
def test_resuming_in_another_order_names_what_differs_with_both_values(run: DataState, words: str):
    with pytest.raises(DataError, match=words):
        STATE.check_resumable(run)


def test_resuming_in_the_same_order_is_allowed_from_anywhere_and_with_more_sources():
    STATE.check_resumable(STATE.model_copy(update={"step": 0, "grains": 0}))
    STATE.check_resumable(STATE.model_copy(update={"sources": {"train": SOURCE, "web": SOURCE}}))
