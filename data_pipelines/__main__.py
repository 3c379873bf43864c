"""`python -m data_pipelines`: make, index and look after the data of a run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.table import Table

from data_pipelines.errors import DataError, UserError, cannot_write
from data_pipelines.text import counted, to_json
from data_pipelines.tools.command_line import parser
from data_pipelines.tools.console import ERR, OUT, print_advice, print_census, print_counts, print_reasons, progress_bar

if TYPE_CHECKING:
    from data_pipelines.tools.sources import Part


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, the user's error's, 130 after Ctrl-C, or 141 if nobody reads on."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    options = parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail at exit
        return 141
    except OSError as error:  # what is read has said so in words of its own
        error = cannot_write(str(error.filename or "the result"), error)
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> None:
    from data_pipelines.demo.corpus import Demo

    demo = Demo(options.train, options.heldout, options.size, options.vocab_size, options.seed)
    if demo.is_complete(options.out):
        print(f"{options.out} is already complete.")
        return
    with progress_bar("drawing scenes", demo.num_shards, "shards") as advance:
        demo.make(options.out, processes=len(os.sched_getaffinity(0)), on_shard=advance)
    print(f"{options.out}: {options.train:,} training and {options.heldout:,} held-out samples, tokenizer.model")


def _pack(options: argparse.Namespace) -> None:
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


def _index(options: argparse.Namespace) -> None:
    from data_pipelines.shards.filters import Filters
    from data_pipelines.shards.index import build_manifest, count_from_stats
    from data_pipelines.shards.problems import advice, write_problems
    from data_pipelines.shards.tar import printable
    from data_pipelines.storage.files import describe, expand, is_remote, shown

    shards = expand(options.shards)
    if is_remote(shards[0]):
        describe(shards[0])  # tells of a mistyped server in 30 s, where a scan has patience for five minutes
    listing = options.output.with_name(f"{options.output.stem}.dropped.jsonl")
    listing.unlink(missing_ok=True)
    filters = _filters(options)
    if options.trust_stats and (filters != Filters() or options.checksums):
        raise DataError(
            "--trust-stats reads no sample, so that neither filters nor --checksums can be applied: leave it or "
            "them out."
        )
    if options.trust_stats:
        with progress_bar("reading counts", len(shards), "shards") as advance:
            manifest = count_from_stats(shards, options.output, on_shard=advance)
        manifest.save()
        number = counted(manifest.samples, "sample")
        print(f"{options.output}: {number} in {counted(len(shards), 'shard')}, as their makers counted")
        return
    with progress_bar("reading shards", len(shards), "shards") as advance:
        manifest, report = build_manifest(
            shards,
            options.output,
            filters=filters,
            checksums=options.checksums,
            processes=options.processes,
            on_shard=advance,
        )
    faults = report.faults + report.replaced
    if faults:
        write_problems(listing, faults)
    if options.strict and report.broken:
        print_advice(report.broken, advice, ERR)
        raise DataError(
            f"{counted(len(report.broken), 'shard')} of {len(shards):,} are not whole or not what they were, listed in "
            f"{listing}: no manifest was written. Mend them, leave them out, or index without --strict."
        )
    manifest.save()
    print(f"{options.output}: {counted(manifest.samples, 'sample')} in {counted(len(manifest.shards), 'shard')}")
    if report.reused:
        print(f"{report.reused:,} of these shards had been scanned before")
    if report.left_out:
        print(f"{counted(len(report.left_out), 'shard')} left out, which {options.exclude} lists as a whole")
    print_reasons(Counter(fault.reason for fault in faults), f"left out with a fault, listed in {listing}")
    print_advice(faults, advice, ERR)
    print_reasons(report.filtered, "samples filtered out")
    if report.unmatched:
        shard, key = report.unmatched[0]
        what = f"{printable(key)} in {shown(shard)}" if key else shown(shard)
        print(
            f"{len(report.unmatched):,} of the entries of {options.exclude} are not in these shards; the first is "
            f"{what}: see that the list is of the same data.",
            file=sys.stderr,
        )


def _filters(options: argparse.Namespace):
    from data_pipelines.shards.filters import Filters

    language = options.language
    return Filters(
        min_size=options.min_size,
        max_aspect=options.max_aspect,
        caption_characters=options.caption_characters,
        language=(language[0], frozenset(language[1].split(","))) if language else None,
        min_score=options.min_score,
        uids=options.uids,
        unique=frozenset(options.unique),
        exclude=options.exclude,
    )


def _verify(options: argparse.Namespace) -> int:
    from data_pipelines.shards.problems import advice, write_problems
    from data_pipelines.tools.sources import name_sources
    from data_pipelines.tools.verify import verify

    part = _part(options)
    sources = part.of(name_sources(options.sources))
    first = Path(options.sources[0])
    listing = options.output or (
        first.with_name(f"{first.stem}.problems.jsonl") if first.suffix == ".json" else Path("problems.jsonl")
    )
    listing = _of_part(listing, part)
    start = time.perf_counter()
    with progress_bar("verifying", len(sources), "shards") as advance:
        found = verify(sources, processes=options.processes, on_shard=advance)
    passed_s = time.perf_counter() - start
    write_problems(listing, found.problems)
    speed = f"{found.samples / passed_s:,.0f} samples/s, {found.bytes / passed_s / 1e6:,.0f} MB/s"
    read = f"{counted(found.samples, 'sample')} in {counted(found.shards, 'shard')}"
    print(f"{read}: {counted(len(found.problems), 'problem')} ({speed})")
    if found.left_out:
        print(f"{counted(found.left_out, 'sample')} that the manifest leaves out were not read")
    if found.without_sum:
        print(
            f"{counted(found.without_sum, 'shard')} without a checksum to compare with: what still decodes is taken as "
            f"right; `index --checksums` keeps them."
        )
    if not found.problems:
        return 0
    print_counts(Counter(problem.reason for problem in found.problems), "reason", "problems")
    print_advice(found.problems, advice, OUT)
    print(f"{listing} lists them. `python -m data_pipelines index ... --exclude {listing}` leaves out the samples")
    print("that it names, and as a whole each shard that it lists without a key.")
    return 4


def _stats(options: argparse.Namespace) -> None:
    from data_pipelines.shards.manifest import write_atomically
    from data_pipelines.tools.census import merge_parts, take_census
    from data_pipelines.tools.sources import WHOLE, load_sources, name_sources

    part = _part(options)
    if options.merge:
        census = merge_parts(options.merge)
    else:
        with TemporaryDirectory() as scratch:
            if options.sample is None:
                sources = name_sources(options.sources)
            else:
                sources = load_sources(options.sources, Path(scratch), processes=options.processes)
            with progress_bar("counting", len(part.of(sources)), "shards") as advance:
                census = take_census(
                    sources,
                    limit=options.sample,
                    language_field=options.language_field,
                    part=part,
                    processes=options.processes,
                    on_shard=advance,
                )
    if part != WHOLE:
        path = _of_part(options.output.with_suffix(".npz"), part)
        census.save_part(path, part)
        print(f"{path}: {census.samples:,} samples; add the parts up with `python -m data_pipelines stats --merge`")
        return
    content = census.to_dict()
    write_atomically(options.output, lambda tmp: tmp.write_text(to_json(content, indent=2) + "\n", encoding="utf-8"))
    print_census(content)
    print(f"{options.output}: the same as JSON")


def _inspect(options: argparse.Namespace) -> None:
    from data_pipelines.shards.manifest import write_atomically
    from data_pipelines.tools.inspection import inspect
    from data_pipelines.tools.report import html_report
    from data_pipelines.tools.sources import load_sources

    with TemporaryDirectory() as scratch:
        sources = load_sources(options.sources, Path(scratch), processes=options.processes)
        with progress_bar("counting", len(sources), "shards") as advance:
            found = inspect(
                options.sources,
                sources,
                samples=options.samples,
                seed=options.seed,
                processes=options.processes,
                on_shard=advance,
            )
    page, html = options.output / "report.html", html_report(found)
    write_atomically(page, lambda tmp: tmp.write_text(html, encoding="utf-8", errors="backslashreplace"))
    print(f"{page}: {len(found.pictures):,} of {counted(found.total, 'sample')}")
    print(f"one core decodes {found.samples_per_s:,.0f} samples/s, {found.mb_per_s:,.1f} MB/s")
    print_counts(found.census.unusable, "unusable", "samples")


def _reshard(options: argparse.Namespace) -> None:
    from data_pipelines.shards.index import build_manifest
    from data_pipelines.tools.reshard import Resharding
    from data_pipelines.tools.sources import WHOLE, load_sources

    part, folder, manifest = _part(options), options.output, options.output / "manifest.json"
    with TemporaryDirectory() as scratch:
        sources = load_sources(options.sources, Path(scratch), processes=options.processes)
        job = Resharding(tuple(sources), folder, options.samples_per_shard, options.seed)
        job.start()
        ours = part.of(range(job.num_shards))
        with progress_bar("writing", len(ours), "shards") as advance:
            written = job.write(part=part, processes=options.processes, on_shard=advance)
    table = Table("", "samples", "shards")
    table.add_row("sources", f"{job.samples:,}", f"{len(sources):,}")
    table.add_row(str(folder), f"{job.samples:,}", f"{job.num_shards:,}")
    OUT.print(table)
    print(f"{written:,} of {len(ours):,} shards were written, the others were there")
    if part == WHOLE:
        shards = [job.path(shard) for shard in range(job.num_shards)]
        made, _ = build_manifest(shards, manifest, processes=options.processes)
        made.save()
        print(f"{manifest}: {counted(made.samples, 'sample')} in {counted(len(shards), 'shard')}")
    else:
        print(f"When all parts are done: python -m data_pipelines index {folder} -o {manifest}")


def _part(options: argparse.Namespace):
    from data_pipelines.tools.sources import WHOLE, Part

    return Part.parse(options.shard) if options.shard else WHOLE


def _of_part(path: Path, part: Part) -> Path:
    return path if part.count == 1 else path.with_name(f"{path.stem}.{part.name}{path.suffix}")


def _tokenizer(options: argparse.Namespace) -> None:
    from data_pipelines.samples.tokenizer import SentencePieceTokenizer, export_tokenizer, train_sentencepiece

    with _captions(options.manifest) as captions:
        train_sentencepiece(captions, options.output, options.vocab_size)
    pieces = SentencePieceTokenizer(options.output).vocab_size
    print(f"{options.output}: {pieces:,} pieces")
    if pieces < options.vocab_size:
        print(
            f"Fewer than the {options.vocab_size:,} asked for: every word of these captions is a piece by now, or some "
            f"pieces of 16 characters, the longest there are. Only more captions make more pieces."
        )
    if options.export:
        export_tokenizer(options.output, options.export)
        print(f"{options.export}: the same as a Hugging Face tokenizer")


@contextmanager
def _captions(path: Path) -> Iterator[Iterator[str]]:
    """The captions of a manifest, behind a bar; what is passed over is told afterwards."""
    from data_pipelines.shards.manifest import Manifest
    from data_pipelines.stream.reader import MAX_TRAINING_CAPTIONS, iter_captions

    manifest, bad = Manifest.load(path), Counter[str]()
    total = min(manifest.samples, MAX_TRAINING_CAPTIONS)
    with progress_bar("reading captions", total, "captions") as advance:

        def captions() -> Iterator[str]:
            for caption in iter_captions(manifest, bad, total):
                advance()
                yield caption

        yield captions()
    if total < manifest.samples:
        print(f"{total:,} of {manifest.samples:,} captions were read, spread evenly: more change little.")
    print_reasons(bad, "captions passed over")


def _adopt(options: argparse.Namespace) -> None:
    from data_pipelines.samples.tokenizer import Tokenizer, adopt_tokenizer

    added = adopt_tokenizer(options.folder, options.output)
    size = Tokenizer.load(options.output).vocab_size
    print(f"{options.output}: {size:,} pieces; {', '.join(added) if added else 'no token'} was added")


def _coverage(options: argparse.Namespace) -> None:
    from data_pipelines.samples.tokenizer import Tokenizer
    from data_pipelines.tools.coverage import coverage

    tokenizer = Tokenizer.load(options.tokenizer)
    with _captions(options.manifest) as captions:
        found = coverage(tokenizer, captions, options.text_length)
    cut = [f"{share:.2%} at {most}" for share, most in zip(found.cut_shares, options.text_length, strict=True)]
    print(f"{found.captions:,} captions, of which are cut: {', '.join(cut)} tokens")
    table = Table("pieces per caption", "mean", "median", "p95", "p99", "most")
    lengths = (found.median_pieces, found.p95_pieces, found.p99_pieces, found.max_pieces)
    table.add_row("", f"{found.mean_pieces:.1f}", *map(str, lengths))
    OUT.print(table)
    for what, pieces in (
        ("word", found.pieces_per_word),
        ("letter of scripts without spaces", found.pieces_per_unspaced_letter),
    ):
        if pieces is not None:
            print(f"{pieces:.2f} pieces per {what}")
    print(f"{found.unknown_share:.3%} of the pieces are unknown; {found.vocabulary_share:.1%} of the vocabulary occurs")
    print_counts(Counter(dict(found.unknown_characters)), "unknown character", "times")


_COMMANDS = {
    "demo": _demo,
    "pack": _pack,
    "index": _index,
    "verify": _verify,
    "stats": _stats,
    "inspect": _inspect,
    "reshard": _reshard,
    "tokenizer": _tokenizer,
    "adopt": _adopt,
    "coverage": _coverage,
}


if __name__ == "__main__":
    sys.exit(main())
