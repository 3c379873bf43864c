"""SOURCE is a folder of images (JPEG, PNG or WebP), each with a .txt of the same name, or a .csv, .tsv, .jsonl or
.parquet with a column of image paths (of parquet, also image bytes) and one of captions. Rows that cannot be used,
images of other formats among them, are listed in OUT/rejected.jsonl.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.text import counted
from data_pipelines.tools.console import print_reasons, progress_bar
from data_pipelines.tools.options import at_least

HELP = "turn a folder or a table of images and captions into shards"
EXAMPLES = ("captions.csv data/pairs/train --image-column path --caption-column text", "photos/ data/photos")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or table")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards and their manifest")
    parser.add_argument("--image-column", default="image", help="column of paths, absolute or relative to the table")
    parser.add_argument("--caption-column", default="caption", help="column of captions; the others become json")
    parser.add_argument(
        "--samples-per-shard", type=at_least(1), default=10_000, help="a shard of 10,000 is about 300 MB"
    )
    apart = "samples to set apart by a hash of the image, into OUT/heldout beside OUT/train"
    parser.add_argument("--heldout", type=at_least(1), metavar="NUMBER", help=apart)
    parser.add_argument("--label-column", help="column of classes, for OUT/heldout/prompts.json")


def run(options: Namespace) -> None:
    from data_pipelines.tools.pack import pack
    from data_pipelines.tools.pairs import read_pairs

    if options.label_column and not options.heldout:
        raise DataError("--label-column makes prompts.json for held-out samples: add --heldout, or leave it out.")
    pairs = read_pairs(options.source, options.image_column, options.caption_column)
    with progress_bar("packing", pairs.total, "rows") as advance:
        packed = pack(
            pairs,
            options.out,
            samples_per_shard=options.samples_per_shard,
            heldout=options.heldout or 0,
            label_column=options.label_column or "",
            on_row=advance,
        )
    folders = ("train", "heldout") if options.heldout else ("",)
    for folder, manifest in zip(folders, packed.manifests, strict=True):
        samples, shards = counted(manifest.samples, "sample"), counted(len(manifest.shards), "shard")
        print(f"{options.out / folder / 'manifest.json'}: {samples} in {shards}")
    for column, name in pairs.fields.items():
        if column != name:
            print(f"The column {column!r} is {name!r} in each sample's json, where {column!r} is what training reads")
    print_reasons(packed.rejected, f"rejected rows, listed in {options.out / 'rejected.jsonl'}")
