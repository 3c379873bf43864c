"""When the real command line saves, what of it stays, and what it says of it."""

import json

from e2e.conftest import metrics, run


def steps(config) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (config.output / "checkpoints").glob("step-*"))


def test_it_saves_by_the_clock_too_and_says_what_that_took(config):
    """So short a time that it is over after every step."""
    words = ["training.steps=4", "optimizer.warmup_steps=1", "checkpoint.every=100", "checkpoint.keep=9"]
    words += ["checkpoint.every_minutes=1e-6"]
    result = run("launch", "local", config.path, "--nproc", 2, *words)
    assert result.code == 0, result.err
    assert steps(config) == [1, 2, 3, 4]
    said = [line for line in metrics(config.output) if "checkpoint/stall_s" in line]
    assert said
    assert all(0 < line["checkpoint/stall_s"] < 60 and 0 < line["checkpoint/write_s"] < 60 for line in said)
    assert [path.name for path in sorted((config.output / "checkpoints" / "step-000000004").iterdir())] == [
        "COMMIT",
        "MANIFEST.json",
        "index.json",
        "intervals.bin",
        "node-00000.safetensors",
        "run.json",
    ]


def test_the_best_on_held_out_data_stays_after_a_resume_too(config):
    words = [
        "checkpoint.every=1",
        "checkpoint.keep=2",
        "training.evaluate_every=1",
        "checkpoint.best=accuracy/matching",
    ]
    for last in (2, 5):
        result = run("pretrain", "train", config.path, f"training.steps={last}", "optimizer.warmup_steps=1", *words)
        assert result.code == 0, result.err
    scores = json.loads((config.output / "checkpoints" / "scores.json").read_text())["accuracy/matching"]
    found = {line["step"]: line["heldout/accuracy/matching"] for line in metrics(config.output)}
    assert {int(step): score for step, score in scores.items()} == found
    assert len(found) == 5
    best = max(range(1, 5), key=lambda step: found[step])  # that of step 5 is known after it is saved
    assert steps(config) == sorted({best, 4, 5})
