"""The captions that a tokenizer is trained or measured on."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.shards.manifest import Manifest
from data_pipelines.stream import reader
from data_pipelines.tools.console import print_reasons, progress_bar


@contextmanager
def read_captions(path: Path) -> Iterator[Iterator[str]]:
    """The captions of a manifest, behind a bar; what is passed over is told afterwards."""
    manifest, bad = Manifest.load(path), Counter[str]()
    total = min(manifest.samples, reader.MAX_TRAINING_CAPTIONS)
    with progress_bar("reading captions", total, "captions") as advance:

        def captions() -> Iterator[str]:
            for caption in reader.iter_captions(manifest, bad, total):
                advance()
                yield caption

        yield captions()
    if total < manifest.samples:
        print(f"{total:,} of {manifest.samples:,} captions were read, spread evenly: more change little.")
    print_reasons(bad, "captions passed over")
