"""What evaluation meets: other tokenizers, checkpoints that go, splits of one name, prompts that fit nothing."""

import shutil
from pathlib import Path

import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import Manifest
from pretrain.checkpoint.verify import read_run
from pretrain.errors import CheckpointError
from pretrain.evaluate import find_tokenizer, still_there
from pretrain.scores import name_of
from pretrain.zero_shot import Prompts, prompts_beside, zero_shot_accuracy

PROMPTS = Prompts(Path("prompts.json"), "label", {"cat": ["a cat"], "dog": ["a dog"], "7": ["seven"], "cow": ["a cow"]})
DIRECTIONS = {"a cat": [1.0, 0.0], "a dog": [0.0, 1.0], "seven": [-1.0, 0.0], "a cow": [1.0, 1.0]}


def embed(texts: list[str]) -> torch.Tensor:
    return torch.tensor([DIRECTIONS[text] for text in texts])


def test_classes_are_chosen_among_those_that_occur_and_images_without_a_class_are_not_wrong(capsys):
    images = torch.tensor([[0.9, 0.8], [0.1, 1.0], [-1.0, 0.1], [1.0, 0.0], [0.0, 1.0]])
    metadata = [{"label": "cat"}, {"label": "dog"}, {"label": 7}, {"label": "horse"}, {}]
    score = zero_shot_accuracy(images, metadata, PROMPTS, embed)
    assert (score.name, score.value, score.chance) == ("zero-shot accuracy, 3 of 4 classes", 1.0, pytest.approx(1 / 3))
    assert "2 of 5 images have no class of prompts.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"other": "cat"}, "the field 'label' of the samples' json is in none of them"),
        ({"label": "Cat"}, "names none of the classes of prompts.json, but Cat"),
        ({"label": None}, "names none of the classes"),
    ],
)
def test_labels_that_match_nothing_are_a_sentence(metadata, words):
    with pytest.raises(DataError, match=words):
        zero_shot_accuracy(torch.ones(2, 2), [metadata] * 2, PROMPTS, embed)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"field": 1, "classes": {"a": "b"}}', '{"field": "x", "classes": {"a": [1]}}', '{"classes": {}}'],
)
def test_prompts_that_are_none_are_a_sentence(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(DataError, match=r"prompts.json cannot be used \(.*\): write"):
        prompts_beside(tmp_path / "manifest.json")


def test_a_string_is_one_prompt(tmp_path):
    (tmp_path / "prompts.json").write_text('{"field": "x", "classes": {"cat": "a cat", "dog": ["a dog", "dogs"]}}')
    prompts = prompts_beside(tmp_path / "manifest.json")
    assert prompts is not None
    assert prompts.classes == {"cat": ["a cat"], "dog": ["a dog", "dogs"]}
    assert prompts_beside(tmp_path / "elsewhere" / "manifest.json") is None


def test_a_checkpoint_that_goes_while_it_is_read_is_one_sentence(tmp_path):
    shutil.rmtree(tmp_path)
    with (
        pytest.raises(CheckpointError, match="was removed while it was read, as a run does that goes on"),
        still_there(tmp_path),
    ):
        read_run(tmp_path)


def test_splits_are_named_by_their_manifests():
    names = {
        name_of(Manifest(Path(f"/{data}/val/manifest.json"), ()), "/own/val/manifest.json") for data in ("coco", "f")
    }
    assert len(names) == 2
    assert all(name.startswith("val-") for name in names)
    assert name_of(Manifest(Path("/own/val/manifest.json"), ()), "/own/x/../val/manifest.json") == "heldout"


def test_no_tokenizer_but_the_runs_own_will_do(tmp_path):
    (tmp_path / "other.model").write_bytes(b"no model")
    with pytest.raises(
        DataError, match=r"is not at .*other\.model or .*gone: put it back, or say where .*data\.tokenizer"
    ):
        find_tokenizer([tmp_path / "other.model", tmp_path / "gone"], "0" * 64)
