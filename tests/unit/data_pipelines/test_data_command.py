"""The command line: an index of anything webdataset writes, a tokenizer, and errors in one line."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus import Corpus, Members, jpeg, make_corpus

from data_pipelines.__main__ import main, parser
from data_pipelines.commands import COMMANDS
from data_pipelines.samples.tokenizer import Tokenizer, export_tokenizer
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.writer import write_shard
from data_pipelines.storage.files import describe
from data_pipelines.stream import reader
from pretrain.model_config import SIZES

ROOT = Path(__file__).parents[3]


def test_index_writes_a_manifest_and_reports_what_it_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    samples = [{"__key__": "a", "jpg": jpeg(0), "txt": b"x"}, {"__key__": "b", "txt": b"x"}]
    write_shard(tmp_path / "0.tar", samples)
    manifest = tmp_path / "m.json"
    assert main(["index", str(tmp_path / "*.tar"), "-o", str(manifest)]) == 0
    out, error = capfd.readouterr()
    assert "m.json: 1 sample in 1 shard" in out
    assert "no image" in error
    report = (tmp_path / "m.dropped.jsonl").read_text()
    assert json.loads(report) == {"shard": str(tmp_path / "0.tar"), "key": "b", "reason": "no image"}
    assert Manifest.load(manifest).samples == 1


def test_tokenizer_trains_on_the_captions_of_a_manifest_and_exports(corpus: Corpus, tmp_path: Path):
    model, folder = tmp_path / "t.model", tmp_path / "hf"
    arguments = ["tokenizer", str(corpus.manifest), "-o", str(model), "--vocab-size", "50", "--export", str(folder)]
    assert main(arguments) == 0
    ours, theirs = Tokenizer.load(model), Tokenizer.load(folder)
    assert ours.encode("red circle", 9)[0].tolist() == theirs.encode("red circle", 9)[0].tolist()


def test_fewer_pieces_than_asked_for_and_captions_passed_over_are_told(
    tmp_path: Path, tokenizer_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    unreadable = {3: b'{"captions": [', 4: b'{"captions": ["%s"]}' % (b"x" * 100_000)}

    def spoil(index: int, members: Members) -> Members:
        return members | ({"json": unreadable[index]} if index in unreadable else {})

    spoilt, model = make_corpus(tmp_path, tokenizer_path, (12,), spoil), tmp_path / "t.model"
    assert main(["tokenizer", str(spoilt.manifest), "-o", str(model), "--vocab-size", "16000"]) == 0
    out, err = capfd.readouterr()
    assert re.search(
        r"t\.model: \d+ pieces\nFewer than the 16,000 asked for: every word of these captions is a piece", out
    )
    for words in ("captions passed over:", "json is not an object", "caption of 100,000 bytes is longer than 65,536"):
        assert words in err
    monkeypatch.setattr(reader, "MAX_TRAINING_CAPTIONS", 10)
    assert main(["coverage", str(model), str(spoilt.manifest)]) == 0
    out, err = capfd.readouterr()
    assert "10 of 12 captions were read, spread evenly" in out
    assert re.search(r"\d captions, of which are cut: 0\.00% at 24, 0\.00% at 32, 0\.00% at 64 tokens", out)
    assert "captions passed over:" in err


def test_coverage_looks_at_the_text_lengths_of_every_size():
    lengths = parser().parse_args(["coverage", "a", "b"]).text_length
    assert {size.length for size in SIZES.values()} < set(lengths)


def test_an_error_is_one_line_without_a_traceback_and_exit_code_4(tmp_path: Path):
    command = [sys.executable, "-m", "data_pipelines", "index", str(tmp_path / "none"), "-o", str(tmp_path / "m.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 4
    assert run.stderr.startswith("No shards at")
    assert run.stderr.count("\n") == 1


def test_every_file_of_the_folder_is_a_line_of_the_table_and_the_other_way_round():
    files = [path.stem for path in (ROOT / "data_pipelines/commands").glob("*.py") if path.stem != "__init__"]
    assert sorted(COMMANDS) == sorted(files)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_there_for_every_command(command: list[str], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    assert leaving.value.code == 0
    assert "show this help" in capfd.readouterr().out


def test_light_modules_load_neither_torch_nor_opencv():
    names = ("config", "errors", "__main__", "shards.manifest", "shards.index", "order.order")
    names += tuple(f"commands.{name}" for name in COMMANDS)
    light = [f"data_pipelines.{name}" for name in names]
    code = f"import sys, {', '.join(light)}; print(sorted({{'torch', 'cv2'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def index(folder: Path, *options: str) -> int:
    return main(["index", str(folder), "-o", str(folder / "m.json"), "--processes", "1", *options])


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of four samples that differ in what the options of `index` look at."""
    described = (
        ("a", 40, 90, "first words", {"lang": "en", "score": 0.5, "uid": f"{1:032x}"}),
        ("b", 40, 40, "first words", {"lang": "zh", "score": 0.1}),
        ("c", 20, 20, "other", {"lang": "de", "score": 0.3}),
        ("d", 40, 40, "", {}),
    )
    samples = [
        {"__key__": key, "jpg": jpeg(number, height, width), "txt": text.encode(), "json": json.dumps(fields).encode()}
        for number, (key, height, width, text, fields) in enumerate(described)
    ]
    write_shard(tmp_path / "0.tar", samples)
    np.save(tmp_path / "uids.npy", np.array([(0, 1)], dtype="u8,u8"))
    (tmp_path / "list.jsonl").write_text(json.dumps({"shard": "0.tar", "key": "b"}))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        *(([], "abc"), (["--min-size", "30"], "ab"), (["--max-aspect", "2"], "bc")),
        *((["--caption-characters", "6:"], "ab"), (["--caption-characters", ":5"], "c")),
        *((["--language", "lang=en,zh"], "ab"), (["--min-score", "score=0.3"], "ac")),
        *((["--uids", "uids.npy"], "a"), (["--unique", "caption"], "ac"), (["--exclude", "list.jsonl"], "ac")),
        (["--unique", "image", "--unique", "caption", "--min-size", "30"], "a"),
    ],
)
def test_every_option_of_index_keeps_what_it_says_and_faults_are_listed(
    shard: Path, options: list[str], kept: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(shard)
    assert index(shard, *options) == 0
    bits = Manifest.load(shard / "m.json").kept(0)
    assert bits is not None
    assert "".join("abcd"[number] for number in bits) == kept
    listed = [json.loads(line) for line in (shard / "m.dropped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in listed] == [("d", "empty caption")]
    assert "empty caption" in capfd.readouterr().err
    assert index(shard, *options) == 0
    assert "1 of these shards had been scanned before" in capfd.readouterr().out


def test_checksums_are_those_of_the_shards_and_come_only_when_asked_for(shard: Path):
    assert index(shard) == 0
    assert Manifest.load(shard / "m.json").shards[0].sha256 == ""
    shutil.rmtree(shard / "m.index")
    assert index(shard, "--checksums") == 0
    expected = hashlib.sha256((shard / "0.tar").read_bytes()).hexdigest()
    assert Manifest.load(shard / "m.json").shards[0].sha256 == expected


def test_a_server_that_does_not_answer_is_told_before_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the scan began")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("data_pipelines.shards.index.build_manifest", refuse)
    monkeypatch.setattr("data_pipelines.storage.files.describe", partial(describe, patience_s=0.2))
    monkeypatch.setattr("data_pipelines.storage.files._PROBE_S", 0.1)
    assert main(["index", "http://127.0.0.1:1/{0..9}.tar", "-o", str(tmp_path / "m.json")]) == 4
    assert capfd.readouterr().err.startswith("Shard http://127.0.0.1:1/0.tar cannot be opened: ")


def test_a_list_of_faults_does_not_outlive_them(shard: Path):
    index(shard)
    write_shard(shard / "0.tar", [{"__key__": "a", "jpg": jpeg(0), "txt": b"whole"}])
    index(shard)
    assert not (shard / "m.dropped.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--language", "en"], "write FIELD=VALUE, not 'en'"),
        (["--caption-characters", "a:b"], "write FEWEST:MOST, as in 5:1000, not 'a:b'"),
        (["--unique", "uid"], "invalid choice"),
        (["--min-score", "score=nan"], "give a number, not nan: no score is above or below it"),
        (["--min-score", "score=high"], "write FIELD=NUMBER, such as similarity=0.28, not 'high'"),
        (["--max-aspect", "wide"], "write a number such as 3, not 'wide'"),
        (["--max-aspect", "nan"], "give 1 or more, not nan: the longer side is never below the shorter"),
        (["--min-size", "-1"], "give a whole number of 0 or more, not -1"),
        (["--processes", "two"], "give a whole number of 1 or more, not two"),
        (["-o", "0.tar"], "give a name that ends in .json, not 0.tar"),
    ],
)
def test_an_option_that_is_written_otherwise_is_refused_with_an_example(
    shard: Path, options: list[str], words: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        index(shard, *options)
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        *((["demo", "d", "--train", "0"], 1), (["demo", "d", "--heldout", "0"], 1), (["demo", "d", "--size", "-3"], 1)),
        *((["pack", "a", "b", "--samples-per-shard", "0"], 1), (["reshard", "a", "--samples-per-shard", "-1"], 1)),
        *((["stats", "a", "--sample", "0"], 1), (["inspect", "a", "--samples", "0"], 1)),
        *((["tokenizer", "a", "--vocab-size", "5"], 6), (["coverage", "a", "b", "--text-length", "2"], 3)),
    ],
)
def test_a_number_that_is_too_small_is_refused_before_anything_is_read(
    arguments: list[str], least: int, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert f"give a whole number of {least} or more, not {arguments[-1]}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *(["demo", "FILE"], ["demo", "FILE/x"], ["pack", "PICTURES", "FILE"], ["pack", "PICTURES", "FILE/x"]),
        *(
            ["index", "SHARDS", "-o", "FILE/m.json"],
            ["index", "SHARDS", "-o", "FOLDER"],
            ["verify", "M", "-o", "FILE/x"],
        ),
        *(["stats", "M", "-o", "FOLDER"], ["inspect", "M", "-o", "FILE"], ["reshard", "M", "-o", "FILE"]),
        *(["tokenizer", "M", "--vocab-size", "50", "-o", name] for name in ("FOLDER", "FILE/x")),
        ["tokenizer", "M", "--vocab-size", "50", "-o", "FOLDER/t.model", "--export", "FILE"],
        ["adopt", "THEIRS", "-o", "FILE/x"],
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_in_one_sentence_by_every_command(
    command: list[str], corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    places = {"M": corpus.manifest, "SHARDS": corpus.folder, "PICTURES": tmp_path / "pictures"}
    places |= {"FILE": tmp_path / "file", "FOLDER": tmp_path / "a.json", "THEIRS": tmp_path / "theirs"}
    (tmp_path / "a.json").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "pictures" / "a.txt").write_text("words")
    if command[0] == "adopt":
        export_tokenizer(corpus.tokenizer, tmp_path / "theirs")
    arguments = [re.sub("^[A-Z]+", lambda found: str(places[found[0]]), argument) for argument in command]
    assert main(arguments) == 4
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.match(r"Cannot write .* \((Not a directory|File exists|Is a directory)\): name a .*\.$", said), said
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_whose_name_is_no_text_is_like_any_other(corpus: Corpus, tmp_path: Path):
    folder = tmp_path / "\udcff"
    shutil.copytree(corpus.folder, folder)
    for command in (
        ["index", folder, "-o", folder / "m.json"],
        ["inspect", folder / "m.json", "-o", folder / "report"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "data_pipelines", *command, "--processes", "1"],
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert rb"/\udcff/" in run.stdout
    assert r"/\udcff/m.json" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_whoever_reads_only_the_beginning_of_what_is_printed_sees_no_traceback(corpus: Corpus, tmp_path: Path):
    command = f"{sys.executable} -m data_pipelines stats {corpus.manifest} -o {tmp_path}/s.json --processes 1"
    code = ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"]
    run = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "141\n"
    assert "Error" not in run.stderr


def test_filters_and_counts_of_others_do_not_go_together(shard: Path, capfd: pytest.CaptureFixture[str]):
    assert index(shard, "--trust-stats", "--min-size", "30") == 4
    assert capfd.readouterr().err == (
        "--trust-stats reads no sample, so that neither filters nor --checksums can be applied: leave it or them out.\n"
    )


def test_an_adopted_tokenizer_is_measured_on_a_manifest(
    corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    export_tokenizer(corpus.tokenizer, tmp_path / "theirs")
    assert main(["adopt", str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 0
    assert "no token was added" in capfd.readouterr().out
    assert main(["coverage", str(tmp_path / "ours"), str(corpus.manifest), "--text-length", "12"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"164 captions, of which are cut: \d+\.\d\d% at 12 tokens", out)
    assert "pieces per word" in out


@pytest.mark.parametrize("command", ["verify", "stats", "inspect", "reshard"])
def test_a_tool_with_nothing_to_read_says_so_in_one_sentence(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for source, words in ((tmp_path / "none.json", "There is no manifest at"), (tmp_path / "none", "No shards at")):
        assert main([command, str(source), "-o", str(tmp_path / "out")]) == 4
        error = capfd.readouterr().err
        assert error.startswith(words)
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
