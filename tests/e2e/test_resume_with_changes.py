"""A run goes on although all that may change has changed at once."""

import pytest

from e2e.conftest import metrics, run, tiny_run, write_config

CHANGES = (
    *("training.steps=8", "training.global_batch=128", "training.accumulation=2", "training.log_every=3"),
    *("optimizer.learning_rate=5e-4", "optimizer.warmup_steps=2", "optimizer.betas=0.9,0.95", "optimizer.clip=0.5"),
    *("engine.zero_stage=1", "engine.pipeline_parallel=2", "engine.activation_checkpointing=true"),
    *("objectives.masked_lm.probability=0.3", "objectives.matching.weight=2", "data.flip=true", "data.workers=1"),
    *("objectives.contrastive.negatives=global_batch", "data.augment.color_jitter=0.2", "data.heldout=null"),
    *("checkpoint.every=3", "checkpoint.keep=5", "init_from=nowhere", "training.deterministic=true"),
)


def test_a_run_goes_on_in_a_moved_folder_with_everything_changed_that_may(corpus, tmp_path):
    config = write_config(tiny_run(corpus, tmp_path / "run"), tmp_path / "run.yaml")
    first = run("pretrain", "train", config.path, "training.steps=4", "optimizer.warmup_steps=1")
    assert first.code == 0, first.err
    moved = config.output.rename(tmp_path / "moved")
    again = run("launch", "local", config.path, "--nproc", 2, f"output={moved}", "checkpoint.resume=must", *CHANGES)
    assert again.code == 0, again.err
    steps = metrics(moved)
    assert [step["step"] for step in steps] == list(range(1, 9))
    epochs = [step["epoch"] for step in steps]
    assert epochs[4] - epochs[3] == pytest.approx(2 * (epochs[3] - epochs[2]))
    (told,) = [line for line in again.out.splitlines() if line.startswith("Changed since step 4: ")]
    for change in CHANGES:
        assert f"{change.partition('=')[0]}: " in told
