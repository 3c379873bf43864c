"""What the command line shows: tables on stdout, reasons and progress on stderr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from data_pipelines.shards.tar import printable
from data_pipelines.storage.addresses import shown
from data_pipelines.text import counted

if TYPE_CHECKING:
    from data_pipelines.shards.problems import Problem

OUT, ERR = Console(), Console(stderr=True)
_MAX_ROWS = 20  # of a table of reasons


def print_census(content: dict[str, Any]) -> None:
    """What `Census.to_dict` says, as tables."""
    samples, shards = counted(content["samples"], "sample"), counted(content["shards"], "shard")
    print(f"{samples} in {shards} of {_short(content['bytes'])}B")
    table = Table()
    table.add_column("", no_wrap=True)
    measured = {name: value for name, value in content.items() if isinstance(value, dict) and "mean" in value}
    for name in next(iter(measured.values())):
        table.add_column(name, justify="right", no_wrap=True)
    for name, numbers in measured.items():
        table.add_row(name.replace("_", " "), *(_short(number).rstrip() for number in numbers.values()))
    OUT.print(table)
    for kind, numbers in content["duplicates"].items():
        print(f"{numbers['repeated']:,} {kind} equal an earlier one, in {numbers['groups']:,} groups")
    units = {"formats": "images", "scripts": "captions", "languages": "captions", "unusable": "samples"}
    for title, unit in units.items():
        print_counts(Counter(content[title]), title, unit)


def _short(number: float) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * unit:
            return f"{number / unit:.4g} {name}"
    return f"{number:.4g} "


def print_counts(counts: Counter[str], *titles: str) -> None:
    """The most frequent names of a counter as a table of two columns, if there are any."""
    if counts:
        table = Table(titles[0])
        table.add_column(titles[1], justify="right")
        for name, count in counts.most_common(_MAX_ROWS):
            table.add_row(Text(name), f"{count:,}")
        if len(counts) > _MAX_ROWS:
            table.add_row(f"{len(counts) - _MAX_ROWS:,} others", f"{sum(sorted(counts.values())[:-_MAX_ROWS]):,}")
        OUT.print(table)


def print_advice(problems: Sequence[Problem], advice: Callable[[str], str], to: Console) -> None:
    """What is known of single problems, and what helps against each reason."""
    lines: list[str] = []
    for problem in problems:
        if problem.detail or not problem.key:
            where = f"{printable(problem.key)} in {shown(problem.shard)}" if problem.key else shown(problem.shard)
            told = f"{problem.reason} ({problem.detail})" if problem.detail else problem.reason
            lines.append(f"{where}: {told}")
    if len(lines) > _MAX_ROWS:
        lines[_MAX_ROWS:] = [f"... and {len(lines) - _MAX_ROWS:,} others"]
    reasons = dict.fromkeys(problem.reason for problem in problems)
    for line in (*lines, *(f"{reason}: {fix}." for reason in reasons if (fix := advice(reason)))):
        to.print(Text(line), soft_wrap=True)


def print_reasons(reasons: Counter[str], title: str) -> None:
    """What was left out and why, beside the result on stdout."""
    if reasons:
        ERR.print(f"{title}:", soft_wrap=True, highlight=False)
        table = Table()
        table.add_column("reason")
        table.add_column("count", justify="right")
        for reason, count in reasons.most_common():
            table.add_row(Text(reason), f"{count:,}")
        ERR.print(table)


@contextmanager
def progress_bar(title: str, total: int | None, unit: str):
    """A bar that the function it gives moves on by one."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal) as progress:
        task = progress.add_task("", total=total)
        try:
            yield lambda: progress.advance(task)
        except BaseException:
            progress.live.transient = True  # an error stands alone, without an unfinished bar above it
            raise
