"""The table of docs/resume.md: each line's change is made, and accepted or refused as the line says."""

import io
import json
import os
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.order.mixture import DataState
from data_pipelines.samples.tokenizer import train_sentencepiece
from data_pipelines.shards.index import build_manifest
from data_pipelines.shards.writer import write_shard
from data_pipelines.stream.loader import TrainingData
from distributed.tiny import tiny_config
from pretrain.batch_spec import batch_spec
from pretrain.checkpoint.identity import check_same_run
from pretrain.config import Config, parse_config

PAGE = (Path(__file__).parents[3] / "docs" / "resume.md").read_text()


class Line(NamedTuple):
    keys: list[str]
    may: bool
    examples: list[str]
    general: bool  # False: it speaks of a special case of a key that another line is about


def table() -> list[Line]:
    rows = PAGE.partition("## What may change")[2].partition("\n## ")[0]
    lines = []
    for row in rows.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            assert cells[1] in ("yes", "no")
            keys, examples = (re.findall(r"`([^`]+)`", cells[place]) for place in (0, 3))
            assert examples, row
            special = re.search(r"` (with|of) ", cells[0])
            lines.append(Line(keys, cells[1] == "yes", examples, not special))
    return lines


def leaves(tree: Any, path: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [path]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]


def matching(key: str) -> list[Line]:
    """The lines about a key: those that name it, or else those whose pattern it fits."""
    lines = [line for line in table() if line.general]
    exact = [line for line in lines if key in line.keys]
    fitting = [(len(p), line) for line in lines for p in line.keys if "*" in p and fnmatchcase(key, p)]
    longest = max((size for size, _ in fitting), default=0)
    return exact or [line for size, line in fitting if size == longest]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the examples' files are."""
    folder = tmp_path_factory.mktemp("run")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    for name in ("web", "books", "new"):
        samples = [{"__key__": str(i), "jpg": picture.getvalue(), "txt": f"{name} {i}".encode()} for i in range(96)]
        write_shard(folder / f"{name}.tar", samples)
        manifest, _ = build_manifest([folder / f"{name}.tar"], folder / f"{name}.json", processes=1)
        manifest.save()
    shutil.copy(folder / "web.json", folder / "web-copy.json")
    for name, word in (("tokenizer", "a red circle"), ("other", "green mountains above")):
        train_sentencepiece((f"{word} {i}" for i in range(300)), folder / f"{name}.model", 40)
    shutil.copy(folder / "tokenizer.model", folder / "copy.model")
    return folder


def tiny(*overrides: str) -> Config:
    sources = {name: {"manifest": f"{name}.json", "weight": 1} for name in ("web", "books")}
    data = {"train": sources, "tokenizer": "tokenizer.model", "grain": 4, "lanes": 4, "window": 16}
    tree = tiny_config(data=data, objectives__matching={"pool": 4}).model_dump(mode="json", exclude_none=False)
    return parse_config(tree, "tiny", overrides)


def opened(config: Config) -> TrainingData:
    training = config.training
    return TrainingData(batch_spec(config), global_batch=training.global_batch, accumulation=training.accumulation)


def resume(folder: Path, overrides: list[str]) -> None:
    """What a start compares with a checkpoint, of a run that has taken some steps."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        data = opened(tiny())
        state = data.initial_state()
        for _ in range(3):
            state = data.advance(state)
        run = {"config": tiny().model_dump(mode="json"), "tokenizer": data.tokenizer.fingerprint}
        config = tiny(*overrides)
        now = opened(config)
        check_same_run(json.loads(json.dumps(run)), config, now.tokenizer.fingerprint, "step-3")
        now.resumed(DataState.from_dict(state.to_dict()))
    finally:
        os.chdir(before)


EXAMPLES = [(example, line.may) for line in table() for example in line.examples]


@pytest.mark.parametrize(("example", "may"), EXAMPLES, ids=[example for example, _ in EXAMPLES])
def test_the_change_of_each_line_is_accepted_or_refused_as_it_says(folder, example, may):
    overrides = re.split(r" (?=[a-z_.]+=)", example)
    if may:
        resume(folder, overrides)
    else:
        with pytest.raises(UserError, match=re.escape(overrides[0].partition("=")[0].partition(".web")[0])) as error:
            resume(folder, overrides)
        assert error.value.exit_code in (3, 4)


def test_nothing_changed_is_accepted(folder):
    resume(folder, [])


def setting_keys() -> list[str]:
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    found = re.findall(r"^\| `([\w.]+)` \| ([^|]*)\|", page, flags=re.MULTILINE)
    return [key for key, kind in found if kind.strip() != "block"]


@pytest.mark.parametrize("key", setting_keys())
def test_every_setting_is_in_one_line_of_the_table(key):
    assert len(matching(key)) == 1


def test_the_identity_of_a_run_refuses_exactly_the_keys_that_the_table_names():
    """Of all that it compares; the data compares the rest."""
    config = tiny()
    for key in leaves(config.model_dump(mode="json")):
        if not key.startswith("data."):
            saved = json.loads(config.model_dump_json())
            *parents, last = key.split(".")
            node = saved
            for parent in parents:
                node = node[parent]
            node[last] = None if isinstance(node[last], dict) else "something else"
            (line,) = matching(key)
            refused = False
            try:
                check_same_run({"config": saved, "tokenizer": "t"}, config, "t", "step-3")
            except UserError:
                refused = True
            assert refused != line.may, key
