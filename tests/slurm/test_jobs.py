"""`python -m launch slurm` on a real cluster: two nodes train a tiny run, and everything happens to it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from e2e.conftest import metrics, tiny_run
from slurm.cluster import Cluster, cluster, missing, wait_for

ROOT = Path(__file__).parents[2]
MISSING = missing()
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(600)]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's own are too long for a socket's path
    with cluster(folder, nodes=3) as started:
        started.environment |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        yield started
    shutil.rmtree(folder)


@pytest.fixture
def run(corpus, tmp_path) -> SimpleNamespace:
    """A config of some half a minute on two nodes, one rank on each."""
    tree: dict[str, Any] = tiny_run(corpus, tmp_path / "run")
    tree["training"] |= {"steps": 150, "evaluate_every": 1000}
    tree["slurm"] = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 2, "partition": "low"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return SimpleNamespace(config=tmp_path / "run.yaml", output=tmp_path / "run", tree=tree)


def launch(slurm: Cluster, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return slurm.run(sys.executable, "-m", "launch", *map(str, words), check=check, cwd=ROOT)


def submit(slurm: Cluster, run: SimpleNamespace, *words: object) -> str:
    """The job's number."""
    return launch(slurm, "slurm", run.config, *words).stdout.split()[2].rstrip(":,")


def wait_for_step(run: SimpleNamespace, step: int) -> None:
    wait_for(lambda: any(line["step"] >= step for line in metrics(run.output)[-1:]), 90, f"step {step}")


def last_step(run: SimpleNamespace) -> int:
    return metrics(run.output)[-1]["step"]


def wait_for_restart(slurm: Cluster, job: str, restarts: int) -> None:
    def restarted() -> bool:
        found = slurm.job(job)
        return int(found["Restarts"]) >= restarts and found["JobState"] == "RUNNING"

    wait_for(restarted, 120, f"restart {restarts} of job {job}")


def test_a_job_that_is_preempted_killed_limited_and_requeued_ends_as_one_that_was_left_alone(slurm, run, tmp_path):
    undisturbed = SimpleNamespace(config=run.config, output=tmp_path / "undisturbed")
    alone = submit(slurm, undisturbed, f"output={undisturbed.output}")
    assert slurm.wait_for_job(alone, *OVER)["JobState"] == "COMPLETED"

    job = submit(slurm, run, "--warning-s", 45)
    wait_for_step(run, 6)
    slurm.run("sbatch", "-p", "high", "-N", "3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    wait_for_restart(slurm, job, 1)  # preempted: it saved, and went back into the queue by itself
    log = (run.output / f"logs/slurm-{job}.log").read_text()
    assert f"job {job} ended with 85" in log

    wait_for_step(run, last_step(run) + 10)
    slurm.kill(slurm.job(job)["BatchHost"])  # a power cut
    slurm.start()
    wait_for_restart(slurm, job, 2)

    wait_for_step(run, last_step(run) + 10)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for_restart(slurm, job, 3)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    wait_for_step(run, last_step(run) + 10)
    slurm.run("scontrol", "requeue", job)
    wait_for_restart(slurm, job, 4)

    assert slurm.wait_for_job(job, *OVER, limit_s=240)["JobState"] == "COMPLETED"
    ours, theirs = ({line["step"]: line["loss"] for line in metrics(each.output)} for each in (run, undisturbed))
    assert ours == theirs
    assert sorted(steps_of_the_curve(run.output / "tensorboard")) == list(range(1, 151))


def steps_of_the_curve(folder: Path) -> list[int]:
    """The steps that TensorBoard shows of the loss: what an event file purges of older ones is left out."""
    shown: list[int] = []
    for file in sorted(folder.glob("events.*"), key=lambda path: path.name.split(".")[3]):
        for event in EventFileLoader(str(file)).Load():
            if event.HasField("session_log"):
                shown = [step for step in shown if step < event.step]
            shown += [event.step for value in event.summary.value if value.tag == "loss/total"]
    return shown


def test_a_job_goes_on_without_its_controller_and_its_status_is_told_all_the_same(slurm, run):
    job = submit(slurm, run)
    wait_for_step(run, 3)
    running = launch(slurm, "status", run.output).stdout
    assert f"job {job} running on n[1-2]" in running
    assert f"of {run.tree['training']['steps']}" in running
    slurm.kill("slurmctld")
    wait_for_step(run, last_step(run) + 3)
    alone = launch(slurm, "status", run.output).stdout
    assert "Slurm's controller does not answer" in alone
    assert "samples/s" in alone
    slurm.start()
    launch(slurm, "cancel", run.output)
    ended = slurm.wait_for_job(job, *OVER)
    assert ended["ExitCode"] == "85:0"
    assert ended["Restarts"] == "0", "a run that was cancelled does not come back"
    assert not (run.output / "STOP").exists()
    assert "checkpoint   step" in launch(slurm, "status", run.output).stdout

    again = launch(slurm, "resume", run.output, "--nodes", "1", "training.steps=40").stdout
    assert slurm.wait_for_job(again.split()[2].rstrip(":,"), *OVER)["JobState"] == "COMPLETED"
    assert "job" in launch(slurm, "logs", run.output).stdout


def test_an_array_trains_each_run_in_its_own_folder(slurm, run, tmp_path):
    words = [f"output={tmp_path}/run-%a", "seed=%a", "training.steps=10", "--nodes", "1", "--array", "0-1"]
    job = submit(slurm, run, *words)
    for task in ("0", "1"):
        assert slurm.wait_for_job(f"{job}_{task}", *OVER)["JobState"] == "COMPLETED"
    losses = [metrics(tmp_path / f"run-{task}")[-1]["loss"] for task in (0, 1)]
    assert losses[0] != losses[1]
    assert f"job {job}_1 completed" in launch(slurm, "status", tmp_path / "run-1").stdout


def test_a_task_per_rank_trains_as_torchrun_does(slurm, run, tmp_path):
    words = ["training.steps=6", "training.evaluate_every=6"]
    jobs = [submit(slurm, run, *words, f"output={tmp_path}/{by}", "--ranks-by", by) for by in ("srun", "torchrun")]
    for job in jobs:
        assert slurm.wait_for_job(job, *OVER)["JobState"] == "COMPLETED"
    srun, torchrun = ([line["loss"] for line in metrics(tmp_path / by)] for by in ("srun", "torchrun"))
    assert srun == torchrun


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--partition", "nope"], "invalid partition specified: nope (partition high has 3 nodes of 8 cores; "),
        (["--nodes", "9"], "Requested node configuration is not available (partition high has 3 nodes of 8 cores; "),
        (["--gpus-per-node", "0", "--constraint", "a100"], "Invalid feature specification"),
        (["--array", "0-3"], "starts 4 runs in one folder"),
        (["--array", "x"], "slurm.array"),
        (["--gpus-per-node", "8", "engine.data_parallel=3"], "Not submitted. "),
        (["model.widht=3"], "unknown key model.widht"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence_before_it_waits(slurm, run, words, sentence):
    refused = launch(slurm, "slurm", run.config, *words, check=False)
    assert refused.returncode == 4
    assert sentence in refused.stderr
    assert not refused.stdout


def test_a_missing_config_and_a_machine_without_slurm_are_told(slurm, run):
    assert "No config at" in launch(slurm, "slurm", "no.yaml", check=False).stderr
    environment = {**slurm.environment, "PATH": "/nowhere"}
    words = [sys.executable, "-m", "launch", "slurm", str(run.config)]
    refused = slurm.run(*words, check=False, cwd=ROOT, env=environment)
    assert "There is no sbatch here: run this where Slurm's commands are" in refused.stderr
