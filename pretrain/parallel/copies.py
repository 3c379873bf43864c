"""Pieces of the state that several ranks hold: they have to be the same, to the last bit."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import Axis


@dataclass(frozen=True)
class Difference:
    """A piece that is not the same on two ranks."""

    name: str
    kind: str
    ranks: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.kind} of {self.name} differs between ranks {self.ranks[0]} and {self.ranks[1]}"


def differing_copies(fragments: Iterable[Fragment], world: Axis) -> list[Difference]:
    """Compares by hash, on all ranks together, which get the same answer; each piece is named once."""
    hashes = {
        (f.name, kind, f.part.offset, f.start, tensor.numel()): hashlib.sha256(tensor.cpu().numpy().tobytes()).digest()
        for f in fragments
        for kind, tensor in f.tensors.items()
    }
    holders: dict[Any, dict[bytes, int]] = defaultdict(dict)  # piece -> hash -> the first rank with it
    for rank, held in enumerate(world.gather_objects(hashes)):
        for piece, digest in held.items():
            holders[piece].setdefault(digest, rank)
    return [
        Difference(name, kind, tuple(ranks)[:2])  # pyright: ignore[reportArgumentType]
        for (name, kind, *_), by_hash in sorted(holders.items())
        if len(ranks := list(by_hash.values())) > 1
    ]
