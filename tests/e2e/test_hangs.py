"""Ranks that make no progress: watched from outside, named, their stacks kept, and started again."""

import os
import re
import signal
import time

import pytest

from e2e.conftest import metrics, ranks_of, run, start, survivors, wait_for_step

LIMIT_S = 3.0
QUICK = (f"training.hang_timeout_s={LIMIT_S}", "data.patience_s=0.5", "data.heldout=null")

# The real command, in whose rank 1 a function hangs when it is called for the n-th time.
HANGING = """
import os, time
from pretrain.__main__ import main

if os.environ["RANK"] == "1":
    import {module} as module
    owner, name, calls = module.{owner}, "{name}", []
    real = getattr(owner, name)
    def hang(*arguments, **options):
        calls.append(1)
        if len(calls) == {nth}:
            time.sleep(999)
        return real(*arguments, **options)
    setattr(owner, name, hang)
main()
"""


def test_a_stopped_rank_is_named_its_peers_stacks_are_kept_and_the_run_goes_on_in_place(config):
    process = start("launch", "local", config.path, "--nproc", 2, *QUICK, "training.steps=16", mark="stopped")
    wait_for_step(process, config.output, 5)
    while not (config.output / "checkpoints/step-000000004").exists():  # a step is taken while it is written
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    stopped = time.time()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert re.search(r"launch: no progress for [3-5] s: rank 1 \(stopped by a signal; \w+, step \d+\) holds up", err)
    assert f"the stacks of all threads are in {config.output}/stacks" in err
    assert err.count("launch: hung; restart 1 of at most 100") == 1
    assert len(re.findall("Resumed from", out)) == 1
    assert [step["step"] for step in metrics(config.output)] == list(range(1, 17))
    peer, victim = sorted((config.output / "stacks").iterdir())
    assert peer.stat().st_mtime < stopped + LIMIT_S + 2
    assert "torch/distributed" in peer.read_text()
    assert "no stacks: stopped by a signal" in victim.read_text()
    assert survivors("stopped") == []


@pytest.mark.parametrize(
    ("place", "module", "owner", "name"),
    [
        ("data, step 6", "data_pipelines.stream.loader", "_TrainingBatches", "make"),
        ("step, step 6", "pretrain.trainer", "Trainer", "_take_stock"),
    ],
)
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(config, tmp_path, place, module, owner, name):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING.format(module=module, owner=owner, name=name, nth=6))
    words = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 0, script, "train", config.path, *QUICK)
    done = run("launch.torchrun", *words, "training.steps=9999")
    assert done.code == 6
    told, last = done.err.strip().splitlines()[-2:]
    assert re.match(rf"launch: no progress for \d+ s: rank 1 \({place}\) holds up the run; the stacks of ", told)
    assert last == "launch: ranks 0, 1 killed by SIGKILL; exit code 6 (no progress, see the message above)"
    _, victim = sorted((config.output / "stacks").iterdir())
    assert re.search(r'File ".*hanging.py", line \d+ in hang', victim.read_text())
