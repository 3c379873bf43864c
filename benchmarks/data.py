"""How fast one core turns shards into batches, what a worker needs, and how soon a run of 10^9 samples goes on.

    python -m benchmarks.data [--seconds 20] [--quick]

The contenders of a corpus take turns, batch by batch, and their medians are compared: on a shared machine the ratios
hold where the rates do not. The images are drawn here, with the spectrum of photographs and as many bits a pixel.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from webdataset.compat import WebDataset

from data_pipelines.batch import known_tensors
from data_pipelines.config import DataConfig
from data_pipelines.order.mixture import DataState
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer, train_sentencepiece
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.manifest import Manifest, Shard
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.loader import TrainingData
from data_pipelines.stream.reader import iter_captions

BATCH = 64
SIDE = 224
SIZES = ((256, 256), (512, 512), (480, 640))  # height, width
CROP_SCALES = ((0.9, 1.0), (0.5, 1.0))
WORDS = (
    "red",
    "small",
    "old",
    "two",
    "man",
    "woman",
    "dog",
    "street",
    "house",
    "table",
    "water",
    "standing",
    "beside",
    "the",
)
CAPTION_WORDS = 14
SHARD = "00000.tar"  # the only one of a corpus
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the data pipelines on one core.")
    parser.add_argument("--seconds", type=float, default=60, help="for each line of the first two tables (default 60)")
    parser.add_argument("--quick", action="store_true", help="a tiny corpus and one batch of each: does it work?")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    sizes, images, seconds, shards, samples = SIZES, 256, options.seconds, 10**5, 10**4
    if options.quick:
        sizes, images, seconds, shards, samples = SIZES[:1], 16, 0.0, 20, 500
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        corpora = {size: make_corpus(Path(folder, "x".join(map(str, size))), *size, images) for size in sizes}
        print_rates(corpora, seconds)
        print_augmentation(corpora[sizes[-1]], seconds)
        print_memory(corpora[sizes[-1]])
        print_resume(Path(folder, "many"), shards, samples)


def make_corpus(folder: Path, height: int, width: int, images: int) -> Path:
    """A shard of drawn images at quality 90 with captions, indexed, and a tokenizer; returns the manifest."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    samples: list[dict[str, bytes | str]] = []
    for number in range(images):
        caption = " ".join(rng.choice(WORDS, CAPTION_WORDS)).encode()
        samples.append({"__key__": f"{number:06d}", "jpg": jpeg(draw(rng, height, width)), "txt": caption})
    write_shard(folder / SHARD, samples)
    manifest, _ = build_manifest([folder / SHARD], folder / "manifest.json", processes=1)
    manifest.save()
    train_sentencepiece(iter_captions(manifest), folder / "tokenizer.model", 64)
    return manifest.path


def draw(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image of noise at all scales and some shapes; (height, width, 3) uint8.

    At quality 90 it takes 2.7 bits a pixel at 256 x 256 and 2.1 at 512 x 512, where twelve photographs had medians of
    2.9 and 2.3.
    """
    pixels = np.full((height, width, 3), 120, dtype=np.float32)
    longest = max(height, width)
    side = 2
    while side <= longest:
        shape = side * height // longest + 1, side * width // longest + 1
        noise = rng.standard_normal((*shape, 1)) + 0.35 * rng.standard_normal((*shape, 3))  # colours vary less
        pixels += (
            60
            * (2 / side) ** 0.42
            * cv2.resize(noise.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        )
        side *= 2
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(12):
        (cy, cx), (ry, rx) = rng.uniform(0, (height, width)), rng.uniform(0.05, 0.3, 2) * height
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * rng.uniform(0, 255, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def training(manifest: Path, **changes: object) -> TrainingData:
    settings = {"train": manifest, "tokenizer": manifest.with_name("tokenizer.model"), "workers": 0} | changes
    config = DataConfig.model_validate(settings)
    spec = BatchSpec(config, Tokenizer.load(config.tokenizer), known_tensors(), SIDE, 40, 0.15, seed=0)
    return TrainingData(spec, global_batch=BATCH)


def ours(manifest: Path, **changes: object) -> Iterator[object]:
    """The toolkit without worker processes."""
    data = training(manifest, **changes)
    return data.batches(data.initial_state())


def plain(manifest: Path, crop_scale: tuple[float, float]) -> Iterator[object]:
    """webdataset, Pillow and normalised floats, as in most training scripts.

    The steps are those of torchvision's RandomResizedCrop, ToTensor and Normalize, which take a tenth longer. It does
    less than ours: nothing is shuffled, and there are no tokens, masks or hashes.
    """

    def crop(image: Image.Image) -> Image.Image:
        width, height = image.size
        area = height * width * torch.empty(1).uniform_(*crop_scale).item()
        aspect = torch.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))).item()
        box_width, box_height = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
        top = int(torch.randint(0, height - box_height + 1, (1,)).item())
        left = int(torch.randint(0, width - box_width + 1, (1,)).item())
        part = image.crop((left, top, left + box_width, top + box_height))
        return part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    def normalise(image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return pixels.clone().sub_(mean).div_(std)

    dataset: Any = WebDataset(str(manifest.with_name(SHARD)), shardshuffle=False).decode("pilrgb")
    pairs = ((normalise(crop(sample["jpg"])), sample["txt"]) for _ in count() for sample in dataset)
    while True:
        images, captions = zip(*islice(pairs, BATCH), strict=True)
        yield torch.stack(images), captions


def floor(manifest: Path) -> Iterator[object]:
    """Entropy decoding alone, as nearly as simplejpeg can be asked for it: at 1/8 of the size, out of memory."""
    endless = cycle(jpegs(manifest))
    while True:
        yield [simplejpeg.decode_jpeg(data, min_height=1, min_width=1) for data in islice(endless, BATCH)]


def jpegs(manifest: Path) -> list[bytes]:
    """The images of a corpus as they are in its shard."""
    return [sample["jpg"] for sample in WebDataset(str(manifest.with_name(SHARD)), shardshuffle=False)]


def seconds_per_image(contenders: dict[str, Callable[[], Iterator[object]]], seconds: float) -> dict[str, float]:
    """Medians over batches, which processes of their own make in turns until `seconds` are over in sum.

    The seconds are the processor's: nobody waits here, and what others do on the machine counts less.
    """
    context = multiprocessing.get_context("fork")
    ends: dict[str, Any] = {}
    for name, make in contenders.items():
        ends[name], other = context.Pipe()
        context.Process(target=_make_batches, args=(make, other), daemon=True).start()
        ends[name].recv()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    until = time.perf_counter() + seconds
    while True:
        for name, end in ends.items():
            end.send(None)
            taken[name].append(end.recv() / BATCH)
        if time.perf_counter() > until:
            break
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    return {name: statistics.median(times) for name, times in taken.items()}


def _make_batches(make: Callable[[], Iterator[object]], end: Any) -> None:
    batches = make()
    next(batches)  # opens files
    end.send(None)
    while True:
        end.recv()
        start = time.process_time()
        next(batches)
        end.send(time.process_time() - start)


def print_rates(corpora: dict[tuple[int, int], Path], seconds: float) -> None:
    """The toolkit against the plain pipeline and against the floor."""
    print("| JPEG, quality 90 | crop scale | plain, images/s | ours | floor | ours / plain | ours / floor |")
    print("|---|---|---|---|---|---|---|")
    for (height, width), manifest in corpora.items():
        files = jpegs(manifest)
        bits = 8 * sum(map(len, files)) / len(files) / height / width
        for scale in CROP_SCALES:
            contenders = {
                "plain": partial(plain, manifest, scale),
                "ours": partial(ours, manifest, crop_scale=scale),
                "floor": partial(floor, manifest),
            }
            times = seconds_per_image(contenders, seconds)
            rates = " | ".join(f"{1 / time:,.0f}" for time in times.values())
            print(
                f"| {width} x {height}, {bits:.1f} bits a pixel | {scale[0]}-{scale[1]} | {rates} "
                f"| {times['plain'] / times['ours']:.2f} | {times['floor'] / times['ours']:.0%} |",
                flush=True,
            )


def print_augmentation(manifest: Path, seconds: float) -> None:
    """What each augmentation adds to a sample."""
    configs: dict[str, dict[str, object]] = {
        "none": {},
        "flip": {"flip": True},
        "rand_augment [2, 7]": {"augment": {"rand_augment": [2, 7]}},
        "color_jitter 0.4": {"augment": {"color_jitter": 0.4}},
        "gaussian_blur 0.5": {"augment": {"gaussian_blur": 0.5}},
    }
    contenders = {name: partial(ours, manifest, **changes) for name, changes in configs.items()}
    times = seconds_per_image(contenders, seconds)
    print("\n| augmentation | ms per sample | more than none |\n|---|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {1e3 * taken:.2f} | {1e3 * (taken - times['none']):+.2f} |", flush=True)


def print_memory(manifest: Path) -> None:
    """What one worker process holds at its peak."""
    data = training(manifest, workers=1)
    others = set(multiprocessing.active_children())
    batches = data.batches(data.initial_state())
    for _ in range(20):
        next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
    rollup = dict(line.split(":", 1) for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()[1:])
    peak, own = (int(value.split()[0]) / 1024 for value in (status["VmHWM"], rollup["Private_Dirty"]))
    del batches
    print(f"\nA worker process: {peak:,.0f} MiB at its peak, of which {own:,.0f} MiB are its own.", flush=True)


def print_resume(folder: Path, num_shards: int, samples: int) -> None:
    """How soon the first batch comes out of many shards, and what the plan of an epoch takes."""
    total = num_shards * samples
    make_links(folder, num_shards, samples)
    print(f"\n{total:,} samples in {num_shards:,} shards:\n")
    print("| samples consumed | manifest read, s | first batch, ms |\n|---|---|---|")
    taken: dict[int, list[tuple[float, float]]] = {0: [], total // 1000: [], total: []}
    for _ in range(3):
        for consumed, times in taken.items():
            start = time.perf_counter()
            data = training(folder / "manifest.json")
            opened = time.perf_counter()
            next(data.batches(state_after(data, consumed)))
            times.append((opened - start, 1e3 * (time.perf_counter() - opened)))
    for consumed, times in taken.items():
        manifest_s, batch_ms = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {consumed:,} | {manifest_s:.2f} | {batch_ms:.0f} |")
    tracemalloc.start()
    data = training(folder / "manifest.json")
    held, reading = (size / 2**20 for size in tracemalloc.get_traced_memory())
    tracemalloc.reset_peak()
    order = data.sources[0].order
    for grain in range(order.lanes):
        order.locate(0, grain)
    planned = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"\nThe manifest takes {held:.0f} MiB, and {reading:.0f} MiB while it is read.")
    print(f"With a window of every lane planned, both take {planned:.0f} MiB.")


def make_links(folder: Path, num_shards: int, samples: int) -> None:
    """A manifest of many shards that are all links to one."""
    (folder / "shards").mkdir(parents=True)
    data = jpeg(draw(np.random.default_rng(0), 32, 32))
    write_shard(
        folder / "one.tar", [{"__key__": f"{i:06d}", "jpg": data, "txt": b"a red house"} for i in range(samples)]
    )
    one, _ = build_manifest([folder / "one.tar"], folder / "one.json", processes=1)
    names = [folder / "shards" / f"{number:06d}.tar" for number in range(num_shards)]
    shards = tuple(Shard(str(name), samples, one.shards[0].bytes, samples) for name in names)
    manifest = Manifest(folder / "manifest.json", shards)
    manifest.save()
    manifest.index_path(0).parent.mkdir()
    for number, name in enumerate(names):
        name.symlink_to(folder / "one.tar")
        manifest.index_path(number).symlink_to(one.index_path(0))
    train_sentencepiece(WORDS, folder / "tokenizer.model", 64)


def state_after(data: TrainingData, samples: int) -> DataState:
    """Where a run stands that has consumed so many samples."""
    state = data.initial_state()
    step = samples // BATCH
    return state.model_copy(update={"step": step, "grains": step * (BATCH // state.grain)})


if __name__ == "__main__":
    main()
