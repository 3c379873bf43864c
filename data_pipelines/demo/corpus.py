"""Writes a demonstration corpus: shards, manifests, a tokenizer and zero-shot prompts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from data_pipelines.demo.scenes import DRAWING, SHORT_SHARE, caption_of, draw_scene, picture_of, zero_shot_prompts
from data_pipelines.errors import DataError
from data_pipelines.samples.tokenizer import train_sentencepiece
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import index_folder
from data_pipelines.shards.writer import filled, holds_anything, write_shard
from data_pipelines.text import to_json

SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class Demo:
    """A demonstration corpus: the same numbers give the same bytes."""

    train: int  # samples
    heldout: int  # samples
    size: int  # side of the pictures in pixels
    vocab_size: int  # pieces of the tokenizer, at most
    seed: int

    @property
    def num_shards(self) -> int:
        """Of both splits."""
        return len(self._jobs(Path()))

    def is_complete(self, folder: Path) -> bool:
        """Whether the folder holds exactly this corpus, drawn as this version draws.

        Raises:
            DataError: It holds something else, or does not say what.
        """
        if not holds_anything(folder):
            return False
        record = folder / "demo.json"
        try:
            found = json.loads(record.read_bytes()) if record.is_file() else "something else"
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{record} cannot be read ({type(error).__name__}): remove {folder}, or name another."
            ) from None
        if found != self._record():
            raise DataError(
                f"{folder} already holds {found}, not a demo of {self._record()}: remove it, or name another."
            )
        return True

    def make(self, folder: Path, *, processes: int, on_shard: Callable[[], None] = lambda: None) -> None:
        """Writes shards, manifests, a tokenizer and zero-shot prompts.

        Args:
            folder: New or empty; the corpus is there whole or not at all.
            processes: Drawing at the same time.
            on_shard: Called as each shard is done.
        """
        with filled(folder) as tmp:
            for split in ("train", "heldout"):
                (tmp / split).mkdir()
            jobs = self._jobs(tmp)
            captions: list[str] = []
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                write = partial(_write_samples, seed=self.seed, size=self.size)
                for (_, is_heldout, *_), texts in zip(jobs, pool.map(write, jobs), strict=True):
                    captions += [] if is_heldout else texts
                    on_shard()
            for split in ("train", "heldout"):
                path = tmp / split / "manifest.json"
                manifest, _ = build_manifest(sorted(path.parent.glob("*.tar")), path, processes=1)
                manifest.save()
                for seal in index_folder(path).glob("*.seal.json"):
                    seal.unlink()  # they tell times, and the same seed gives the same bytes
            # Made-up captions hold no rare characters that are better unknown.
            train_sentencepiece(captions, tmp / "tokenizer.model", self.vocab_size, character_coverage=1.0)
            prompts = to_json(zero_shot_prompts(), indent=2)
            (tmp / "heldout" / "prompts.json").write_text(prompts + "\n", encoding="utf-8")
            (tmp / "demo.json").write_text(to_json(self._record()) + "\n")

    def _record(self) -> dict[str, object]:
        numbers = {name: getattr(self, name) for name in ("train", "heldout", "size", "vocab_size", "seed")}
        return {**numbers, "drawing": DRAWING}

    def _jobs(self, folder: Path) -> list[tuple[Path, bool, int, int]]:
        return [
            (folder / split / f"{shard:05d}.tar", split == "heldout", start, min(start + SAMPLES_PER_SHARD, count))
            for split, count in (("train", self.train), ("heldout", self.heldout))
            for shard, start in enumerate(range(0, count, SAMPLES_PER_SHARD))
        ]


def _write_samples(job: tuple[Path, bool, int, int], *, seed: int, size: int) -> list[str]:
    path, heldout, start, stop = job
    captions: list[str] = []
    samples: list[dict[str, bytes | str]] = []
    for index in range(start, stop):
        scene, draws = draw_scene(heldout, seed, index)
        caption = caption_of(scene, draws[16:], short=not heldout and draws[15] < SHORT_SHARE)
        metadata = {
            "subject": " ".join(scene.subject),
            "object": " ".join(scene.object),
            "relation": scene.relation,
            "shapes": " and ".join(sorted((scene.subject[2], scene.object[2]))),
        }
        jpeg = io.BytesIO()
        picture_of(scene, draws, size).save(jpeg, "JPEG", quality=90)
        samples.append(
            {
                "__key__": f"{index:08d}",
                "jpg": jpeg.getvalue(),
                "txt": caption.encode(),
                "json": to_json(metadata).encode(),
            }
        )
        captions.append(caption)
    write_shard(path, samples)
    return captions
