"""A run that is killed and started again with the same command is the run that was never killed."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from data_pipelines.batch import IDS
from data_pipelines.config import DataConfig
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.stream.loader import TrainingData
from e2e.conftest import metrics, run, start, survivors, tiny_run, wait_for_step, write_config

STEPS = 30


@pytest.fixture(scope="module")
def never_killed(corpus, tmp_path_factory):
    """The metrics of a run on two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("never_killed")
    config = write_config(tiny_run(corpus, folder / "run"), folder / "run.yaml")
    result = run("launch", "local", config.path, "--nproc", 2)
    assert result.code == 0, result.err
    return metrics(config.output)


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory):
    """The folder of a run on two ranks whose launcher met SIGKILL in its second epoch, and its config."""
    folder = tmp_path_factory.mktemp("killed")
    config = write_config(tiny_run(corpus, folder / "run"), folder / "run.yaml")
    process = start("launch", "local", config.path, "--nproc", 2)
    wait_for_step(process, config.output, 18)
    process.kill()
    process.communicate()
    return config


def restarted(killed, ranks: int, tmp_path: Path, *overrides: str):
    """The metrics after the same command ran again on a copy of what the kill left behind."""
    shutil.copytree(killed.output, tmp_path / "run")
    result = run("launch", "local", killed.path, "--nproc", ranks, f"output={tmp_path / 'run'}", *overrides)
    assert result.code == 0, result.err
    assert "saved on 2 ranks, at step 16" in result.out
    return metrics(tmp_path / "run")


def digits(step):
    """What a step printed, but for times and memory."""
    return {name: value for name, value in step.items() if not name.startswith(("time/", "memory/", "checkpoint/"))}


def test_the_same_ranks_repeat_every_digit(never_killed, killed, tmp_path):
    again = restarted(killed, 2, tmp_path)
    assert [digits(step) for step in again] == [digits(step) for step in never_killed]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, [], marks=pytest.mark.long),
        pytest.param(4, ["engine.tensor_parallel=2"], marks=pytest.mark.long),
        (2, ["engine.pipeline_parallel=2", "engine.zero_stage=1"]),
        pytest.param(4, ["engine.pipeline_parallel=2", "engine.zero_stage=0"], marks=pytest.mark.long),
    ],
)
def test_other_layouts_take_the_same_batches_to_the_same_losses(never_killed, killed, tmp_path, ranks, layout):
    again = restarted(killed, ranks, tmp_path, *layout)
    assert [step["batch_id"] for step in again] == [step["batch_id"] for step in never_killed]
    for step, expected in zip(again, never_killed, strict=True):
        for name in ("loss", "loss/contrastive", "loss/matching", "loss/masked_lm", "gradient_norm"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4), f"{name} of step {step['step']}"


def test_each_epoch_takes_each_sample_once(never_killed, corpus, tmp_path):
    """The batches that the run reports are those of the plan, in which no sample comes twice."""
    data_config = DataConfig(**tiny_run(corpus, tmp_path)["data"])
    spec = BatchSpec(data_config, Tokenizer.load(data_config.tokenizer), IDS, 32, 20, 0.15, seed=0)
    data = TrainingData(spec, global_batch=64)
    taken: list[tuple[int, int]] = []
    for step, batch in zip(never_killed, data.batches(data.initial_state()), strict=False):
        assert int(batch.tensors["image_ids"].sum()) % 2**53 == step["batch_id"]
        taken += zip(batch.tensors["image_ids"].tolist(), batch.tensors["caption_ids"].tolist(), strict=True)
    order = data.sources[0].order
    epoch = order.grains_per_epoch * order.grain
    assert len(taken) == STEPS * 64 > 2 * epoch
    assert len(set(taken[:epoch])) == len(set(taken[epoch : 2 * epoch])) == epoch


def test_a_run_told_to_stop_saves_and_goes_on(never_killed, config):
    process = start("launch", "local", config.path, "--nproc", 2)
    wait_for_step(process, config.output, 6)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    stopped_at = metrics(config.output)[-1]["step"]
    assert err.count(f"Told to stop: saved step {stopped_at}.") == 1
    again = run("launch", "local", config.path, "--nproc", 2, "checkpoint.resume=must")
    assert f"at step {stopped_at}." in again.out
    assert [digits(step) for step in metrics(config.output)] == [digits(step) for step in never_killed]


def test_a_finished_run_has_nothing_to_do(corpus, tmp_path):
    config = write_config(tiny_run(corpus, tmp_path / "run"), tmp_path / "run.yaml")
    short = ("pretrain", "train", config.path, "training.steps=6")
    assert run(*short).code == 0
    again = run(*short)
    assert again.code == 0
    assert "Nothing to do: step 6 of training.steps 6 is reached." in again.out
    assert len(metrics(config.output)) == 6


@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_a_kill_leaves_no_process_behind(config, victim):
    """Neither ranks that train on by themselves nor idle data workers."""
    words = ("--nproc", 2, "--max-restarts", 0, "data.workers=2", "training.steps=9999")
    process = start("launch", "local", config.path, *words, mark=victim)
    wait_for_step(process, config.output, 3)
    assert len(survivors(victim)) >= 7  # launcher, ranks, workers
    if victim == "launcher":
        process.kill()
    else:
        rank = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(rank), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    deadline = time.monotonic() + 20
    while (left := survivors(victim)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
