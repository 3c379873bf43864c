"""What people do to runs: copies of checkpoints, lost terminals, two jobs in one folder, broken held-out data."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from e2e.conftest import metrics, run, start, tiny_run, wait_for_step, write_config

ALONE = ("engine.zero_stage=0",)


def train(config, *overrides, **options):
    return run("pretrain", "train", config.path, *ALONE, *overrides, **options)


def change_members(shard: Path, suffix: str, content: bytes, most: int = 10**9) -> None:
    """Gives the first members of a kind other content, in place of shards and manifests that know their bytes."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
    with tarfile.open(shard, "w") as tar:
        for member, data in members:
            if member.name.endswith(suffix) and most > 0:
                most -= 1
                data = content
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert run("data_pipelines", "index", shard.parent, "-o", shard.parent / "manifest.json").code == 0


def test_a_copied_checkpoint_a_changed_config_and_a_terminal_of_ascii_on_a_full_disk(corpus, tmp_path):
    tree = tiny_run(corpus, tmp_path / "l\u00e4uft")
    tree["data"] |= {"train": tree["data"]["heldout"], "heldout": None}
    config = write_config(tree, tmp_path / "run.yaml")
    short = ("checkpoint.every=2", "optimizer.warmup_steps=1", "data.workers=64", "training.global_batch=128")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "pretrain", "train", str(config.path), *ALONE, *short]
    with Path("/dev/full").open("w") as full:
        lost = subprocess.run(
            [*command, "training.steps=4"], stdout=full, stderr=subprocess.PIPE, env=ascii_only, text=True, check=False
        )
    assert (lost.returncode, lost.stderr) == (0, "")
    checkpoints = config.output / "checkpoints"
    shutil.copytree(checkpoints / "step-000000002", checkpoints / "step-backup")
    process = subprocess.Popen(
        [*command, "training.steps=8", "optimizer.learning_rate=5e-4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ascii_only,
        text=True,
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(8)]
    process.stdout.close()  # as `| head` does
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 0)
    for words in (
        f"Left alone in {checkpoints}, as no checkpoints of this run: step-backup.",
        f"Resumed from {checkpoints / 'step-000000004'}, saved on 1 rank, at step 4.",
        "Changed since step 4: optimizer.learning_rate: 0.001 -> 0.0005; training.steps: 4 -> 8.",
        "resumed at step 4. 68,380 parameters",
        "A step takes 128 samples of train, which has 64 in an epoch: steps repeat samples.",
        f"data.workers is 64, and a rank may use {len(os.sched_getaffinity(0))} cores here",
    ):
        assert any(words.encode("ascii", "backslashreplace").decode() in line for line in said), (words, said)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step-000000004", "step-000000006", "step-000000008", "step-backup", "LATEST"}
    assert "learning_rate: 0.001" in (config.output / "config-until-step-4.yaml").read_text()
    assert "learning_rate: 0.0005" in (config.output / "config.yaml").read_text()
    assert [step["step"] for step in metrics(config.output)] == list(range(1, 9))


def test_a_second_job_and_a_wrong_number_of_ranks_are_refused_and_disturb_nothing(config):
    first = start("pretrain", "train", config.path, *ALONE, "training.steps=9999")
    wait_for_step(first, config.output, 5)
    second = train(config, "training.steps=9")
    assert second.code == 4
    assert f"is in use by process {first.pid} on " in second.err
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 85, err
    steps = [step["step"] for step in metrics(config.output)]
    assert steps == list(range(1, len(steps) + 1))
    third = run("launch", "local", config.path, "--nproc", 3, "training.steps=9999")
    assert third.code == 4
    assert "4 grains of 16) does not divide over 3 processes: use 1, 2 or 4 processes." in third.err


def test_broken_held_out_samples_are_told_at_the_start_and_a_lost_shard_costs_evaluations_alone(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    heldout = tmp_path / "corpus" / "heldout"
    (shard,) = heldout.glob("*.tar")
    change_members(shard, ".jpg", b"\xff\xd8 no picture", most=2)
    config = write_config(tiny_run(tmp_path / "corpus", tmp_path / "run"), tmp_path / "run.yaml")
    process = start("pretrain", "train", config.path, *ALONE, "training.evaluate_every=2", "training.steps=40")
    wait_for_step(process, config.output, 4)
    os.truncate(shard, 10_000)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert "2 of 64 held-out samples cannot be used and are left out; the first is sample" in out
    assert "of 62, contrastive accuracy" in out
    assert "The evaluation after step 40 was given up: " in out
    lines = out.splitlines()
    assert lines.index(next(line for line in lines if line.startswith("Saved step 40"))) < len(lines) - 1
    assert "heldout/loss" not in metrics(config.output)[-1]


def test_a_request_to_stop_ends_an_evaluation_between_two_batches(config, corpus):
    long = (f"data.heldout={corpus}/train/manifest.json", "training.global_batch=16", "training.evaluate_every=1")
    process = start("pretrain", "train", config.path, *ALONE, *long, "checkpoint.every=100")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    assert "The evaluation after step 1 was given up: told to stop." in out
    assert err == "Told to stop: saved step 1. The same command goes on from there.\n"


@pytest.mark.parametrize("delay_s", [0.3, 2.0])
def test_a_request_to_stop_before_the_first_step_is_the_exit_code_of_one(config, delay_s):
    process = start("pretrain", "train", config.path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 85
    assert err.startswith("Told to stop before the first step: there is nothing to save.")
    assert len(err.splitlines()) == 1


def test_captions_that_are_all_equal_and_micro_steps_of_one_sample_are_said_once(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    for shard in (tmp_path / "corpus" / "train").glob("*.tar"):
        change_members(shard, ".txt", b"a photo")
    config = write_config(tiny_run(tmp_path / "corpus", tmp_path / "run"), tmp_path / "run.yaml")
    result = train(config, "training.steps=6", "data.heldout=null")
    assert result.code == 0, result.err
    assert result.out.count("no contrastive negative is left where 64 samples are compared") == 1
    assert "all of them share their image or their caption" in result.out
    config = write_config(tiny_run(corpus, tmp_path / "single"), tmp_path / "single.yaml")
    single = ("data.grain=1", "training.global_batch=2", "training.accumulation=2", "objectives.matching=null")
    result = train(config, "training.steps=6", "data.heldout=null", *single)
    assert result.code == 0, result.err
    assert result.out.count("no contrastive negative is left where 1 samples are compared") == 1
    assert "lower training.accumulation, or set objectives.contrastive.negatives=global_batch" in result.out


def test_an_output_that_cannot_be_made_is_one_sentence(config, tmp_path):
    (tmp_path / "file").touch()
    result = train(config, f"output={tmp_path / 'file' / 'run'}")
    assert result.code == 4
    assert result.err.startswith(f"Cannot write the run's folder {tmp_path / 'file' / 'run'} (output) (")
    assert len(result.err.splitlines()) == 1
