"""Random numbers that are arithmetic: the same key gives the same draw on any rank, worker, day or machine.

Philox is counter-based, so a draw needs no state. Its raw output is guaranteed never to change between numpy
versions, which the methods of `Generator` are not.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for; two purposes never share numbers."""

    SHARDS = 0
    WINDOW = 1
    AUGMENTATION = 2
    MASKING = 3
    SCENES = 4
    MIXTURE = 5
    CAPTION = 6
    RESHARD = 7
    SOURCE = 8
    INSPECT = 9


def raw(seed: int, purpose: Purpose, *counter: int, size: int) -> np.ndarray:
    """`size` uint64 numbers keyed by (seed, purpose, up to three counters)."""
    words = np.array([0, *counter, 0, 0, 0][:4], dtype=np.uint64)  # the first counts the numbers drawn
    key = np.array([seed & _WORD, purpose], dtype=np.uint64)  # a list would go through float64 and lose digits
    return np.random.Philox(key=key, counter=words).random_raw(size)


def uniform(seed: int, purpose: Purpose, *counter: int, size: int) -> np.ndarray:
    """`size` float64 numbers in [0, 1)."""
    return (raw(seed, purpose, *counter, size=size) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, purpose: Purpose, *counter: int, size: int) -> np.ndarray:
    """A permutation of range(size) as int64."""
    return np.argsort(raw(seed, purpose, *counter, size=size), kind="stable")
