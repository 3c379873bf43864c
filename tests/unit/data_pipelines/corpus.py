"""Small corpora for the tests."""

import io
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.batch import known_tensors
from data_pipelines.config import DataConfig
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.stream.loader import TrainingData

WORDS = ("red", "green", "large", "circle", "square", "above", "below", "mountain", "river", "photograph", "of", "the")
MASKING = 0.15

Members = dict[str, bytes | str]


def jpeg(seed: int, height: int = 20, width: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def caption(index: int) -> str:
    return " ".join(WORDS[i] for i in np.random.default_rng(index).integers(0, len(WORDS), 3 + index % 9))


def member(index: int) -> Members:
    metadata = json.dumps({"index": index}).encode()
    return {"__key__": f"{index:05d}", "jpg": jpeg(index), "txt": caption(index).encode(), "json": metadata}


@dataclass(frozen=True)
class Corpus:
    folder: Path
    tokenizer: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def config(self, **changes: object) -> DataConfig:
        settings: dict[str, object] = {
            "train": self.manifest,
            "heldout": self.manifest,
            "tokenizer": self.tokenizer,
            "workers": 0,
            "grain": 4,
            "lanes": 4,
            "window": 16,
        }
        return DataConfig.model_validate(settings | changes)

    def spec(self, tensors: Collection[str] | None = None, seed: int = 7, **changes: object) -> BatchSpec:
        """Small batches, of all tensors that there are if none are named."""
        config, wanted = self.config(**changes), known_tensors() if tensors is None else tensors
        return BatchSpec(config, Tokenizer.load(config.tokenizer), wanted, 8, 12, MASKING, seed)

    def training(self, *, global_batch: int = 24, accumulation=1, dp_rank=0, dp_size=1, **changes: Any):
        return TrainingData(
            self.spec(**changes),
            global_batch=global_batch,
            accumulation=accumulation,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )

    def heldout(self, **changes: Any) -> HeldoutData:
        return HeldoutData(self.spec(**changes))


def make_corpus(
    folder: Path, tokenizer: Path, sizes: tuple[int, ...], change: Callable[[int, Members], Members] = lambda _, m: m
) -> Corpus:
    """Shards of the given sizes; `change` may spoil a sample, told by its number over all shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, first = [], 0
    for number, size in enumerate(sizes):
        shards.append(folder / f"{number:05d}.tar")
        write_shard(shards[-1], [change(index, member(index)) for index in range(first, first + size)])
        first += size
    manifest, _ = build_manifest(shards, folder / "manifest.json", processes=1)
    manifest.save()
    return Corpus(folder, tokenizer)
