"""Ranks that fail are started again in place, by our launcher and by plain torchrun."""

import json
import os
import signal
import time

import pytest

from e2e.conftest import metrics, run, start, wait_for_step

# The real command, whose rank 1 kills itself in every attempt, once the ranks have met.
FAILING = """
import os, signal
import torch
from pretrain.__main__ import main
from pretrain.trainer import Trainer
def fit(trainer):
    print("met" if trainer.mesh.world.sum(torch.ones(1)) == 2 else "alone", flush=True)
    trainer.heart.saved_step = int(os.environ["TORCHELASTIC_RESTART_COUNT"])  # progress
    trainer.heart.beat("step", 0)
    if trainer.mesh.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.mesh.world.sum(torch.ones(1))
Trainer.fit = fit
main()
"""


@pytest.mark.parametrize("launcher", ["launch.torchrun", pytest.param("torch.distributed.run", marks=pytest.mark.long)])
def test_restarts_in_place_come_up_every_time(tmp_path, config, launcher):
    """Of plain torchrun's, whose store keeps the keys of ranks that are gone, 3 of 12 did."""
    (tmp_path / "failing.py").write_text(FAILING)
    restarts = int(os.environ.get("RESTARTS", "2"))
    words = ("--standalone", "--nproc-per-node", 2, "--max-restarts", restarts, tmp_path / "failing.py")
    done = run(launcher, *words, "train", config.path, "data.heldout=null")
    assert done.out.count("met") == 2 * (restarts + 1), done.err


@pytest.mark.long
def test_a_run_goes_on_with_the_machine_that_is_left_and_with_another_that_joins(config, monkeypatch):
    """At the same global batch, in as many micro-steps as keep a rank's samples at what they were."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    options = ("data.heldout=null", "checkpoint.every=2", "objectives.contrastive.negatives=global_batch")
    words = ["--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 9, "--rdzv-backend", "c10d"]
    words += ["--rdzv-id", "elastic", "--local-addr", "127.0.0.1", "--rdzv-endpoint", "127.0.0.1:29517"]
    words += ["--rdzv-conf", "{host},last_call_timeout=3,join_timeout=60", "-m", "pretrain", "train", config.path]

    def machine(host: int):
        conf = [str(word).format(host=f"is_host={host}") for word in words]
        return start("launch.torchrun", *conf, *options, "training.steps=9999")

    first, second = machine(1), machine(0)
    wait_for_step(first, config.output, 3)
    assert layout(config) == (2, 1)
    second.kill()  # its rank goes with it
    wait_until(lambda: layout(config) == (1, 2))
    third = machine(0)
    wait_until(lambda: layout(config) == (2, 1))
    first.send_signal(signal.SIGTERM)
    ends = [machine.communicate(timeout=60) for machine in (first, third)]
    assert [first.returncode, third.returncode] == [85, 85], ends
    steps = [step["step"] for step in metrics(config.output)]
    assert steps == list(range(1, len(steps) + 1))


def layout(config) -> tuple[int, int]:
    """Data-parallel ranks and micro-steps of the newest checkpoint."""
    newest = max((config.output / "checkpoints").glob("step-*"))
    saved = json.loads((newest / "run.json").read_text())
    return saved["layout"]["dp"], saved["config"]["training"]["accumulation"]


def wait_until(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
