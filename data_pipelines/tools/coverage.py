"""How a tokenizer suits captions: lengths, what is cut, and what is unknown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.samples.unspaced import SPACED_LETTER, UNSPACED_LETTER


@dataclass(frozen=True)
class Coverage:
    """How a tokenizer suits captions. Shares are of 1."""

    captions: int
    unknown_share: float  # of the pieces
    cut_shares: tuple[float, ...]  # of the captions: those longer than each text length
    mean_pieces: float  # of a caption, without special tokens, as the four below
    median_pieces: int
    p95_pieces: int
    p99_pieces: int
    max_pieces: int
    pieces_per_word: float | None  # in captions of scripts that have spaces, words being what stands between them
    pieces_per_unspaced_letter: float | None  # in captions of scripts that have none, marks on letters included
    vocabulary_share: float  # of the pieces of text: those that occur
    unknown_characters: tuple[tuple[str, int], ...]  # the most frequent ones, and how often they occur


def coverage(tokenizer: Tokenizer, captions: Iterable[str], text_lengths: Sequence[int]) -> Coverage:
    """Measures a tokenizer on captions, which are read once and not kept.

    Args:
        tokenizer: To measure.
        captions: As training reads them.
        text_lengths: Tokens of a caption (L), [CLS] and [SEP] included, to compare.

    Raises:
        DataError: There are no captions.
    """
    lengths: Counter[int] = Counter()
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    is_unknown: dict[str, bool] = {}
    unknown_characters: Counter[str] = Counter()
    spaced, unspaced = [0, 0], [0, 0]  # pieces, and words or letters
    for caption in captions:
        ids, _ = tokenizer.pieces(caption)
        lengths[len(ids)] += 1
        np.add.at(counts, ids, 1)
        if not UNSPACED_LETTER.search(caption):
            spaced[0] += len(ids)
            spaced[1] += len(caption.split())
        elif not SPACED_LETTER.search(caption):
            unspaced[0] += len(ids)
            unspaced[1] += len(UNSPACED_LETTER.findall(caption))
        if tokenizer.unk_id in ids:
            for character in caption:
                if character not in is_unknown:
                    is_unknown[character] = tokenizer.unk_id in tokenizer.pieces(character)[0]
                unknown_characters[character] += is_unknown[character]
    num_captions, num_pieces = lengths.total(), int(counts.sum())
    if not num_captions:
        raise DataError("There are no captions to measure the tokenizer on: give a manifest that has some.")
    ordered = sorted(lengths)
    reached = np.cumsum([lengths[length] for length in ordered])

    def percentile(share: float) -> int:
        return ordered[int(np.searchsorted(reached, math.ceil(share * num_captions)))]

    return Coverage(
        captions=num_captions,
        unknown_share=int(counts[tokenizer.unk_id]) / max(1, num_pieces),
        cut_shares=tuple(
            sum(count for length, count in lengths.items() if length > most - 2) / num_captions for most in text_lengths
        ),
        mean_pieces=num_pieces / num_captions,
        median_pieces=percentile(0.5),
        p95_pieces=percentile(0.95),
        p99_pieces=percentile(0.99),
        max_pieces=ordered[-1],
        pieces_per_word=spaced[0] / spaced[1] if spaced[1] else None,
        pieces_per_unspaced_letter=unspaced[0] / unspaced[1] if unspaced[1] else None,
        vocabulary_share=float(np.mean(counts[tokenizer.ordinary_ids] > 0)),
        unknown_characters=tuple((c, n) for c, n in unknown_characters.most_common(20) if n),
    )
