"""Masks for masked language modelling: whole words, keyed by the sample's position.

Source: Devlin et al., BERT (2019), section 3.1, with the whole-word masking of its 2019 release.
"""

from __future__ import annotations

import math

import numpy as np

from data_pipelines.randomness import Purpose, uniform
from data_pipelines.tokenizer import Tokenizer

IGNORE = -100  # equal to data_pipelines.batch.IGNORE, which needs torch; a test holds the two together


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
    a word that no longer fits into the slots is passed over. Of the pieces taken, 80 % become [MASK], 10 % a
    random piece and 10 % stay as they are.

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
    num_pieces = int(np.count_nonzero(ids != tokenizer.pad_id)) - 2
    draws = uniform(seed, Purpose.MASKING, position, size=3 * len(ids))
    word_draws, actions, replacements = draws.reshape(3, -1)

    firsts = np.flatnonzero(word_starts)
    lengths = np.diff(firsts, append=num_pieces + 1)
    target = max(1, round(probability * num_pieces))
    taken: list[int] = []
    for word in np.argsort(word_draws[firsts], kind="stable"):
        first, length = int(firsts[word]), int(lengths[word])
        if len(taken) >= target:
            break
        if len(taken) + length <= num_slots:
            taken.extend(range(first, first + length))
    if not taken:  # every word has more pieces than there are slots: hide the beginning of one
        first = int(firsts[np.argmin(word_draws[firsts])])
        taken.extend(range(first, first + num_slots))
    places = np.array(sorted(taken), dtype=np.int64)

    masked_ids = ids.copy()
    pieces = tokenizer.ordinary_ids
    random_pieces = pieces[(replacements[places] * len(pieces)).astype(np.int64)]
    action = actions[places]
    masked_ids[places] = np.where(action < 0.8, tokenizer.mask_id, np.where(action < 0.9, random_pieces, ids[places]))
    positions = np.zeros(num_slots, dtype=np.int64)
    targets = np.full(num_slots, IGNORE, dtype=np.int64)
    positions[: len(places)] = places
    targets[: len(places)] = ids[places]
    return masked_ids, positions, targets
