"""Masks for masked language modelling: whole words, keyed by the sample's position.

Source: Devlin et al., BERT (2019), section 3.1, with the whole-word masking of its 2019 release.
"""

from __future__ import annotations

import math

import numpy as np

from data_pipelines.batch import IGNORE
from data_pipelines.randomness import Purpose, uniform
from data_pipelines.samples.tokenizer import Tokenizer


def num_masked_slots(text_length: int, probability: float) -> int:
    """K: how many pieces of a caption can be masked at most."""
    return max(1, math.ceil(probability * (text_length - 2)))


def mask_words(
    ids: np.ndarray,
    word_starts: np.ndarray,
    tokenizer: Tokenizer,
    *,
    seed: int,
    position: int,
    probability: float,
    num_slots: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hides words of a caption.

    Words are taken in a random order until `probability` of the pieces, rounded and at least one, are hidden;
    a word that no longer fits into the slots is passed over. Of a word that would not fit into empty ones, such as an
    address, as many pieces as are still wanted are taken from a random one on, and from its beginning after its end,
    so that none is hidden more often than another. Of the pieces taken, 80 % become [MASK], 10 % a random piece and
    10 % stay as they are.

    Args:
        ids: (L,) int64, [CLS] pieces [SEP] and padding; at least one piece.
        word_starts: (L,) bool, true at the first piece of each word.
        tokenizer: Tells [MASK], the padding and which ids are pieces.
        seed: Of the run.
        position: Global position of the sample.
        probability: Share of the pieces to hide.
        num_slots: K, see `num_masked_slots`.

    Returns:
        masked_ids: (L,) int64.
        positions: (K,) int64, ascending; 0 where the slot is unused.
        targets: (K,) int64, the ids that stood there; IGNORE where the slot is unused.
    """
    # Lists, since captions are short: arrays would take twice as long for a handful of numbers.
    length = len(ids)
    num_pieces = int(np.count_nonzero(ids != tokenizer.pad_id)) - 2
    draws = uniform(seed, Purpose.MASKING, position, size=3 * length).tolist()  # word order, actions, replacements
    firsts = np.flatnonzero(word_starts).tolist()
    words = sorted(zip(firsts, [*firsts[1:], num_pieces + 1], strict=True), key=lambda word: draws[word[0]])
    target = max(1, round(probability * num_pieces))
    places: list[int] = []
    for first, stop in words:
        if len(places) >= target:
            break
        size = stop - first
        if size > num_slots:
            skipped = int(draws[first + 1] * size)  # a draw that orders no word
            places.extend(first + (skipped + n) % size for n in range(min(target, num_slots) - len(places)))
        elif len(places) + size <= num_slots:
            places.extend(range(first, stop))
    places.sort()

    masked_ids = ids.copy()
    pieces = tokenizer.ordinary_ids
    for place in places:
        action, replacement = draws[length + place], draws[2 * length + place]
        if action < 0.8:
            masked_ids[place] = tokenizer.mask_id
        elif action < 0.9:
            masked_ids[place] = pieces[int(replacement * len(pieces))]
    positions = np.zeros(num_slots, dtype=np.int64)
    targets = np.full(num_slots, IGNORE, dtype=np.int64)
    positions[: len(places)] = places
    targets[: len(places)] = ids[places]
    return masked_ids, positions, targets
