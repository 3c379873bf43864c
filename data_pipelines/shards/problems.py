"""What is wrong with samples and shards, and the lists of it that `index --exclude` reads."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipelines.errors import DataError, cannot_open
from data_pipelines.shards.manifest import write_atomically
from data_pipelines.shards.sample import Fault, fix_of
from data_pipelines.shards.scan import detail_of, label_at
from data_pipelines.storage.addresses import file_name, shown
from data_pipelines.storage.source import ByteSource
from data_pipelines.text import open_text, to_json

MISSING = "the shard cannot be read"
CHANGED = "the shard has changed since it was indexed"
WRONG_SUM = "the SHA-256 of the shard is not the manifest's"
REPLACED = "the SHA-256 of the shard is not that of the last index"
WRONG_COUNT = "the shard holds more or fewer samples than the manifest says"
WRONG_INDEX = "the index does not fit the shard"
_FIXES = {
    MISSING: "put it back, or index what is there",
    CHANGED: "restore it, or index it again if it was replaced on purpose",
    WRONG_SUM: "restore it; indexing it again would take what it holds now for right",
    REPLACED: "restore it, unless it was replaced on purpose",
    WRONG_COUNT: "index it again, without --trust-stats",
    WRONG_INDEX: "index it again",
}


def advice(reason: str) -> str:
    """What helps against a problem; "" where no more can be done than to leave the sample out."""
    return _FIXES.get(reason) or fix_of(reason)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a sample, or with a whole shard."""

    shard: str
    key: str  # empty for the shard
    reason: str
    detail: str = ""

    @classmethod
    def of_row(cls, location: str, source: ByteSource, row: Sequence[int]) -> Problem:
        """That of a row with a fault, as `scan` finds them."""
        start, stop, fault = row[0], row[1], Fault(row[2])
        key = "" if fault.is_of_shard else label_at(source, start)
        return cls(location, key, fault.reason, detail_of(source, start, stop, fault))


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes one JSON object per line."""
    shown_ones = (asdict(found) | {"shard": shown(found.shard)} for found in problems)
    rows = ({name: value for name, value in found.items() if name != "detail" or value} for found in shown_ones)
    text = "".join(to_json(row) + "\n" for row in rows)
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


@dataclass
class Exclusions:
    """What a list says of some shards: keys to leave out of each, and "" for the whole shard."""

    keys: list[set[str]]
    elsewhere: list[tuple[str, str]] = field(default_factory=list)  # (shard, key) of shards that are none of these

    @classmethod
    def load(cls, path: Path | None, locations: Sequence[str]) -> Exclusions:
        """Reads a list as training and `verify` write it.

        What is listed of one of `locations` concerns no other. Any other shard is known by the name of its file, since
        shards are moved; of several, by the folders above it, too.

        Raises:
            DataError: The list cannot be read.
        """
        found = cls([set() for _ in locations])
        if path is None:
            return found
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, location in enumerate(locations):
            for name in {location, shown(location), file_name(location)}:
                numbers[name].append(number)
        for shard, key in _entries(path):
            candidates = numbers.get(shard) or numbers.get(file_name(shard), [])
            alike = [_common_end(shard, locations[number]) for number in candidates]
            for number, parts in zip(candidates, alike, strict=True):
                if parts == max(alike):
                    found.keys[number].add(key)
            if not candidates:
                found.elsewhere.append((shard, key))
        return found


def _entries(path: Path) -> list[tuple[str, str]]:
    try:
        with open_text(path) as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        entries = [(row["shard"], row["key"]) for row in rows]
        if not all(isinstance(text, str) for entry in entries for text in entry):
            raise TypeError("shard and key are text")
    except OSError as error:
        raise cannot_open(str(path), error) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} has a line that is no object with `shard` and `key`: give a list as training and `verify` write "
            f"it."
        ) from None
    return list(dict.fromkeys(entries))


def _common_end(one: str, other: str) -> int:
    """How many parts two paths share, from the last one on."""
    pairs = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return next((number for number, (ours, theirs) in enumerate(pairs) if ours != theirs), 1 << 20)
