"""Masked language modelling hides whole words, at the asked rate, and never a special token."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import IGNORE
from data_pipelines.samples.masking import mask_words, num_masked_slots
from data_pipelines.samples.tokenizer import Tokenizer

LENGTH = 24


class Words(Tokenizer):
    """Ids from 5 on are pieces, and every id from 50 on begins a word."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id = 100, 0, 1, 2, 3, 4
    special_ids = frozenset(range(5))
    fingerprint = ""

    def pieces(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([int(word) for word in caption.split()], dtype=np.int64)
        return ids, ids >= 50


WORDS = Words()


def mask(
    pieces: list[int], *, position: int = 0, probability: float = 0.15, num_slots: int | None = None, seed: int = 0
):
    ids, starts = WORDS.encode(" ".join(map(str, pieces)), LENGTH)
    slots = num_slots or num_masked_slots(LENGTH, probability)
    out = mask_words(ids, starts, WORDS, seed=seed, position=position, probability=probability, num_slots=slots)
    return ids, starts, *out


captions = st.lists(st.integers(5, 99), min_size=1, max_size=LENGTH + 5)


@given(
    captions, st.integers(0, 2**62), st.sampled_from([0.05, 0.15, 0.4, 1.0]), st.one_of(st.none(), st.integers(1, 9))
)
def test_the_rules_hold_for_any_caption(pieces: list[int], position: int, probability: float, num_slots: int | None):
    ids, _, masked, positions, targets = mask(pieces, position=position, probability=probability, num_slots=num_slots)
    num_pieces = min(len(pieces), LENGTH - 2)
    used = targets != IGNORE
    places = positions[used]
    assert 1 <= len(places) <= len(positions) == len(targets)
    assert np.array_equal(places, np.unique(places)), "ascending, none twice"
    assert places.min() >= 1
    assert places.max() <= num_pieces, "neither special tokens nor padding"
    assert np.array_equal(ids[places], targets[used])
    assert np.all(positions[~used] == 0)
    untouched = np.setdiff1d(np.arange(LENGTH), places)
    assert np.array_equal(masked[untouched], ids[untouched])
    assert np.all((masked[places] == WORDS.mask_id) | (masked[places] >= 5)), "no special token put in"


@given(captions, st.integers(0, 2**62))
def test_words_are_hidden_whole_unless_one_alone_has_more_pieces_than_slots(pieces: list[int], position: int):
    _, starts, _, positions, targets = mask(pieces, position=position)
    num_pieces = min(len(pieces), LENGTH - 2)
    word_of = np.cumsum(starts)[1 : num_pieces + 1]
    places = positions[targets != IGNORE]
    for word in np.unique(word_of[places - 1]):
        members = np.flatnonzero(word_of == word) + 1
        assert set(members.tolist()) <= set(places.tolist()) or len(members) > len(positions)


def test_of_the_hidden_pieces_80_percent_are_masks_10_random_and_10_kept():
    pieces = list(range(60, 80))
    masks = kept = total = 0
    randoms: list[int] = []
    for position in range(4000):
        _, _, masked, positions, targets = mask(pieces, position=position)
        places = positions[targets != IGNORE]
        found, was = masked[places], targets[targets != IGNORE]
        masks += int((found == WORDS.mask_id).sum())
        kept += int((found == was).sum())
        randoms += found[(found != was) & (found != WORDS.mask_id)].tolist()
        total += len(places)
    assert total == 4000 * 3  # 15 % of 20
    assert masks / total == pytest.approx(0.8, abs=0.02)
    assert len(randoms) / total == pytest.approx(0.1, abs=0.015)
    assert kept / total == pytest.approx(0.1, abs=0.015)
    assert min(randoms) >= 5
    assert len(set(randoms)) > 90, "random pieces come from the whole vocabulary"


def test_every_word_is_hidden_equally_often():
    counts = np.zeros(LENGTH)
    for position in range(4000):
        _, _, _, positions, targets = mask(list(range(60, 70)), position=position)
        counts[positions[targets != IGNORE]] += 1
    assert counts[1:11] == pytest.approx(np.full(10, 800), rel=0.15)


@pytest.mark.parametrize(
    ("pieces", "long"),
    [
        ([60] + [10] * 9, range(1, 11)),  # an address of ten pieces, for which there are four slots
        ([60] + [10] * 21, range(1, 23)),
        ([60] + [10] * 40, range(1, 23)),  # and one that is cut
        ([60, 61, 62] + [10] * 9 + [63], range(3, 13)),
        ([60] + [10] * 6 + [61] + [10] * 6, range(1, 15)),
        ([60] + [10] * 4, range(1, 6)),
    ],
)
def test_of_a_word_longer_than_the_slots_each_piece_is_hidden_equally_often(pieces: list[int], long: range):
    counts, hidden = np.zeros(LENGTH), set()
    for position in range(4000):
        _, _, _, positions, targets = mask(pieces, position=position)
        places = positions[targets != IGNORE]
        assert len(places) == max(1, round(0.15 * min(len(pieces), LENGTH - 2))), "no more than are wanted"
        counts[places] += 1
        hidden.add(tuple(places.tolist()))
    expected = counts[long.start : long.stop].mean()
    assert expected > 200
    assert counts[long.start : long.stop] == pytest.approx(np.full(len(long), expected), rel=0.2)
    assert len(hidden) >= len(long)


def test_a_mask_depends_on_seed_and_position_alone():
    pieces = list(range(60, 80))
    first = mask(pieces, position=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, mask(pieces, position=5), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, mask(pieces, position=6), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, mask(pieces, position=5, seed=1), strict=True))


def test_there_are_slots_for_the_longest_caption():
    assert num_masked_slots(32, 0.15) == 5
    assert num_masked_slots(3, 0.15) == 1


def test_a_caption_of_a_real_tokenizer_is_hidden_by_words(tokenizer_path: Path):
    tokenizer = Tokenizer.load(tokenizer_path)
    ids, starts = tokenizer.encode("large mountain above the river", 16)
    hidden, _, targets = mask_words(ids, starts, tokenizer, seed=0, position=1, probability=0.3, num_slots=5)
    assert (targets != IGNORE).any()
    assert hidden.shape == ids.shape
