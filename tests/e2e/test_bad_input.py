"""Whatever is wrong with the input, the command line says it in one sentence, exits non-zero, and loses nothing."""

import io
import json
import os
import resource
import shutil
import tarfile
from pathlib import Path

import pytest

from data_pipelines.samples.tokenizer import train_sentencepiece
from e2e.conftest import metrics, run, start, tiny_run, wait_for_step, write_config
from pretrain.checkpoint.store import CheckpointStore
from pretrain.parallel.mesh import ALONE


def train(config, *overrides, **options):
    return run("pretrain", "train", config.path, "training.steps=6", "engine.zero_stage=0", *overrides, **options)


def assert_one_sentence(result, code, *parts):
    """One line, no traceback, with every part in it."""
    assert result.code == code, result.err
    lines = [line for line in result.err.splitlines() if "[WARNING]" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].endswith((".", "?"))
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture
def own_corpus(corpus, tmp_path):
    """A config on a copy of the corpus that a test may spoil, and the folder of its training shards."""
    shutil.copytree(corpus, tmp_path / "corpus")
    tree = tiny_run(tmp_path / "corpus", tmp_path / "run")
    tree["data"] |= {"max_bad_samples": 0, "max_bad_fraction": 0.0, "heldout": None}
    return write_config(tree, tmp_path / "run.yaml"), tmp_path / "corpus" / "train"


def rewrite(shard: Path, suffix: str, content: bytes) -> None:
    """Gives the shard's first member of a kind other content, and indexes the shards again."""
    members = []
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
    index = next(i for i, (member, _) in enumerate(members) if member.name.endswith(suffix))
    members[index] = (members[index][0], content)
    with tarfile.open(shard, "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert run("data_pipelines", "index", shard.parent, "-o", shard.parent / "manifest.json").code == 0


def test_a_misspelt_key(config):
    assert_one_sentence(train(config, "training.stepps=3"), 4, "unknown key training.stepps: did you mean 'steps'?")


def test_an_impossible_layout(config):
    result = train(config, "training.global_batch=60")
    assert_one_sentence(result, 4, "global_batch 60", "data.grain 16", "use 48 or 64")


def test_a_missing_shard(own_corpus):
    config, shards = own_corpus
    shard = next(iter(sorted(shards.glob("*.tar"))))
    shard.unlink()
    assert_one_sentence(train(config), 4, shard, "cannot be found", "python -m data_pipelines index")


def test_a_shard_cut_off_after_it_was_indexed(own_corpus):
    config, shards = own_corpus
    shard = next(iter(sorted(shards.glob("*.tar"))))
    shard.write_bytes(shard.read_bytes()[:100_000])
    assert_one_sentence(train(config), 4, shard, "100,000 bytes", "python -m data_pipelines index")


def test_a_corrupt_tar(own_corpus):
    _, shards = own_corpus
    shard = next(iter(sorted(shards.glob("*.tar"))))
    content = bytearray(shard.read_bytes())
    content[:512] = b"x" * 512
    shard.write_bytes(content)
    result = run("data_pipelines", "index", shards, "-o", shards / "manifest.json")
    assert result.code == 4
    last = result.err.strip().splitlines()[-1]
    assert str(shard) in last
    assert "Traceback" not in result.err


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image(own_corpus, workers):
    config, shards = own_corpus
    shard = next(iter(sorted(shards.glob("*.tar"))))
    rewrite(shard, ".jpg", b"\xff\xd8 not a picture")
    result = train(config, f"data.workers={workers}", "training.steps=13")
    assert_one_sentence(result, 4, shard, "1 of", "data.max_bad_samples")


def test_an_empty_caption_is_left_out_and_listed_before_a_run_meets_it(own_corpus):
    _, shards = own_corpus
    shard = next(iter(sorted(shards.glob("*.tar"))))
    rewrite(shard, ".txt", b"  \n")
    (fault,) = (shards / "manifest.dropped.jsonl").read_text().splitlines()
    assert json.loads(fault)["reason"] == "empty caption"
    assert json.loads(fault)["shard"] == str(shard)


def test_a_few_bad_samples_cost_nothing_but_themselves(own_corpus):
    config, shards = own_corpus
    rewrite(next(iter(sorted(shards.glob("*.tar")))), ".jpg", b"\xff\xd8 not a picture")
    result = train(config, "data.max_bad_samples=5", "training.steps=13")
    assert result.code == 0, result.err
    assert metrics(config.output)[-1]["health/bad_samples"] == 1


def test_a_wrong_tokenizer(config, tmp_path):
    assert train(config).code == 0
    other = tmp_path / "other.model"
    train_sentencepiece(["other words in another language"] * 50, other, 40)
    result = train(config, f"data.tokenizer={other}", "training.steps=8")
    assert_one_sentence(result, 3, "another tokenizer", other, "Restore data.tokenizer")


def test_a_checkpoint_of_another_model(config):
    assert train(config).code == 0
    result = train(config, "model.embed=32", "training.steps=8")
    assert_one_sentence(result, 3, "model.embed is 16 in it and 32 in the config", "Restore the config")
    assert len(list((config.output / "checkpoints").glob("step-*"))) == 2  # nothing was lost


def test_a_checkpoint_where_there_must_be_none_and_none_where_there_must_be_one(config):
    assert_one_sentence(train(config, "checkpoint.resume=must"), 3, "holds no checkpoint", "checkpoint.resume=auto")
    assert train(config).code == 0
    assert_one_sentence(train(config, "checkpoint.resume=never"), 3, "exists", "choose another output folder")


def test_other_data_under_a_running_order(config, corpus):
    assert train(config).code == 0
    result = train(config, f"data.train={corpus}/heldout/manifest.json", "training.steps=8")
    assert_one_sentence(result, 4, "data.train (saved", "Set these back")
    assert_one_sentence(train(config, "data.window=64", "training.steps=8"), 4, "data.window (saved 2048, now 64)")


def test_no_space_left(config):
    """A file may not grow beyond 100 kB: metrics fit, checkpoints do not."""
    assert train(config, "checkpoint.every=3").code == 0
    limit = (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    full = train(
        config,
        "training.steps=9",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert_one_sentence(full, 4, "Step 9 could not be saved", "File too large", "same command")
    store = CheckpointStore(config.output / "checkpoints", ALONE)
    newest = store.newest_valid()
    assert newest is not None
    assert newest.name == "step-000000006"
    assert train(config, "training.steps=9").code == 0


def test_a_diverging_run_stops_by_itself(config):
    result = train(config, "optimizer.learning_rate=1e30", "training.max_skipped_steps=3", "training.steps=30")
    assert result.code == 5
    assert "The last 3 steps, up to step" in result.err
    assert "lower optimizer.learning_rate" in result.err
    assert "Traceback" not in result.err


def test_a_rank_that_meets_bad_data_alone_is_the_only_one_to_speak(own_corpus):
    """A shard is cut after the run has begun: one rank reads into the hole, the other only loses its connection."""
    config, shards = own_corpus
    process = start("launch", "local", config.path, "--nproc", 2, "training.steps=9999", "data.window=1")
    wait_for_step(process, config.output, 2)
    for shard in shards.glob("*.tar"):
        os.truncate(shard, 100_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "Traceback" not in err
    assert "00000.tar" in err


def test_a_full_disk_costs_metrics_and_not_the_run(config):
    """A file may not grow beyond 3 kB: neither metrics nor checkpoints fit."""
    limit = (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    full = train(config, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert full.code == 4
    assert full.err.splitlines()[-1].startswith("Step 6 could not be saved")  # above it, TensorBoard's own thread
    assert "Metrics can no longer be written" in full.out
    assert "Could not save step 4" in full.out


def test_evaluating_what_is_no_run(tmp_path):
    assert_one_sentence(run("pretrain", "evaluate", tmp_path), 3, "No checkpoint in", tmp_path)


def test_through_the_launcher_the_sentence_and_the_code_survive(config):
    result = run("launch", "local", config.path, "--nproc", 2, "training.global_batch=96", "data.grain=32")
    assert result.code == 4
    assert result.err.count("global_batch 96 does not divide into whole grains") == 1
    assert "Traceback" not in result.err
