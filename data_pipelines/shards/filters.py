"""Which samples a manifest keeps: thresholds on their features, lists of ids, and one of each set of duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.shards.scan import FeatureFields

Unique = Literal["image", "caption", "pair"]


@dataclass(frozen=True)
class Filters:
    """What a sample must be like to be kept; what is not given does not matter."""

    min_size: int = 0  # pixels of the shorter side
    max_aspect: float = 0.0  # longer side over shorter side
    caption_characters: tuple[int, int] | None = None  # fewest and most
    language: tuple[str, frozenset[str]] | None = None  # json field and the values allowed
    min_score: tuple[str, float] | None = None  # json field and least value
    uids: Path | None = None  # .npy of dtype "u8,u8", as DataComp publishes its subsets
    unique: frozenset[Unique] = frozenset()
    exclude: Path | None = None  # .jsonl with `shard` and `key`, as training and `verify` write them

    @property
    def need_features(self) -> bool:
        """Whether samples must be read, and not only their headers."""
        given = (self.min_size, self.max_aspect, self.caption_characters, self.language, self.min_score, self.uids)
        return any(given) or bool(self.unique)

    @property
    def fields(self) -> FeatureFields:
        """The json fields that these filters look at."""
        score, language = self.min_score, self.language
        return FeatureFields(score[0] if score else "", language[0] if language else "")

    def keep(self, found: np.ndarray, reasons: Counter[str]) -> np.ndarray:
        """(n,) bool for the features of samples without a fault; counts each one left out by its first reason."""
        kept = np.ones(len(found), dtype=bool)
        sides = np.stack((found["width"], found["height"])).astype(np.int64)
        characters = found["caption_characters"]
        tests: list[tuple[str, np.ndarray]] = []
        if self.min_size or self.max_aspect:
            tests.append(("size of the image unknown", sides.min(axis=0) > 0))
        if self.min_size:
            tests.append((f"shorter side below {self.min_size} pixels", sides.min(axis=0) >= self.min_size))
        if self.max_aspect:
            fits = sides.max(axis=0) <= self.max_aspect * sides.min(axis=0)
            tests.append((f"aspect above {self.max_aspect:g}", fits))
        if self.caption_characters:
            fewest, most = self.caption_characters
            fits = (characters >= fewest) & (characters <= most)
            tests.append((f"caption not of {fewest} to {most} characters", fits))
        if self.language:
            name, values = self.language
            fits = np.isin(found["language"], [value.encode()[:16] for value in values])
            tests.append((f"{name} not {' or '.join(sorted(values))}", fits))
        if self.min_score:
            name, least = self.min_score
            tests.append((f"{name} missing or no number", ~np.isnan(found["score"])))
            tests.append((f"{name} below {least:g}", found["score"] >= least))
        if self.uids:
            tests.append((f"uid not in {self.uids.name}", np.isin(_as_pairs(found["uid"]), self._uids)))
        for reason, fits in tests:
            reasons[reason] += int(np.count_nonzero(kept & ~fits))
            kept &= fits
        return kept

    @cached_property
    def _uids(self) -> np.ndarray:
        assert self.uids is not None
        try:
            with self.uids.open("rb") as file:  # np.load would take an .npz, too
                uids = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.uids} cannot be read as a .npy ({type(error).__name__}: {error}): give a list of uids as "
                f"DataComp has."
            ) from None
        if uids.dtype != _PAIR:
            raise DataError(f"{self.uids} has the dtype {uids.dtype}, not u8,u8: give a list of uids as DataComp has.")
        return uids


class Duplicates:
    """Keeps the first of each set of equal images, captions or pairs; some 40 bytes per sample while it compares."""

    def __init__(self, unique: Iterable[Unique]):
        self._unique = sorted(unique)
        self._shards: list[np.ndarray] = []

    def add(self, found: np.ndarray) -> None:
        """The features of a shard's samples that are kept so far."""
        self._shards.append(np.stack((found["image_hash"], found["caption_hash"])))

    def keep(self, reasons: Counter[str]) -> list[np.ndarray]:
        """(n,) bool for each shard, in the order they were added."""
        sizes = [shard.shape[1] for shard in self._shards]
        images, captions = np.concatenate(self._shards, axis=1)
        hashes = {"image": images, "caption": captions, "pair": images * np.uint64(_ODD) + captions}
        kept = np.ones(len(images), dtype=bool)
        for kind in self._unique:
            among = np.flatnonzero(kept)
            first = np.unique(hashes[kind][among], return_index=True)[1]
            reasons[f"{kind} seen before"] += len(among) - len(first)
            kept[:] = False
            kept[among[first]] = True
        return np.split(kept, np.cumsum(sizes)[:-1])


_ODD = 0x9E3779B97F4A7C15  # multiplies one of two hashes, so that their sum is the hash of the pair
_PAIR = np.dtype([("f0", "<u8"), ("f1", "<u8")])


def _as_pairs(uids: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(uids).view(_PAIR).reshape(-1)
