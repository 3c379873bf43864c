"""Shuffles a whole corpus into new shards of one size, members as they are, in parts that need not know each other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.parallel import each_done
from data_pipelines.randomness import Purpose, permutation
from data_pipelines.shards.manifest import write_atomically
from data_pipelines.shards.tar import TarError, iter_members, iter_samples
from data_pipelines.shards.writer import write_shard
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.wording import AGAIN
from data_pipelines.text import to_json
from data_pipelines.tools.sources import WHOLE, Part, Source, by_source

_RECORD = "reshard.json"


@dataclass(frozen=True)
class Resharding:
    """What is written where. The same values give the same bytes, whichever part writes them."""

    sources: tuple[Source, ...]  # from `load_sources`
    folder: Path
    samples_per_shard: int  # the last shard may have fewer
    seed: int

    @property
    def samples(self) -> int:
        """That are kept in the sources, and so of all new shards."""
        return sum(source.entry.samples for source in self.sources if source.entry)

    @property
    def num_shards(self) -> int:
        """Of all parts."""
        return -(-self.samples // self.samples_per_shard)

    def path(self, shard: int) -> Path:
        """Of a new shard."""
        return self.folder / f"{shard:0{max(5, len(str(self.num_shards)))}d}.tar"

    def start(self) -> None:
        """Makes the folder, or sees that it was made for the same sources, seed and size.

        Raises:
            DataError: It holds something else.
        """
        record = self.folder / _RECORD
        ours = {
            "samples": self.samples,
            "samples_per_shard": self.samples_per_shard,
            "seed": self.seed,
            "sources": self._digest(),
        }
        try:
            theirs = json.loads(record.read_bytes())
        except (OSError, ValueError):
            theirs = None
        if theirs is None and self.folder.exists() and any(self.folder.glob("*.tar")):
            raise DataError(f"{self.folder} holds shards that `reshard` did not write: name a new folder.")
        if theirs not in (None, ours):
            raise DataError(
                f"{self.folder} was begun with other sources, another --seed or --samples-per-shard ({theirs}, now "
                f"{ours}): go on with those, or name a new folder."
            )
        if theirs is None:
            write_atomically(record, lambda tmp: tmp.write_text(to_json(ours) + "\n"))

    def write(
        self, *, part: Part = WHOLE, processes: int | None = None, on_shard: Callable[[], None] = lambda: None
    ) -> int:
        """Writes the new shards that are not there yet. Each appears whole or not at all.

        Args:
            part: Writes every `count`-th shard.
            processes: Each holds one new shard in memory; by default one per core.
            on_shard: Called as each shard is done, and for those that were there.

        Returns:
            The number of shards written.

        Raises:
            DataError: A shard cannot be read or written.
        """
        order = permutation(self.seed, Purpose.RESHARD, size=self.samples)  # 20 bytes per sample while it is made
        missing: list[tuple[int, np.ndarray]] = []
        for shard in part.of(range(self.num_shards)):
            if self.path(shard).exists():
                on_shard()
            else:
                missing.append((shard, order[shard * self.samples_per_shard :][: self.samples_per_shard]))
        for _ in each_done(self._write_shard, missing, processes):
            on_shard()
        return len(missing)

    def _write_shard(self, job: tuple[int, np.ndarray]) -> None:
        shard, positions = job
        path = self.path(shard)
        for left in self.folder.glob(f".{path.name}.*.tmp"):  # by a process that was killed
            left.unlink()
        samples = _with_unique_keys(self._read(positions))
        write_atomically(path, lambda tmp: write_shard(tmp, samples))

    def _read(self, positions: np.ndarray) -> list[tuple[Source, str, dict[str, bytes | str]]]:
        """(source, key, members) of the samples at positions, in their order; each source is read forwards."""
        order = np.argsort(positions, kind="stable")
        places = iter(order.tolist())
        found: dict[int, tuple[Source, str, dict[str, bytes | str]]] = {}
        for source, chosen in by_source(self.sources, positions[order]):
            data = source.open(ahead=False)
            try:
                rows = source.rows(data)
                for start, stop, _ in rows[source.kept(len(rows))[chosen]].tolist():
                    found[next(places)] = (source, *_members(source.location, data.read(start, stop - start), start))
            finally:
                data.close()
        return [found[place] for place in range(len(positions))]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for source in self.sources:
            entry = source.entry
            assert entry is not None
            known = (source.location, entry.bytes, entry.indexed, entry.samples, entry.version, entry.sha256)
            digest.update(("\0".join(map(str, known)) + "\n").encode(errors="surrogateescape"))
            digest.update(b"" if source.bits is None else source.bits.tobytes())
        return digest.hexdigest()


def _members(location: str, data: bytes, start: int) -> tuple[str, dict[str, bytes | str]]:
    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    try:
        (sample,) = iter_samples(iter_members(read, len(data), whole=False))
    except (TarError, ValueError) as error:
        raise DataError(
            f"Shard {shown(location)} from byte {start:,} holds no sample ({error}): it has changed since it was "
            f"indexed; {AGAIN}."
        ) from None
    return sample.key, {extension: read(m.start, m.size) for extension, m in sample.members.items()}


def _with_unique_keys(
    samples: Sequence[tuple[Source, str, dict[str, bytes | str]]],
) -> list[dict[str, bytes | str]]:
    # Two sources may use the same keys, and readers take neighbours of one key for one sample.
    times = Counter(key for _, key, _ in samples)
    keys = [key if times[key] == 1 else f"{source.number:05d}-{key}" for source, key, _ in samples]
    if len(set(keys)) < len(keys):  # an old key equals one made here
        keys = [f"{source.number:05d}-{key}" for source, key, _ in samples]
    return [{"__key__": key, **members} for key, (_, _, members) in zip(keys, samples, strict=True)]
