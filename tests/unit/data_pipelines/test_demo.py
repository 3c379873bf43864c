"""The demonstration corpus says only what its pictures show, and holds out what it says it holds out."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.__main__ import main
from data_pipelines.demo.corpus import Demo
from data_pipelines.demo.scenes import (
    COLOURS,
    DRAWING,
    INVERSE,
    RELATIONS,
    SHAPES,
    Scene,
    caption_of,
    look_pairs,
    picture_of,
)
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.shards.manifest import Manifest
from data_pipelines.stream.reader import Sample, ShardReader

SETTINGS = ["--train", "1100", "--heldout", "40", "--size", "48"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", str(folder), *SETTINGS]) == 0
    return folder


def samples(folder: Path) -> list[Sample]:
    manifest = Manifest.load(folder / "manifest.json")
    reader = ShardReader(manifest)
    return [reader.read(s, i) for s, shard in enumerate(manifest.shards) for i in range(shard.samples)]


def test_it_holds_what_was_asked_for(demo: Path):
    assert [shard.samples for shard in Manifest.load(demo / "train" / "manifest.json").shards] == [1000, 100]
    assert Manifest.load(demo / "heldout" / "manifest.json").samples == 40
    assert Image.open(io.BytesIO(samples(demo / "heldout")[0].image)).size == (48, 48)
    tokenizer = Tokenizer.load(demo / "tokenizer.model")
    assert all(tokenizer.unk_id not in tokenizer.pieces(s.caption())[0] for s in samples(demo / "heldout"))


def test_a_second_call_does_nothing_and_says_so_in_one_line(demo: Path, capfd: pytest.CaptureFixture[str]):
    before = (demo / "demo.json").stat().st_mtime_ns
    assert main(["demo", str(demo), *SETTINGS]) == 0
    out, error = capfd.readouterr()
    assert out == f"{demo} is already complete.\n"
    assert error == ""
    assert (demo / "demo.json").stat().st_mtime_ns == before


def test_another_demo_in_the_same_folder_is_refused(demo: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["demo", str(demo), *SETTINGS, "--seed", "5"]) == 4
    error = capfd.readouterr().err
    assert "'seed': 0" in error
    assert "'seed': 5" in error
    assert "remove it, or name another" in error


def test_a_demo_of_another_drawing_is_not_complete(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("data_pipelines.demo.corpus.DRAWING", DRAWING + 1)
    assert main(["demo", str(demo), *SETTINGS]) == 4
    error = capfd.readouterr().err
    assert f"'drawing': {DRAWING}}}, not a demo of" in error
    assert f"'drawing': {DRAWING + 1}}}: remove it, or name another" in error


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_record_that_cannot_be_read_is_named_with_the_fix(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "demo.json").write_bytes(content)
    assert main(["demo", str(tmp_path), *SETTINGS]) == 4
    error = capfd.readouterr().err
    assert error.startswith(f"{tmp_path / 'demo.json'} cannot be read (")
    assert error.endswith(f": remove {tmp_path}, or name another.\n")


def test_the_same_seed_gives_the_same_bytes(demo: Path, tmp_path: Path):
    assert main(["demo", str(tmp_path / "again"), *SETTINGS]) == 0
    names = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file())
    assert names == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    assert all((demo / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def looks(sample: Sample) -> frozenset[str]:
    metadata = sample.metadata()
    return frozenset(str(metadata[role]).split(" ", 1)[1] for role in ("subject", "object"))


def test_held_out_pairs_of_looks_never_occur_in_training(demo: Path):
    train, heldout = ({looks(sample) for sample in samples(demo / split)} for split in ("train", "heldout"))
    assert not train & heldout
    assert 0.07 < len(look_pairs(heldout=True)) / len(look_pairs(heldout=False)) < 0.14
    seen = {look for pair in look_pairs(heldout=False) for look in pair}
    assert {look for pair in look_pairs(heldout=True) for look in pair} <= seen


def test_held_out_captions_name_everything_and_every_scene_is_another(demo: Path):
    scenes = []
    for sample in samples(demo / "heldout"):
        metadata, caption = sample.metadata(), sample.caption()
        assert f"a {metadata['subject']} " in caption
        assert caption.endswith(f"a {metadata['object']}")
        assert any(f" {words} a " in caption for words in RELATIONS[str(metadata["relation"])])
        relation = str(metadata["relation"])
        one = (str(metadata["subject"]), relation, str(metadata["object"]))
        scenes.append(min(one, (one[2], INVERSE[relation], one[0])))
    assert len(set(scenes)) == 40


def test_about_a_tenth_of_the_training_captions_are_shapes_alone(demo: Path):
    short = [sample for sample in samples(demo / "train") if not any(colour in sample.caption() for colour in COLOURS)]
    assert 60 < len(short) < 160
    assert all(" and a " in sample.caption() for sample in short)


def test_the_zero_shot_prompts_cover_every_label(demo: Path):
    prompts = json.loads((demo / "heldout" / "prompts.json").read_text())
    labels = {sample.metadata()[prompts["field"]] for sample in samples(demo / "train")}
    assert labels == set(prompts["classes"])
    assert len(labels) == len(SHAPES) * (len(SHAPES) - 1) // 2
    assert "a circle and a star" in prompts["classes"]["circle and star"]


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_subject_stands_where_the_relation_says(relation: str):
    scene = Scene(("large", "red", "circle"), ("small", "blue", "star"), relation)
    for draws in ([0.0] * 20, [0.99] * 20, [0.5] * 20):
        pixels = np.asarray(picture_of(scene, draws, 64)).astype(int)
        red = np.argwhere((pixels[..., 0] > 180) & (pixels[..., 2] < 90)).mean(axis=0)
        blue = np.argwhere((pixels[..., 2] > 180) & (pixels[..., 0] < 90)).mean(axis=0)
        down, across = red - blue
        expected = {"left of": across < -10, "right of": across > 10, "above": down < -10, "below": down > 10}
        assert expected[relation]
    assert caption_of(scene, [0.0] * 5, short=False).startswith("a large red circle is " + RELATIONS[relation][0])


def test_the_tokenizer_knows_even_a_character_that_a_demo_says_but_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []

    def once_snow(*arguments: Any, **options: Any) -> str:
        said.append("雪" if len(said) == 7 else caption_of(*arguments, **options))
        return said[-1]

    monkeypatch.setattr(
        "data_pipelines.demo.corpus.ProcessPoolExecutor", lambda processes, **_: ThreadPoolExecutor(processes)
    )
    monkeypatch.setattr("data_pipelines.demo.corpus.caption_of", once_snow)
    Demo(train=1000, heldout=1, size=8, vocab_size=512, seed=0).make(tmp_path / "d", processes=1)
    tokenizer = Tokenizer.load(tmp_path / "d" / "tokenizer.model")
    assert tokenizer.unk_id not in tokenizer.pieces("雪")[0]
