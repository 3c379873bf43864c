"""A run whose loss jumps goes back, leaves out the data of the jump, and repeats exactly that after a kill."""

import json
import shutil
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipelines.batch import IDS
from data_pipelines.config import DataConfig
from data_pipelines.samples.columns import BatchSpec
from data_pipelines.samples.tokenizer import Tokenizer
from data_pipelines.stream.loader import TrainingData
from e2e.conftest import metrics, run, tiny_run, write_config

BATCH, EVERY, STEPS = 64, 4, 22
SPIKE = 15  # the step whose samples make the loss jump
BACK = 12
SKIPPED = range(BACK * BATCH, SPIKE * BATCH)  # positions of the samples that are left out

# The model's losses are larger where a sample of some positions is seen; a rank may be killed where others are.
SPIKING = """
import os
import signal

from pretrain.__main__ import main
from pretrain.models.model import Model

right = Model.forward


def forward(model, have, stand_ins=None):
    step = int(have["positions"].min()) // {batch} + 1
    if step == {kill} and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    report = right(model, have, stand_ins)
    factor = 20.0 if step in {spikes} else 1.0
    return report._replace(loss=report.loss * factor, figures=report.figures * factor)


Model.forward = forward
main()
"""


@pytest.fixture(scope="module")
def spiking(corpus, tmp_path_factory):
    """Trains in a folder; gives the config and how the run ended."""

    def train(folder, *overrides, ranks=2, spikes=(SPIKE,), kill=-1):
        if isinstance(folder, str):
            folder = tmp_path_factory.mktemp(folder)
        tree = tiny_run(corpus, folder / "run")
        tree["training"] |= {"steps": STEPS, "spikes": "rollback", "spike_window": 10}
        tree["checkpoint"]["every"] = EVERY
        config = write_config(tree, folder / "run.yaml")
        script = folder / "spiking.py"
        script.write_text(SPIKING.format(batch=BATCH, kill=kill, spikes=spikes))
        launcher = f"--nnodes 1 --nproc-per-node {ranks} --rdzv-backend c10d --rdzv-endpoint localhost:0"
        options = f"{launcher} --local-addr 127.0.0.1 --max-restarts 0".split()
        return config, run("launch.torchrun", *options, script, "train", config.path, *overrides)

    return train


@pytest.fixture(scope="module")
def undisturbed(spiking):
    config, result = spiking("undisturbed")
    assert result.code == 0, result.err
    return config, result


@pytest.fixture(scope="module")
def killed(spiking):
    """The folder of a run whose launcher and ranks were killed in the second step after the rollback."""
    config, result = spiking("killed", kill=SPIKE + 2)
    assert result.code == -signal.SIGKILL
    assert metrics(config.output)[-1]["step"] == BACK + 1
    return config.output


def digits(step):
    return {name: value for name, value in step.items() if not name.startswith(("time/", "memory/", "checkpoint/"))}


def test_it_goes_back_says_so_and_each_step_appears_once(undisturbed):
    config, result = undisturbed
    checkpoint = config.output / "checkpoints" / "step-000000012"
    said = f"back to {checkpoint}, rollback 1 of 5; the 192 samples read since are left out"
    assert result.out.count(said) == 1
    assert [step["step"] for step in metrics(config.output)] == list(range(1, STEPS + 1))
    board = EventAccumulator(str(config.output / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [event.step for event in board.Scalars("loss/total")] == list(range(1, STEPS + 1))
    assert max(event.value for event in board.Scalars("loss/total")) < 20
    assert "alarms/text_summary" in board.Tags()["tensors"]
    (alarm,) = (json.loads(line) for line in (config.output / "alarms.jsonl").read_text().splitlines())
    assert (alarm["step"], said in alarm["alarm"]) == (BACK, True)


def test_every_sample_outside_the_span_is_read_once_and_none_inside(undisturbed, corpus, tmp_path):
    config, _ = undisturbed
    data_config = DataConfig(**tiny_run(corpus, tmp_path)["data"])
    spec = BatchSpec(data_config, Tokenizer.load(data_config.tokenizer), IDS, 32, 20, 0.15, seed=0)
    data = TrainingData(spec, global_batch=BATCH)
    plan = [
        int(batch.tensors["image_ids"].sum()) % 2**53
        for _, batch in zip(range(STEPS + len(SKIPPED) // BATCH), data.batches(data.initial_state()), strict=False)
    ]
    left = [batch for step, batch in enumerate(plan) if step * BATCH not in SKIPPED]
    assert [step["batch_id"] for step in metrics(config.output)] == left


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="same ranks", marks=pytest.mark.long),
        pytest.param(("engine.tensor_parallel=2",), id="other"),
    ],
)
def test_a_kill_after_the_rollback_and_before_a_checkpoint_changes_nothing(
    spiking, undisturbed, killed, tmp_path, layout
):
    """The checkpoint that the run goes on from knows nothing of the rollback."""
    shutil.copytree(killed, tmp_path / "run")
    config, again = spiking(tmp_path, *layout)
    assert again.code == 0, again.err
    assert f"at step {BACK}." in again.out
    assert "back to" not in again.out
    steps, expected = metrics(config.output), metrics(undisturbed[0].output)
    assert [step["batch_id"] for step in steps] == [step["batch_id"] for step in expected]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], rel=1e-4)
    if not layout:
        assert [digits(step) for step in steps] == [digits(step) for step in expected]


def test_a_run_that_jumps_again_and_again_stops_with_a_sentence(spiking):
    config, result = spiking("hopeless", "training.max_rollbacks=2", ranks=1, spikes=range(SPIKE, 99))
    assert result.code == 5, result.err
    assert result.out.count(f"back to {config.output}/checkpoints/step-000000012") == 2
    assert "the loss jumped to" in result.err
    assert "and the run has gone back 2 times already (training.max_rollbacks 2): lower" in result.err
    assert "Traceback" not in result.err


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(spiking):
    config, result = spiking("early", "checkpoint.every=100", "training.steps=16", ranks=1)
    assert result.code == 0, result.err
    assert result.out.count("there is no checkpoint to go back to: training goes on") == 1
    assert len(metrics(config.output)) == 16


def test_a_spike_may_be_skipped_instead(spiking):
    config, result = spiking("skipping", "training.spikes=skip", "training.steps=16", ranks=1)
    assert result.code == 0, result.err
    assert result.out.count("step 15: skipped: the loss jumped to") == 1
    assert "(1 of the last 100 steps, 1 in all)" in result.out
    assert [step["health/skipped_steps"] for step in metrics(config.output)] == [0] * 14 + [1, 1]
