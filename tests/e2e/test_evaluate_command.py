"""`python -m pretrain evaluate`: of moved runs and chosen steps, on any split, with whatever is wrong beside it."""

import json
import resource
import shutil
from types import SimpleNamespace

import pytest

from e2e.conftest import run, tiny_run, write_config


@pytest.fixture(scope="module")
def moved(corpus, tmp_path_factory):
    """A run of a tokenizer that is gone, moved; and two equal held-out splits, whose folders have one name."""
    folder = tmp_path_factory.mktemp("moved")
    tree = tiny_run(corpus, folder / "before")
    tree["data"]["tokenizer"] = str(shutil.copy(corpus / "tokenizer.model", folder / "gone.model"))
    tree["data"]["heldout"] = None
    config = write_config(tree, folder / "run.yaml")
    result = run("pretrain", "train", config.path, "training.steps=6", "engine.zero_stage=0")
    assert result.code == 0, result.err
    (folder / "gone.model").unlink()
    (folder / "before").rename(folder / "after")
    for name in ("coco", "flickr"):
        shutil.copytree(corpus / "heldout", folder / name / "val")
    return SimpleNamespace(output=folder / "after", folder=folder)


def evaluate(moved, *arguments, **options):
    return run("pretrain", "evaluate", moved.output, *arguments, **options)


def test_a_moved_run_is_evaluated_with_its_own_tokenizer_on_splits_that_keep_apart(moved):
    for name in ("coco", "flickr"):
        result = evaluate(moved, "--split", moved.folder / name / "val" / "manifest.json", "--step", 4, "--rerank", 0)
        assert result.code == 0, result.err
        assert "re-ranked" not in result.out
    reports = [json.loads(path.read_text()) for path in moved.output.glob("evaluation-val-*-step-000000004.json")]
    assert {report["manifest"] for report in reports} == {
        str(moved.folder / name / "val" / "manifest.json") for name in ("coco", "flickr")
    }
    assert all(report["samples"] == 64 for report in reports)


def test_settings_are_overridden_and_figures_come_before_a_file_that_cannot_be_written(moved):
    limit = (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    result = evaluate(
        moved,
        f"data.heldout={moved.folder / 'coco' / 'val' / 'manifest.json'}",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert result.code == 4
    assert "image-to-text R@10, re-ranked" in result.out
    (line,) = result.err.splitlines()
    assert line.startswith(f"Cannot write {moved.output / 'evaluation-val-'}")
    assert line.endswith("The figures above are complete.")


@pytest.mark.parametrize(
    ("prompts", "code", "words"),
    [
        (
            {"field": "nosuch", "classes": {"red": "red"}},
            4,
            "the field 'nosuch' of the samples' json is in none of them",
        ),
        ({"field": "shapes", "classes": {"ship": ["ship"]}}, 4, "names none of the classes of"),
        ({"field": "shapes", "classes": {"circle and star": "a circle and star", "x": ["x"]}}, 0, ", 1 of 2 classes"),
        (
            {"field": "shapes", "classes": {"circle and star": []}},
            4,
            "the prompts of 'circle and star' are no list of texts",
        ),
    ],
)
def test_prompts_that_fit_nothing_are_named_and_one_prompt_may_be_a_string(moved, prompts, code, words):
    split = moved.folder / "coco" / "val"
    (split / "prompts.json").write_text(json.dumps(prompts))
    result = evaluate(moved, "--split", split / "manifest.json", "--rerank", 0)
    assert result.code == code, result.err
    assert words in result.out + result.err
    assert "Traceback" not in result.err
    assert "no list" in words or "image-to-text R@10" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rerank", -1], 4, "--rerank -1 is below 0"),
        (["--step", 5], 3, "No checkpoint of step 5 in"),
        ([], 4, "set data.heldout"),
        (["data.tokenizer=/nowhere", "model.embed=8", "data.heldout=/nowhere"], 4, "There is no manifest at /nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(moved, arguments, code, words):
    result = evaluate(moved, *arguments)
    assert result.code == code
    (line,) = result.err.splitlines()
    assert words in line


def test_a_run_without_any_tokenizer_says_which_one_it_needs(moved, corpus):
    copy = moved.folder / "without"
    shutil.copytree(moved.output, copy)
    (copy / "tokenizer.model").unlink()
    split = ["--split", corpus / "heldout" / "manifest.json", "--rerank", 0]
    result = run("pretrain", "evaluate", copy, *split)
    assert result.code == 4
    assert "is not at" in result.err
    assert "data.tokenizer=PATH" in result.err
    assert run("pretrain", "evaluate", copy, *split, f"data.tokenizer={corpus / 'tokenizer.model'}").code == 0


def test_a_run_that_learns_to_write_captions_is_judged_by_those_it_writes(corpus, tmp_path):
    tree = tiny_run(corpus, tmp_path / "run")
    tree["model"] |= {"architecture": "coca", "fusion": None, "decoder": {"depth": 1, "heads": 2, "queries": 4}}
    config = write_config(tree, tmp_path / "run.yaml")
    result = run("pretrain", "train", config.path, "training.steps=6", "engine.zero_stage=0")
    assert result.code == 0, result.err
    result = run("pretrain", "evaluate", config.output)
    assert result.code == 0, result.err
    (report,) = (json.loads(path.read_text()) for path in config.output.glob("evaluation-*.json"))
    scores = report["scores"]
    assert 0 < scores["captioning accuracy, each piece given those before"]["value"] < 1
    for way in ("greedy", "3 beams"):
        assert 0 <= scores[f"captions to the letter, {way}"]["value"] < 0.5
        assert f"captions to the letter, {way}" in result.out
