"""Who writes what into which file: worked out by every rank from a few numbers of each."""

import hashlib
import json
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pretrain.checkpoint.index import FROZEN, TRAINED, Entry, Index, Stream, Table, merge
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import Axis

_ENTRIES = TypeAdapter(list[Entry])


class Holding:
    """The fragments that a rank saves: of parameters that are trained, and then of frozen ones."""

    def __init__(self, fragments: Iterable[Fragment], node: int) -> None:
        saved = [fragment for fragment in fragments if fragment.saved_here and fragment.stop > fragment.start]
        self.fragments = sorted(saved, key=lambda fragment: not _is_trained(fragment))
        entries = [Entry(f.name, f.part.shape, f.part.offset, f.part.size, _is_trained(f)) for f in self.fragments]
        self.entries = _ENTRIES.dump_json(entries)
        self.intervals = np.array([(f.start, f.stop - f.start) for f in self.fragments], "<i8").reshape(-1, 2)
        trained = np.array([entry.trained for entry in entries], bool)
        counts = [(self.intervals[sort, 1].sum(), sort.sum()) for sort in (trained, ~trained)]
        digests = [hashlib.blake2b(part, digest_size=16).digest() for part in (self.entries, self.intervals.tobytes())]
        self.head = torch.tensor([node, *np.ravel(counts), *np.frombuffer(b"".join(digests), "<i8")])

    def tensors(self) -> Iterable[Tensor]:
        """What is written, in its order."""
        for sort, kinds in ((True, TRAINED), (False, FROZEN)):
            for kind in kinds:
                yield from (f.tensors[kind] for f in self.fragments if _is_trained(f) == sort)


def _is_trained(fragment: Fragment) -> bool:
    return len(fragment.tensors) > len(FROZEN)


class Share(NamedTuple):
    """What one rank writes of a file: first its header, if it is the first."""

    file: str
    position: int
    header: bytes
    bytes: int


class Layout:
    """The files of a checkpoint: one per node, with a tensor per rank and sort in it."""

    def __init__(self, heads: Tensor) -> None:
        self.heads = heads
        self.shares: list[Share] = []
        self.streams: list[Stream] = []
        ranks = enumerate(heads.tolist())
        for node, members in groupby(ranks, key=lambda member: member[1][0]):
            self._add_file(f"node-{node:05d}.safetensors", [(rank, head[1:5]) for rank, head in members])

    def _add_file(self, name: str, members: list[tuple[int, list[int]]]) -> None:
        streams, tensors, end = [], {}, 0
        for rank, counts in members:
            for trained, elements, intervals in ((True, *counts[:2]), (False, *counts[2:])):
                stream = Stream(file=name, position=end, trained=trained, elements=elements, intervals=intervals)
                if elements:
                    shape = [len(TRAINED if trained else FROZEN), elements]
                    offsets = [end, stream.stop]
                    tensors[f"{rank}/{'trained' if trained else 'frozen'}"] = {
                        "dtype": "F32",
                        "shape": shape,
                        "data_offsets": offsets,
                    }
                streams.append(stream)
                end = stream.stop
        text = json.dumps(tensors).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        for stream in streams:
            stream.position += len(header)
        self.streams += [stream for stream in streams if stream.elements]
        for number, (first, last) in enumerate(zip(streams[::2], streams[1::2], strict=True)):
            before = header if number == 0 else b""
            start = first.position - len(before)
            self.shares.append(Share(name, start, before, last.stop - start))

    @property
    def bytes(self) -> int:
        return sum(share.bytes for share in self.shares)

    def gather_index(self, world: Axis, holding: Holding) -> Index | None:
        """The index of what all ranks hold, on the first of them. Ranks that hold the same parts send these once."""
        digests = [bytes(row) for row in self.heads[:, 5:7].contiguous().numpy().view(np.uint8)]
        firsts = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
        mine = holding.entries if firsts[digests[world.rank]] == world.rank else b""
        tables = list(world.to_first(mine))
        pieces = world.to_first(holding.intervals.tobytes())
        if world.rank > 0:
            list(pieces)
            return None
        ranks = list(firsts.values())
        parameters, bases = merge([_ENTRIES.validate_json(tables[rank]) for rank in ranks])
        line = {digests[rank]: base for rank, base in zip(ranks, bases, strict=True)}
        counts = self.heads[:, 2] + self.heads[:, 4]
        intervals, end = np.empty((int(counts.sum()), 2), "<i8"), 0
        for digest, piece in zip(digests, pieces, strict=True):
            here = np.frombuffer(piece, "<i8").reshape(-1, 2)
            rows = intervals[end : end + len(here)]
            rows[:] = here
            rows[:, 0] += line[digest]
            end += len(here)
        return Index(Table(parameters=parameters, streams=self.streams), intervals)
