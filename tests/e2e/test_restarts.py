"""Ranks that fail are started again in place, as long as anything gets better by it."""

import pytest

from e2e.conftest import run

SHORT = ("data.heldout=null", "checkpoint.every=2")

# The real command, whose ranks end themselves in every attempt, and say when they have met.
FAILING = """
import os, signal, sys
from pretrain.parallel import mesh
real = mesh.start_mesh
def start_mesh(engine):
    made = real(engine)
    print("met" if made.world.sum(mesh.torch.ones(1)) == 2 else "alone", flush=True)
    return made
import pretrain.train as train
train.start_mesh = start_mesh
from pretrain.trainer import Trainer
def fit(trainer):
    trainer.heart.saved_step += int(os.environ["TORCHELASTIC_RESTART_COUNT"]) * {progress}
    trainer.heart.beat("step", 0)
    if trainer.mesh.world.rank == 1:
        {fault}
    trainer.mesh.world.sum(mesh.torch.ones(1))
Trainer.fit = fit
from pretrain.__main__ import main
main()
"""


def failing(tmp_path, config, launcher, fault, *words, progress=0, max_restarts=100):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(fault=fault, progress=progress))
    start = (*launcher, "--standalone", "--nproc-per-node", 2, "--max-restarts", max_restarts, script)
    return run(*start, "train", config.path, *SHORT, *words)


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("launcher", ["launch.torchrun", "torch.distributed.run"])
def test_restarts_in_place_come_up_every_time(tmp_path, config, launcher):
    """Of plain torchrun's, whose store keeps the keys of ranks that are gone, 3 of 12 did."""
    done = failing(tmp_path, config, (launcher,), KILL, progress=1, max_restarts=5)
    assert done.out.count("met") == 2 * 6, done.err


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (KILL, 137, "launch: rank 1 killed by SIGKILL; restart 3 of at most 100"),
        ("raise RuntimeError('of ours')", 1, "launch: rank 1 ended with 1; restart 3 of at most 100"),
        ("from pretrain.errors import TrainingError; raise TrainingError('too many.')", 5, "too many."),
    ],
)
def test_restarts_end_where_nothing_gets_better_by_them(tmp_path, config, fault, code, said):
    done = failing(tmp_path, config, ("launch.torchrun",), fault)
    assert done.code == code, done.err
    assert said in done.err
    again = 0 if code == 5 else 3
    assert done.err.count("; restart ") == again
    assert done.err.count("launch: 3 restarts brought no new checkpoint: not started again") == bool(again)
    assert done.err.splitlines()[-1].startswith("launch: rank 1 ")
