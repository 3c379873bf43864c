"""What a user sees of a run: lines on the screen, metrics.jsonl, TensorBoard, the evaluation's table."""

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from e2e.conftest import metrics, run, tiny_run, write_config

OBJECTIVES = ("contrastive", "matching", "masked_lm")
CLIP = {"model.architecture": "clip"}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of six steps on two ranks, evaluated on the way, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(tiny_run(corpus, folder / "run"), folder / "run.yaml")
    result = run("launch", "local", config.path, "training.steps=6", "training.evaluate_every=3")
    assert result.code == 0, result.err
    return config, result


def test_the_screen_says_where_the_run_stands(finished):
    _, result = finished
    for step in range(1, 7):
        line = rf"step {step}/6  loss \d+\.\d{{4}} \(contrastive .*\)  lr \S+  norm \S+  \d+ samples/s  0:00:\d\d left"
        line += rf"  epoch {step * 64 / 848:.2f}"
        assert re.search(line, result.out)
    assert re.search(r"held out after step 3: loss .*, text-to-image R@1 0\.\d+ of 64", result.out)
    assert "Saved step 4 in" in result.out
    assert "Warning" not in result.err


def test_the_banner_says_what_will_be_trained_on_what_and_for_how_long(finished):
    config, result = finished
    first, second, third = result.out.splitlines()[:3]
    assert first == (
        f"{config.output}: a fresh run. 68,380 parameters in float32 on 2 ranks (cpu; data x tensor x pipeline "
        f"parallel 2 x 1 x 1, ZeRO 3)."
    )
    assert second == "6 steps of 64 samples (1 x 32 per rank): 850 of train (0.45 epochs)."
    assert third == "Held out: 64 pairs, evaluated every 3 steps."


def test_tensorboard_has_every_curve_and_the_config(finished):
    config, _ = finished
    board = EventAccumulator(str(config.output / "tensorboard"))
    board.Reload()
    shared = {f"{kind}/{name}" for kind in ("loss", "scores/accuracy") for name in ("total", *OBJECTIVES)}
    shared.remove("scores/accuracy/total")
    curves = {f"optimizer/{name}" for name in ("learning_rate", "gradient_norm", "temperature", "skipped_steps")}
    curves |= {f"system/time/{name}" for name in ("samples_per_s", "step_s", "data_wait_share")}
    curves |= {"system/memory/peak_gib", "progress/epoch", "progress/bad_samples"}
    for curve in curves | shared:
        assert [event.step for event in board.Scalars(curve)] == [1, 2, 3, 4, 5, 6], curve
    heldout = EventAccumulator(str(config.output / "tensorboard" / "heldout"))
    heldout.Reload()
    retrieval = {f"scores/{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    for curve in shared | retrieval:
        assert [event.step for event in heldout.Scalars(curve)] == [3, 6], curve
    card = board.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "global_batch: 64" in card
    assert "micro-batch per rank | 32" in card


def test_metrics_are_what_they_say(finished):
    config, _ = finished
    for step in metrics(config.output):
        assert step["loss"] == pytest.approx(sum(step[f"loss/{name}"] for name in OBJECTIVES))
        assert step["time/samples_per_s"] == pytest.approx(64 / step["time/step_s"])
        assert 0 <= step["time/data_wait_share"] <= 1
        assert 0.01 <= step["temperature"] <= 0.5
    evaluated = [step["step"] for step in metrics(config.output) if "heldout/loss/matching" in step]
    assert evaluated == [3, 6]


def test_evaluation_puts_chance_beside_each_figure(finished):
    config, _ = finished
    result = run("pretrain", "evaluate", config.output)
    assert result.code == 0, result.err
    report = json.loads((config.output / "evaluation-heldout-step-000000006.json").read_text())
    scores = report["scores"]
    assert report["samples"] == 64
    assert {"text-to-image R@1", "image-to-text R@10, re-ranked", "masked-LM accuracy"} <= set(scores)
    assert scores["text-to-image R@1"]["chance"] == pytest.approx(1 / 64, rel=0.2)
    assert scores["matching accuracy, random negatives"]["chance"] == 0.5
    assert scores["zero-shot accuracy, 14 of 15 classes"]["chance"] == pytest.approx(1 / 14)  # one does not occur
    for name in scores:
        assert name in result.out
    while_training = metrics(config.output)[-1]["heldout/text_to_image_R@1"]
    assert scores["text-to-image R@1"]["value"] == pytest.approx(while_training, abs=1 / 64)


def test_clip_trains_and_is_evaluated_by_the_same_commands(corpus, tmp_path):
    tree = tiny_run(corpus, tmp_path / "run")
    del tree["model"]["fusion"]
    config = write_config(tree, tmp_path / "run.yaml")
    overrides = [f"{key}={value}" for key, value in CLIP.items()]
    result = run("launch", "local", config.path, "training.steps=6", *overrides)
    assert result.code == 0, result.err
    result = run("pretrain", "evaluate", config.output)
    assert result.code == 0, result.err
    assert "text-to-image R@1" in result.out
    assert "masked-LM" not in result.out
