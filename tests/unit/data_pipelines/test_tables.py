"""Every row of a table is a record or an error in its place, whatever the file is like."""

import datetime
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipelines.errors import DataError, SampleError
from data_pipelines.tools.tables import read_table

A, B = {"image": "a.jpg", "caption": "a dog"}, {"image": "b.jpg", "caption": "a cat"}


def read(path: Path) -> list[object]:
    """Records, and errors as their sentences."""
    table = read_table(path)
    rows = [str(record) if isinstance(record, SampleError) else record for record in table.records()]
    assert len(rows) == table.num_rows
    return rows


CSV = {
    "plain": ("image,caption\na.jpg,a dog\nb.jpg,a cat\n", [A, B]),
    "no last line end": ("image,caption\na.jpg,a dog\nb.jpg,a cat", [A, B]),
    "CRLF": ("image,caption\r\na.jpg,a dog\r\nb.jpg,a cat\r\n", [A, B]),
    "CR alone": ("image,caption\ra.jpg,a dog\rb.jpg,a cat\r", [A, B]),
    "empty lines": ("\nimage,caption\n\na.jpg,a dog\n\n\nb.jpg,a cat\n\n", [A, B]),
    "blanks behind commas": ('image, caption\na.jpg, a dog\nb.jpg, "a cat"\n', [A, B]),
    "quoted comma": ('image,caption\na.jpg,"a dog, asleep"\nb.jpg,a cat\n', [A | {"caption": "a dog, asleep"}, B]),
    "quoted line end": ('image,caption\na.jpg,"a dog\nasleep"\nb.jpg,a cat\n', [A | {"caption": "a dog\nasleep"}, B]),
    "quoted quotes": ('image,caption\na.jpg,"a ""dog"""\nb.jpg,a cat\n', [A | {"caption": 'a "dog"'}, B]),
    "quotes within": ('image,caption\na.jpg,a "dog"\nb.jpg,a cat\n', [A | {"caption": 'a "dog"'}, B]),
    "header only": ("image,caption\n", []),
    "null byte": ("image,caption\na.jpg,a\0dog\nb.jpg,a cat\n", [A | {"caption": "a\0dog"}, B]),
    "more fields": ("image,caption\na.jpg,a dog, asleep\nb.jpg,a cat\n", ["line 2 has 3 fields, the header 2", B]),
    "fewer fields": ("image,caption\na.jpg\nb.jpg,a cat\n", ["line 2 has 1 field, the header 2", B]),
    "counted behind a row of lines": (
        'image,caption\na.jpg,"a\n\ndog"\nb.jpg\n',
        [A | {"caption": "a\n\ndog"}, "line 5 has 1 field, the header 2"],
    ),
    "quote without partner": (
        'image,caption\na.jpg,a dog\nb.jpg,"sign\nb.jpg,a cat\n',
        [A, "line 3 cannot be read as CSV: unexpected end of data", B],
    ),
    "quote whose partner is of another row": (
        'image,caption\na.jpg,"sign\nb.jpg,a cat\na.jpg,"a dog"\n',
        ["line 2 cannot be read as CSV: ',' expected after '\"'", B, A],
    ),
    "text behind a quote": (
        'image,caption\na.jpg,"Sunset" painting\nb.jpg,a cat\n',
        ["line 2 cannot be read as CSV: ',' expected after '\"'", B],
    ),
    "huge cell": (
        f'image,caption\nb.jpg,a cat\na.jpg,{"x" * (17 << 20)}\na.jpg,a dog\n',
        [B, "line 3 cannot be read as CSV: field larger than field limit (16777216)", A],
    ),
    "large cell": (f"image,caption\nb.jpg,{'x' * 2_000_000}\na.jpg,a dog\n", [B | {"caption": "x" * 2_000_000}, A]),
}  # fmt: skip


@pytest.mark.parametrize("case", CSV)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_row_of_csv_is_a_record_or_an_error_with_its_line(case: str, encoding: str, tmp_path: Path):
    content, rows = CSV[case]
    (tmp_path / "t.csv").write_bytes(content.encode(encoding))
    assert read(tmp_path / "t.csv") == rows


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('image\tcaption\na.jpg\t"a dog\nb.jpg\ta cat\n', [A | {"caption": '"a dog'}, B]),
        ('image\tcaption\r\na.jpg\t"a" dog, or\r\n\r\nb.jpg\ta cat', [A | {"caption": '"a" dog, or'}, B]),
        ("image\tcaption\na.jpg\ta\tdog\nb.jpg\ta cat\n", ["line 2 has 3 fields, the header 2", B]),
        ("image\tcaption\na.jpg\nb.jpg\ta cat\n", ["line 2 has 1 field, the header 2", B]),
        ("image\tcaption\na.jpg\t\nb.jpg\ta cat\n", [A | {"caption": ""}, B]),
        ("image\tcaption\n", []),
    ],
)
def test_a_tsv_has_no_quoting(content: str, rows: list[object], tmp_path: Path):
    (tmp_path / "t.tsv").write_bytes(content.encode())
    assert read(tmp_path / "t.tsv") == rows


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ('{"image": "a.jpg", "caption": "a dog"}', A),
        ('  {"caption": "a dog", "image": "a.jpg"}  ', A),
        *((line, "line 2 is not a JSON object") for line in ('{"image":', "[1]", "1", "null", '"a"', "a", "{} {}")),
        ("[" * 200_000, "line 2 is not a JSON object"),
        ('{"a": ' * 200_000, "line 2 is not a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "line 2 is not a JSON object"),
        ('{"image": "a", "image": "b"}', "line 2 says 'image' twice"),
        ('{"image": {"x": 1, "x": 2}}', "line 2 says 'x' twice"),
        ('{"' + "x" * 300 + '": 1, "' + "x" * 300 + '": 2}', f"line 2 says '{'x' * 200}...' twice"),
        ('{"image": "a.jpg", "caption": "a dog", "score": NaN}', A | {"score": None}),
        ('{"image": "a.jpg", "caption": "a dog", "score": -Infinity}', A | {"score": None}),
        ("{}", {}),
    ],
)  # fmt: skip
def test_a_line_of_jsonl_is_a_record_or_an_error_with_its_number(line: str, row: object, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text(f'\ufeff{{"image": "b.jpg", "caption": "a cat"}}\r\n{line}\n\n')
    assert read(tmp_path / "t.jsonl") == [B, row]


def test_the_columns_of_jsonl_are_those_of_all_its_lines(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"b": 1, "a": 2}\n')
    assert read_table(tmp_path / "t.jsonl").columns == ["a", "b"]


def test_a_cell_of_parquet_that_python_has_no_value_for_costs_its_row_alone(tmp_path: Path):
    offsets, letters = pyarrow.py_buffer(struct.pack("<4i", 0, 1, 2, 3)), pyarrow.py_buffer(b"a\xe9b")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, letters])
    table = pyarrow.table({"id": [1, 2, 3], "text": text})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", use_dictionary=False)
    first, second, third = read(tmp_path / "t.parquet")
    assert (first, third) == ({"id": 1, "text": "a"}, {"id": 3, "text": "b"})
    assert str(second).startswith("'text' cannot be read: 'utf-8' codec can't decode byte 0xe9")
    far = pyarrow.table({"when": pyarrow.array([1, 10**15], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(far, tmp_path / "t.parquet")
    first, second = read(tmp_path / "t.parquet")
    assert first == {"when": datetime.datetime(1970, 1, 1, 0, 0, 1)}
    assert str(second).startswith("'when' cannot be read: ")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (pyarrow.timestamp("ns"), "1970-01-01 00:00:00.000000001"),
        (pyarrow.duration("ns"), "1"),
        (pyarrow.time64("ns"), "00:00:00.000000001"),
    ],
)
def test_a_time_to_the_nanosecond_is_what_it_says_and_costs_no_row(kind: pyarrow.DataType, words: str, tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"at": pyarrow.array([1, None], kind)}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == [{"at": words}, {"at": None}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"image,caption\na.jpg,caf\xe9\n", "is not UTF-8: convert it, as with `iconv -f WINDOWS-1252"),
        ("t.tsv", b"image\tcaption\na.jpg\tcaf\xe9\n", "is not UTF-8: convert it, as with `iconv"),
        ("t.jsonl", b'{"image": "a", "caption": "caf\xe9"}\n', "is not UTF-8: convert it, as with `iconv"),
        ("t.csv", "image,caption\n".encode("utf-16-le"), "is not UTF-8 text, its header holds null bytes: try `iconv"),
        ("t.csv", "image,caption\n".encode("utf-16")[:-1], "is not UTF-8: convert it, as with `iconv"),
        ("t.csv", b"", "is empty: give a table whose first line names its columns."),
        ("t.csv", b"\n\n", "is empty: give a table whose first line names its columns."),
        ("t.tsv", b"", "is empty: give a table whose first line names its columns."),
        ("t.jsonl", b"", "is empty: give a table whose first line names its columns."),
        ("t.csv", b'"image,caption\na.jpg,a\n', "has no header, since line 1 cannot be read as CSV: unexpected end of"),
        ("t.csv", b"image,caption,caption\n", "has 2 columns of the name 'caption': give each a name of its own."),
        ("t.tsv", b"image\tcaption\timage\n", "has 2 columns of the name 'image': give each a name of its own."),
        ("t.jsonl", b"{\n[]\n", "is a JSON object: give one object of columns a line."),
        ("t.jsonl", b'[{"image": "a.jpg"}]', "is a JSON object: give one object of columns a line."),
        ("t.parquet", b"", "cannot be read as parquet (ArrowInvalid): write it again, or give the table as .csv or"),
        ("t.parquet", b"PAR1 and no more", "cannot be read as parquet (ArrowInvalid): write it again"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_the_fix(name: str, content: bytes, sentence: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_table(tmp_path / name)
    assert f"{tmp_path / name} {sentence}" in str(raised.value)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["image", "image"])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet has 2 columns of the name 'image': give each"):
        read_table(tmp_path / "t.parquet")
