"""The command line: an index of anything webdataset writes, a tokenizer, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import Corpus, jpeg

from data_pipelines.__main__ import main
from data_pipelines.manifest import Manifest
from data_pipelines.shards import write_shard
from data_pipelines.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]


def test_index_writes_a_manifest_and_reports_what_it_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    samples = [{"__key__": "a", "jpg": jpeg(0), "txt": b"x"}, {"__key__": "b", "txt": b"x"}]
    write_shard(tmp_path / "0.tar", samples)
    manifest = tmp_path / "m.json"
    assert main(["index", str(tmp_path / "*.tar"), "-o", str(manifest)]) == 0
    out, error = capfd.readouterr()
    assert "m.json: 1 samples in 1 shards" in out
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


def test_an_error_is_one_line_without_a_traceback_and_exit_code_4(tmp_path: Path):
    command = [sys.executable, "-m", "data_pipelines", "index", str(tmp_path / "none"), "-o", str(tmp_path / "m.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 4
    assert run.stderr.startswith("No shards at")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["demo"], ["pack"], ["index"], ["tokenizer"]])
def test_help_is_there_for_every_command(command: list[str], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    assert leaving.value.code == 0
    assert "show this help" in capfd.readouterr().out


def test_light_modules_load_neither_torch_nor_opencv():
    light = (
        "data_pipelines",
        *(f"data_pipelines.{name}" for name in ("config", "errors", "manifest", "order", "index")),
    )
    code = f"import sys, {', '.join(light)}; print(sorted({{'torch', 'cv2'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
