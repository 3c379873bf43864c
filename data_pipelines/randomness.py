"""Random numbers that are arithmetic: the same key gives the same draw on any rank, worker, day or machine.

Philox is counter-based, so a draw needs no state. Its raw output is guaranteed never to change between numpy
versions, which the methods of `Generator` are not.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import threading
from enum import IntEnum

import numpy as np

_WORD = (1 << 64) - 1


class _Philox(threading.local):
    """A generator to be set to any counter: 2 us, where a new one takes 7 us."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(0)
        self.state = self.generator.state  # before the first draw; a copy, which draws do not change


_philox = _Philox()


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
    RAND_AUGMENT = 10
    COLOR_JITTER = 11
    BLUR = 12


def raw(seed: int, purpose: Purpose, *counter: int, size: int) -> np.ndarray:
    """`size` uint64 numbers keyed by (seed, purpose, up to three counters)."""
    state = _philox.state
    words = state["state"]
    words["key"][:] = seed & _WORD, purpose
    words["counter"][:] = (0, *counter, 0, 0, 0)[:4]  # the first word counts the draws
    _philox.generator.state = state
    return _philox.generator.random_raw(size)


def uniform(seed: int, purpose: Purpose, *counter: int, size: int) -> np.ndarray:
    """`size` float64 numbers in [0, 1)."""
    return (raw(seed, purpose, *counter, size=size) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, purpose: Purpose, *counter: int, size: int) -> np.ndarray:
    """A permutation of range(size) as int64."""
    return np.argsort(raw(seed, purpose, *counter, size=size), kind="stable")
