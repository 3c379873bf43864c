"""A run that starts with another run's weights, by the command line, and goes on without them."""

import json

from e2e.conftest import run, tiny_run, write_config

ALONE = ("training.steps=2", "optimizer.warmup_steps=1", "checkpoint.every=2", "data.heldout=null")


def test_a_run_starts_with_anothers_weights_records_them_and_goes_on_without(corpus, tmp_path):
    """With deterministic kernels, so that those of a whole step are asked for."""
    first = write_config(tiny_run(corpus, tmp_path / "first"), tmp_path / "first.yaml")
    assert run("pretrain", "train", first.path, *ALONE).code == 0
    source = tmp_path / "first" / "checkpoints" / "step-000000002"
    second = write_config(tiny_run(corpus, tmp_path / "second"), tmp_path / "second.yaml")
    command = ("pretrain", "train", second.path, *ALONE, "model.image.size=64", "training.deterministic=true")
    begun = run(*command, f"init_from={tmp_path / 'first'}")
    assert begun.code == 0, begun.err
    said = begun.out.splitlines()
    assert said[0].startswith(f"Initial weights from {source} (step 2, manifest ")
    assert said[1] == "Resized: image_embed.position (16 x 32 -> 64 x 32, interpolated)."
    assert f"{second.output}: a fresh run, begun with the weights of {source}." in begun.out
    source.parent.rename(tmp_path / "gone")
    resumed = run(*command, f"init_from={tmp_path / 'first'}", "training.steps=4")
    assert resumed.code == 0, resumed.err
    assert "Initial weights" not in resumed.out
    assert f"{second.output}: resumed at step 2, begun with the weights of {source}." in resumed.out
    for step in (2, 4):
        record = json.loads((second.output / "checkpoints" / f"step-{step:09d}" / "run.json").read_text())["init_from"]
        assert record["path"] == str(source)
        assert record["step"] == 2
        assert len(record["manifest_sha256"]) == 64
