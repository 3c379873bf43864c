"""Batches hold the tensors that the model reads; a new one is a class and a line of the table."""

import io
import json
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import Corpus, Members, make_corpus

from data_pipelines.batch import COLUMNS, IDS, Batch, known_tensors
from data_pipelines.errors import DataError
from data_pipelines.samples.columns import open_columns
from distributed.tiny import VOCABULARY, tiny_config
from pretrain.batch_spec import batch_spec
from pretrain.errors import ConfigError
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import Architecture, Layer, Objective, WiringError, check
from pretrain.synthetic import made_up_batch

DOCS = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
LABELS = DOCS[DOCS.index("class LabelColumn") :].split("```")[0]
EXTRA = f'''
"""What a user adds: two classes, and a third that is wrong."""
import io, wave
import numpy as np
from data_pipelines.samples.columns import Column, Pair, Row
from data_pipelines.errors import SampleError

{LABELS}

class AudioColumn(Column):
    needs = ("wav",)

    def row(self, pair):
        try:
            with wave.open(io.BytesIO(pair.sample.members["wav"])) as sound:
                samples = np.frombuffer(sound.readframes(16), "<i2")
        except (wave.Error, EOFError):
            raise SampleError("sound cannot be read") from None
        return {{"sound": np.resize(samples, 16).astype(np.float32)}}

class Careless(Column):
    needs = ("json",)

    def row(self, pair):
        return {{"label": np.array(0)}}
'''


def sound(number: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.full(16, number, "<i2").tobytes())
    return out.getvalue()


def with_label_and_sound(index: int, members: Members) -> Members:
    spoilt = {3: {"json": b"{}"}, 5: {"wav": b"noise"}}.get(index, {})
    members = members | {"json": json.dumps({"label": index}).encode(), "wav": sound(index)} | spoilt
    return {name: content for name, content in members.items() if not (index == 7 and name == "wav")}


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("heard"), tokenizer_path, (32,), with_label_and_sound)


@pytest.fixture
def extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Adds lines to the table, of classes in a module of the user's."""
    (tmp_path / "extra_columns.py").write_text(EXTRA)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name, *given: monkeypatch.setitem(COLUMNS, f"extra_columns.{name}", given)
    sys.modules.pop("extra_columns", None)


def first_batch(corpus: Corpus, tensors: set[str], **changes: object) -> Batch:
    data = corpus.training(tensors=tensors, **changes)
    return next(data.batches(data.initial_state()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_new_column_is_one_class_and_one_line(heard: Corpus, extra, workers: int):
    extra("LabelColumn", "labels")
    extra("AudioColumn", "sound")
    batch = first_batch(heard, {"labels", "sound"}, workers=workers)
    assert batch.tensors.keys() == {"labels", "sound", *IDS}
    assert batch.tensors["labels"].unique().numel() > 12
    assert torch.equal(batch.tensors["sound"], batch.tensors["labels"].float()[:, None].expand(-1, 16))


def test_what_is_wrong_for_a_new_column_is_replaced_in_training_and_left_out_of_evaluation(heard: Corpus, extra):
    extra("LabelColumn", "labels")
    extra("AudioColumn", "sound")
    reasons = {"00003": "json has no label", "00005": "sound cannot be read", "00007": "no .wav"}
    training = first_batch(heard, {"labels", "sound"}, global_batch=32)
    assert {bad.key: bad.reason for bad in training.bad} == reasons
    heldout = heard.heldout(tensors={"labels", "sound"})
    heldout.examine()
    assert {bad.key: bad.reason for bad in heldout.bad} == reasons
    assert next(heldout.batches(29)).tensors["labels"].tolist() == sorted({*range(32)} - {3, 5, 7})
    assert not first_batch(heard, {"text", "images"}, global_batch=32).bad


def test_a_member_that_no_sample_has_ends_in_a_sentence(corpus: Corpus, extra):
    extra("AudioColumn", "sound")
    with pytest.raises(DataError, match=r"No sample of a whole window .* in shard .*: no \.wav\. Check how"):
        first_batch(corpus, {"sound"})
    with pytest.raises(DataError, match=r"None of the 164 held-out samples .* can be used; the first .*: no \.wav"):
        corpus.heldout(tensors={"sound"}).examine()


def test_a_class_without_its_line_ends_in_a_sentence():
    layers = [Layer("head", torch.nn.Identity, ("labels",), ("loss/x",))]
    with pytest.raises(WiringError, match="layer head reads labels, which no layer writes and no column of the data"):
        check(Architecture(layers, [Objective("x", 1.0)]), known_tensors())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("extra_columns.Missing", "no attribute 'Missing'"),
        ("extra_column.LabelColumn", "No module named 'extra_column'"),
    ],
)
def test_a_line_without_its_class_ends_in_a_sentence(corpus: Corpus, extra, monkeypatch, name: str, sentence: str):
    monkeypatch.setitem(COLUMNS, name, ("labels",))
    with pytest.raises(DataError, match=rf"says that {name} gives labels, and there is no such class .*{sentence}.*"):
        first_batch(corpus, {"labels"})
    first_batch(corpus, {"text"})  # which asks for nothing of it


def test_a_class_that_gives_something_else_than_its_line_says_ends_in_a_sentence(corpus: Corpus, extra):
    extra("Careless", "labels")
    with pytest.raises(DataError, match=r"batch\.py says that Careless gives labels, and it gives label: make them"):
        first_batch(corpus, {"labels"})


@pytest.mark.parametrize(
    ("tensors", "classes"),
    [
        ((), ["IdColumn"]),
        (("text",), ["CaptionColumn", "IdColumn"]),
        (("images", "text"), ["CaptionColumn", "ImageColumn", "IdColumn"]),
        (("masked_text",), ["MaskedCaptionColumn", "IdColumn"]),
        (known_tensors(), ["MaskedCaptionColumn", "ImageColumn", "IdColumn"]),
    ],
)
def test_only_the_columns_that_are_read_are_made_captions_before_images(corpus: Corpus, tensors, classes):
    columns = open_columns(corpus.spec(tensors), training=True)
    assert [type(column).__name__ for column in columns] == classes
    given = {name for column in columns for name in column.gives}
    assert first_batch(corpus, tensors).tensors.keys() == given >= {*tensors, *IDS}


def test_captions_of_several_samples_come_before_their_images(corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    for column in open_columns(corpus.spec(), training=True):
        kind, row = type(column), type(column).row
        monkeypatch.setattr(
            kind, "row", lambda self, pair, row=row: made.append(type(self).__name__) or row(self, pair)
        )
    first_batch(corpus, known_tensors(), global_batch=4, grain=4)
    assert made == ["MaskedCaptionColumn"] * 4 + ["ImageColumn"] * 4 + ["IdColumn"] * 4


@pytest.mark.parametrize("tensors", [{"text"}, {"images"}, {"text", "images"}, {"masked_text", "images"}])
def test_what_is_left_out_changes_nothing_else(corpus: Corpus, tensors: set[str]):
    whole, part = first_batch(corpus, known_tensors()), first_batch(corpus, tensors)
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in part.tensors.items())


def test_a_dual_encoder_has_no_masks_made():
    clip = architecture_of(tiny_config(model__architecture="clip"), VOCABULARY)
    assert {"images", "text"} <= clip.columns <= {"images", "text", *IDS}


def test_a_text_length_without_room_is_refused(corpus: Corpus):
    with pytest.raises(DataError, match="A text length of 2 leaves no room between"):
        open_columns(replace(corpus.spec(), text_length=2), training=True)


def test_what_a_layer_reads_and_nobody_makes_up_ends_in_a_sentence(extra, monkeypatch: pytest.MonkeyPatch):
    """The doctor and the planner run on made-up batches."""
    extra("LabelColumn", "labels")
    monkeypatch.setattr(Architecture, "columns", property(lambda self: {"images", "labels"}))
    with pytest.raises(ConfigError, match=r"model\.architecture albef reads labels, and pretrain/synthetic\.py makes"):
        made_up_batch(tiny_config(), VOCABULARY, torch.arange(8))


def test_every_tensor_of_the_table_is_made_up():
    assert made_up_batch(tiny_config(), VOCABULARY, torch.arange(8)).keys() == known_tensors()


def test_a_missing_tokenizer_is_named_with_its_key(corpus: Corpus, tmp_path: Path):
    config = tiny_config()
    config = config.model_copy(update={"data": corpus.config(tokenizer=tmp_path / "t.model")})
    with pytest.raises(DataError, match=r"data\.tokenizer: There is no tokenizer at"):
        batch_spec(config)
