"""CSV, TSV, JSONL and parquet, row by row: a bad row is an error in its place, so that no row is lost.

Text is split by the standard library, since pyarrow's CSV reader drops quotation marks, takes all lines up to the next
one for a cell, and gives up a JSONL file for one bad line. Of parquet, which has no lines, pyarrow is the reader.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipelines.errors import DataError, SampleError, cannot_open
from data_pipelines.shards.sample import MAX_JSON_BYTES
from data_pipelines.text import counted, cut, open_text

Record = dict[str, object]
_Fields = Iterator[tuple[int, list[str] | SampleError]]  # with the number of the first line


@dataclass(frozen=True)
class Table:
    """Rows with named columns."""

    columns: list[str]
    num_rows: int
    records: Callable[[], Iterator[Record | SampleError]]


def read_table(path: Path) -> Table:
    """Opens a table by its extension, one of `READERS`. Text is read once to its end, to count the rows.

    Raises:
        DataError: It cannot be read, or its columns have no names of their own.
    """
    try:
        table = READERS[path.suffix.lower()](path)
    except UnicodeError:
        raise DataError(f"{path} is not UTF-8: convert it, as with `iconv -f WINDOWS-1252 -t UTF-8`.") from None
    except OSError as error:
        raise cannot_open(str(path), error) from None
    if not table.columns:
        raise DataError(f"{path} is empty: give a table whose first line names its columns.")
    if any("\0" in name for name in table.columns):
        raise DataError(f"{path} is not UTF-8 text, its header holds null bytes: try `iconv -f UTF-16LE -t UTF-8`.")
    if len(set(table.columns)) < len(table.columns):
        name, times = Counter(table.columns).most_common(1)[0]
        raise DataError(f"{path} has {times} columns of the name {cut(name)!r}: give each a name of its own.")
    return table


def _csv(path: Path) -> Table:
    csv.field_size_limit(MAX_JSON_BYTES)  # of a cell: bounds what an unclosed quotation mark takes in
    return _with_header(path, _csv_fields)


def _tsv(path: Path) -> Table:
    return _with_header(path, _tsv_fields)


def _with_header(path: Path, split: Callable[[Iterator[str]], _Fields]) -> Table:
    def rows() -> _Fields:
        with open_text(path) as file:
            yield from split(file)

    _, columns = next(rows(), (1, list[str]()))
    if isinstance(columns, SampleError):
        raise DataError(f"{path} has no header, since {columns}: give a table whose first line names its columns.")
    width = len(columns)

    def records() -> Iterator[Record | SampleError]:
        for line, fields in islice(rows(), 1, None):
            if isinstance(fields, SampleError):
                yield fields
            elif len(fields) != width:
                yield SampleError(f"line {line} has {counted(len(fields), 'field')}, the header {width}")
            else:
                yield dict(zip(columns, fields, strict=True))

    return Table(columns, sum(1 for _ in records()), records)


def _csv_fields(lines: Iterator[str]) -> _Fields:
    """Rows as RFC 4180 has them. Where a quotation mark has no partner, its line alone is lost, not all that follow."""
    again: list[str] = []  # lines to read once more, the next one last
    done = 0

    def taken() -> Iterator[str]:
        while (line := again.pop() if again else next(lines, None)) is not None:
            row.append(line)
            yield line

    while True:
        row: list[str] = []
        try:
            fields = next(csv.reader(taken(), strict=True, skipinitialspace=True), None)
        except csv.Error as error:
            fields = SampleError(f"line {done + 1} cannot be read as CSV: {error}")
            again.extend(reversed(row[1:]))
            del row[1:]
        if fields is None:
            return
        if fields:  # not an empty line
            yield done + 1, fields
        done += len(row)


def _tsv_fields(lines: Iterator[str]) -> _Fields:
    """Rows without quoting, as such files are: a quotation mark is one."""
    return ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(lines, 1) if line.strip("\r\n"))


def _jsonl(path: Path) -> Table:
    def records() -> Iterator[Record | SampleError]:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, number)

    columns: dict[str, None] = {}
    num_rows = 0
    for record in records():
        num_rows += 1
        if isinstance(record, dict):
            columns |= dict.fromkeys(record)
    if num_rows and not columns:
        raise DataError(f"No line of {path} is a JSON object: give one object of columns a line.")
    return Table(list(columns), num_rows, records)


class _RepeatedNameError(Exception):
    pass


def _parsed(line: str, number: int) -> Record | SampleError:
    try:
        record = json.loads(line, parse_constant=lambda _: None, object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        record = None
    except _RepeatedNameError as error:
        return SampleError(f"line {number} says {cut(str(error))!r} twice")
    return record if isinstance(record, dict) else SampleError(f"line {number} is not a JSON object")


def _once_each(pairs: list[tuple[str, object]]) -> Record:
    record: Record = {}
    for name, value in pairs:
        if name in record:
            raise _RepeatedNameError(name)
        record[name] = value
    return record


def _parquet(path: Path) -> Table:
    from pyarrow import ArrowException, RecordBatch, Scalar, parquet  # takes half a second

    broken = (ArrowException, OSError, ValueError)
    sentence = f"{path} cannot be read as parquet (%s): write it again, or give the table as .csv or .jsonl."

    def records() -> Iterator[Record | SampleError]:
        try:
            for batch in file.iter_batches(64):  # few, since images may lie in them
                yield from values(batch)
        except broken as error:
            raise DataError(sentence % type(error).__name__) from None

    def plain(value: Scalar) -> object:
        try:
            return value.as_py()
        except ValueError:  # a time to the nanosecond
            return value.cast("string").as_py()

    def values(batch: RecordBatch) -> Iterator[Record | SampleError]:
        for place in range(batch.num_rows):
            record: Record = {}
            for name, column in zip(file.schema_arrow.names, batch.columns, strict=True):
                try:
                    record[name] = plain(column[place])
                except Exception as error:  # text that is no UTF-8
                    yield SampleError(f"{cut(name)!r} cannot be read: {cut(str(error))}")
                    break
            else:
                yield record

    with path.open("rb"):  # an OSError here is not of what the file holds
        pass
    try:
        file = parquet.ParquetFile(path, pre_buffer=False)
    except broken as error:
        raise DataError(sentence % type(error).__name__) from None
    return Table(file.schema_arrow.names, file.metadata.num_rows, records)


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
