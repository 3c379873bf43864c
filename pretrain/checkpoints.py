"""`python -m pretrain checkpoints`: lists a run's checkpoints, verifies, prunes, pins and compares them.

Looking, pinning and comparing go beside a live run. Pruning takes the run's lease, so that no job owns the folder
meanwhile.
"""

import math
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from pretrain.checkpoint import manifest
from pretrain.checkpoint.folder import QUARANTINE, contents, leftovers, name_of, temporary_name
from pretrain.checkpoint.fragments import read_whole
from pretrain.checkpoint.identity import changes
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.retention import Keep, is_pinned, pin, read_scores, unpin
from pretrain.checkpoint.verify import glance, read_run, verify
from pretrain.errors import CheckpointError, ConfigError
from pretrain.lease import take
from pretrain.parallel.mesh import ALONE
from pretrain.screen import say

_BATCH = 2**28  # elements that are compared at a time
_MOST_SHOWN = 30  # parameters


class Row(NamedTuple):
    """A checkpoint as the list shows it."""

    step: int
    size: str
    layout: str
    saved: str
    stays: str
    """Why, whatever comes after it."""
    problem: str | None


def main(arguments: Namespace) -> None:
    """What the command line asks for.

    Raises:
        UserError: it cannot be done, or a checkpoint is not valid.
    """
    if arguments.keep is not None and (arguments.keep < 1 or not arguments.prune):
        raise ConfigError(f"--keep {arguments.keep} is for --prune, and 1 or more.")
    if arguments.prune:
        prune(arguments.run_folder, arguments.keep)
    elif arguments.diff:
        compare(arguments.run_folder, *arguments.diff)
    elif arguments.pin is not None:
        set_pin(arguments.run_folder, arguments.pin, pinned=True)
    elif arguments.unpin is not None:
        set_pin(arguments.run_folder, arguments.unpin, pinned=False)
    else:
        show(arguments.run_folder, thoroughly=arguments.verify)


def show(run: Path, *, thoroughly: bool) -> None:
    """Prints the checkpoints of a run, and what else lies among them.

    Args:
        run: its output folder.
        thoroughly: hash every byte instead of comparing sizes.

    Raises:
        CheckpointError: there is none, or one of them is not valid.
    """
    folder = run / "checkpoints"
    steps, others = _contents(folder)
    check: Callable[[Path], str | None] = (lambda path: verify(path, ALONE)) if thoroughly else glance
    best = _best(folder, steps)
    rows = [_row(folder / name_of(step), step, "best" if step == best else "", check) for step in steps]
    table = Table()
    for heading in ("step", "size", "layout", "saved", "", "verified" if thoroughly else "valid"):
        table.add_column(heading, justify="right" if heading in ("step", "size") else "left")
    for row in rows:
        table.add_row(f"{row.step:,}", *row[1:5], row.problem or "yes", style="red" if row.problem else None)
    with suppress(OSError):
        Console().print(table)
    for reason in sorted((folder / QUARANTINE).glob("*.reason.txt")):
        with suppress(OSError):
            text = reason.read_text(encoding="utf-8", errors="replace")
            say(f"In quarantine: {reason.name.removesuffix('.reason.txt')} {' '.join(text.split())}.")
    if others:
        say(f"No checkpoints of this run: {', '.join(others)}.")
    if unfinished := leftovers(folder):
        say(f"Being written or removed, or left over from that: {', '.join(path.name for path in unfinished)}.")
    if not thoroughly:
        say("Sizes and descriptions were compared; --verify hashes every byte.")
    if bad := [row.step for row in rows if row.problem]:
        raise CheckpointError(
            f"Not valid: {', '.join(map(name_of, bad))}. A start passes over them, and moves them to {QUARANTINE}."
        )


def prune(run: Path, newest: int | None) -> None:
    """Removes what the run's own rule would not keep.

    Args:
        run: its output folder.
        newest: how many of the newest stay; None: `checkpoint.keep` of the run.

    Raises:
        StorageError: a job uses the folder.
        CheckpointError: there is no checkpoint, or the newest is not valid.
    """
    folder = run / "checkpoints"
    steps, _ = _contents(folder)
    last = folder / name_of(steps[-1])
    if problem := verify(last, ALONE):
        raise CheckpointError(f"Nothing is removed, because the newest checkpoint, {last}, is not valid ({problem}).")
    keep = _rule(last, newest)
    lease = take(run)
    try:
        pinned = [step for step in steps if is_pinned(folder / name_of(step))]
        superfluous = keep.superfluous(steps, read_scores(folder, keep.best), pinned)
        for step in superfluous:
            lease.check()
            leaving = (folder / name_of(step)).rename(folder / temporary_name(step))
            shutil.rmtree(leaving, ignore_errors=True)
        say(f"Removed {', '.join(map(name_of, superfluous)) or 'nothing'}; {len(steps) - len(superfluous)} stay.")
    finally:
        lease.release()


def set_pin(run: Path, step: int, *, pinned: bool) -> None:
    """Lets a checkpoint stay whatever comes after it, or no longer.

    Raises:
        CheckpointError: there is none of that step.
    """
    checkpoint = _of_step(run / "checkpoints", step)
    with suppress(FileNotFoundError):  # a live run removes it
        (pin if pinned else unpin)(checkpoint)
    _of_step(run / "checkpoints", step)
    say(f"{checkpoint.name} {'stays until it is unpinned' if pinned else 'is no longer pinned'}.")


def compare(run: Path, a: str, b: str) -> None:
    """Prints in what two checkpoints differ: their weights, and the configs that they were saved with.

    Args:
        run: the output folder of the run that steps are of.
        a: a step, or a checkpoint's folder.
        b: the other one.

    Raises:
        CheckpointError: one of them is not there, or not valid.
    """
    paths = [_named(run, word) for word in (a, b)]
    for path in paths:
        if problem := glance(path):
            raise CheckpointError(f"The checkpoint {path} is not valid: {problem}.")
    for line in differences(*paths):
        say(line)


def differences(a: Path, b: Path) -> Iterator[str]:
    """In lines: parameters that only one of them has, or that have other shapes or values; then the configs."""
    first, second = ({n: tuple(p.shape) for n, p in Index.open(path).parameters.items()} for path in (a, b))
    for names, path in ((first.keys() - second.keys(), a), (second.keys() - first.keys(), b)):
        if names:
            yield f"Only in {path}: {', '.join(sorted(names))}."
    both = sorted(first.keys() & second.keys())
    for name in both:
        if first[name] != second[name]:
            yield f"{name}: {' x '.join(map(str, first[name]))} -> {' x '.join(map(str, second[name]))}"
    same = {name: first[name] for name in both if first[name] == second[name]}
    largest: dict[str, float] = {}
    for shapes in _batches(same):
        here, there = read_whole(a, shapes), read_whole(b, shapes)
        largest |= {name: float((here[name] - there[name]).abs().max()) for name in shapes}
    differing = sorted((name for name in same if largest[name] != 0), key=lambda name: -largest[name])  # NaN differs
    yield f"{len(differing)} of {len(same)} parameters of the same shape differ{':' if differing else '.'}"
    for name in differing[:_MOST_SHOWN]:
        yield f"  {name}: by {largest[name]:.3e} at most"
    if len(differing) > _MOST_SHOWN:
        yield f"  and {len(differing) - _MOST_SHOWN} by less"
    configs = [read_run(path)["config"] for path in (a, b)]
    if changed := list(changes(*configs)):
        yield f"Config: {'; '.join(changed)}."


def _batches(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    batch: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if batch and sum(map(math.prod, batch.values())) + math.prod(shape) > _BATCH:
            yield batch
            batch = {}
        batch[name] = shape
    if batch:
        yield batch


def _row(checkpoint: Path, step: int, stays: str, check: Callable[[Path], str | None]) -> Row:
    size = layout = saved = ""
    with suppress(OSError):
        size = f"{sum(file.stat().st_size for file in checkpoint.iterdir()) / 2**20:,.1f} MiB"
        saved = time.strftime("%F %T", time.localtime((checkpoint / manifest.RUN).stat().st_mtime))
    with suppress(OSError, ValueError, KeyError, TypeError):
        ranks = read_run(checkpoint)["layout"]
        layout = "dp {dp} x tp {tp} x pp {pp}, ZeRO {zero_stage}".format_map(ranks)
    if is_pinned(checkpoint):
        stays = f"{stays} pinned".strip()
    return Row(step, size, layout, saved, stays, check(checkpoint))


def _rule(checkpoint: Path, newest: int | None = None) -> Keep:
    """What the run that saved a checkpoint keeps."""
    settings = read_run(checkpoint)["config"]["checkpoint"]
    return Keep(newest or settings["keep"], settings["keep_every"], settings["best"])


def _best(folder: Path, steps: Sequence[int]) -> int | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # the newest may be damaged
        rule = _rule(folder / name_of(steps[-1]))
        return rule.best_of(steps, read_scores(folder, rule.best))
    return None


def _contents(folder: Path) -> tuple[list[int], list[str]]:
    steps, others = contents(folder)
    if not steps:
        raise CheckpointError(f"No checkpoint in {folder}: give the output folder of a run that has saved one.")
    return steps, others


def _of_step(folder: Path, step: int) -> Path:
    steps, _ = _contents(folder)
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"No checkpoint of step {step} in {folder}: those there are of {there}.")
    return folder / name_of(step)


def _named(run: Path, word: str) -> Path:
    return _of_step(run / "checkpoints", int(word)) if re.fullmatch(r"\d+", word) else Path(word)
