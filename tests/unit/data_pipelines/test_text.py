"""Text is read, and JSON written, in one way everywhere."""

import ast
import json
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from data_pipelines.text import counted, cut, decode_text, number_of, open_text, to_json

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_utf_8_and_utf_16_with_its_mark_are_read_alike_from_bytes_and_files(encoding: str, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("一只猫,\r\na café\n".encode(encoding))
    with open_text(tmp_path / "a.txt") as file:
        assert list(file) == ["一只猫,\r\n", "a café\n"]
    assert decode_text((tmp_path / "a.txt").read_bytes()) == "一只猫,\r\na café\n"


@pytest.mark.parametrize("raw", ["café".encode("latin-1"), "一只猫坐在沙发上".encode("gbk"), b"\xff\xfea", b"\x80"])
def test_what_is_neither_is_refused(raw: bytes):
    with pytest.raises(UnicodeDecodeError):
        decode_text(raw)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": math.nan, "b": [math.inf, (-math.inf, 1.5)]}, '{"a": null, "b": [null, [null, 1.5]]}'),
        ({"a": b"\xff\x00"}, '{"a": "/wA="}'),
        ({"a": b"\xff", "b": math.nan}, '{"a": "/w==", "b": null}'),
        ({"a": date(2024, 1, 2)}, '{"a": "2024-01-02"}'),
        ({"a": datetime(2024, 1, 2, tzinfo=UTC)}, '{"a": "2024-01-02 00:00:00+00:00"}'),
        ({"a": Decimal("0.30")}, '{"a": "0.30"}'),
        ({"é": "half \ud83d"}, '{"é": "half \\ud83d"}'),
        ({"a": 10**30, "b": True}, f'{{"a": {10**30}, "b": true}}'),
    ],
)
def test_json_is_what_rfc_8259_allows(content: object, text: str):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert to_json(content) == text
    assert isinstance(json.loads(to_json(content).encode(), parse_constant=refuse), dict)


def test_what_has_no_form_in_json_is_not_written_as_its_name():
    with pytest.raises(TypeError, match="Path has no form in JSON"):
        to_json({"a": Path("b")})


@pytest.mark.parametrize(
    "path", [path for package in ("data_pipelines", "pretrain", "launch") for path in (ROOT / package).rglob("*.py")]
)
def test_json_is_written_by_to_json_or_refuses_what_is_none(path: Path):
    if path.name == "text.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("dump", "dumps"):
            written = ast.unparse(node)
            assert not written.startswith("json.") or "allow_nan=False" in written, written


def test_numeric_strings_are_numbers_and_true_is_none():
    assert [number_of(value) for value in (1, 0.5, " 2.5 ", "-1e3")] == [1, 0.5, 2.5, -1000]
    for value in (True, None, "", "a", "1,5", "1_0", "inf", math.inf, 10**400, [1], b"1"):
        assert math.isnan(number_of(value))


def test_long_texts_are_cut_and_things_counted():
    assert cut("a" * 200) == "a" * 200
    assert cut("a" * 201) == "a" * 200 + "..."
    assert [counted(number, "shard") for number in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]
