"""slurm/train.sbatch with stand-ins for srun, Apptainer and the ranks: what runs where, and how a job ends."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.commands.slurm import OPTIONS
from pretrain.config import SlurmConfig

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "slurm/train.sbatch"

SRUN = """
echo "srun $*" >> calls
while [[ $1 == --* ]]; do
    case $1 in --container-image=*) export INSIDE=pyxis ;; esac
    shift
done
export SLURM_NODEID=0 SLURMD_NODENAME=localhost
exec "$@"
"""
APPTAINER = """
echo "apptainer $*" >> calls
until [[ $1 == *.sif ]]; do shift; done
shift
export INSIDE=apptainer
exec "$@"
"""
PYTHON = """
[ "$2" != launch.torchrun ] || echo "the time ends at ${SLURM_JOB_END_TIME:-no time}" >> calls
echo "${INSIDE:-outside}: python $*" >> calls
case "$2" in
    launch.torchrun)
        printf %s "${CODE#0}" > "$PRETRAIN_EXIT_CODE_FILE"
        [ -z "${CODE#0}" ] || exit 1 ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""

SCONTROL = """
[ "$1" != requeue ] || echo "scontrol $*" >> calls
seq -f n%.0f 20000
"""
SQUEUE = """
[ -z "$ENDS_IN" ] && echo N/A || date -d "+$ENDS_IN seconds" +%Y-%m-%dT%H:%M:%S
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script in a folder of its own; returns its exit code, its errors and what was called."""
    commands = {
        "srun": SRUN,
        "apptainer": APPTAINER,
        "python": PYTHON,
        "scontrol": SCONTROL,
        "squeue": SQUEUE,
        "sleep": "",
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "x.yaml").write_text((REPOSITORY / "configs/demo.yaml").read_text())

    def run(*words: str, code: int | str = "", **variables: str) -> SimpleNamespace:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "REAL_PYTHON": sys.executable,
            "CODE": str(code),
            "ENDS_IN": "",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_GPUS_ON_NODE": "8",
            **variables,
        }
        done = subprocess.run(["bash", SCRIPT, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, calls=calls, folder=tmp_path)

    return run


def test_the_ranks_of_every_node_get_the_config_and_meet_at_the_first(job):
    done = job("x.yaml", "training.steps=500")
    assert done.code == 0, done.err
    ranks = done.calls[-1]
    assert "--nnodes 2 --nproc-per-node 8" in ranks
    assert "--rdzv-endpoint n1:20007" in ranks
    assert ranks.endswith("-m pretrain train x.yaml training.steps=500")


@pytest.mark.parametrize("code", [3, 4, 85])
def test_a_job_ends_with_the_code_that_a_rank_left(job, code):
    done = job("x.yaml", code=code)
    assert done.code == code
    assert f"job 7 ended with {code}" in done.out
    assert not list(done.folder.glob("*.exit-code*"))


@pytest.mark.parametrize(
    ("code", "ends_in", "most", "again"),
    [(85, 300, "9", True), (85, 300, "3", False), (85, 7200, "9", False), (5, 300, "9", False), (0, 300, "9", False)],
)
def test_a_job_that_is_out_of_time_is_queued_again_as_often_as_that_may_be(job, code, ends_in, most, again):
    done = job("x.yaml", code=code, MAX_REQUEUES=most, SLURM_RESTART_COUNT="3", ENDS_IN=str(ends_in))
    assert done.code == code
    assert ("scontrol requeue 7" in done.calls) == again
    assert ("It is requeued, and goes on from what was saved." in done.out) == again
    assert ("It was requeued 3 times, and MAX_REQUEUES is 3: submit it again to go on." in done.out) == (most == "3")
    said = next(int(call.split()[-1]) for call in done.calls if call.startswith("the time ends at "))
    assert said == pytest.approx(time.time() + ends_in, abs=60)


def test_a_job_without_a_known_end_is_left_alone(job):
    assert "the time ends at no time" in job("x.yaml").calls


def test_a_mistake_in_the_config_ends_the_job_before_the_ranks_start(job):
    done = job("x.yaml", "training.stepps=5")
    assert done.code == 4
    assert "on the command line: unknown key training.stepps" in done.err
    assert not [call for call in done.calls if "torchrun" in call]


@pytest.mark.parametrize("image", ["pretrain.sqsh", "registry#pretrain:1", "pretrain.sif"])
def test_with_a_container_nothing_of_ours_runs_outside_of_it(job, image):
    done = job("x.yaml", CONTAINER=image, MOUNTS="/data,/local/shards")
    assert done.code == 0, done.err
    pythons = [call for call in done.calls if ": python" in call]
    assert len(pythons) == 2
    assert not [call for call in pythons if call.startswith("outside")]
    here = str(done.folder)
    if image.endswith(".sif"):
        wanted = f"exec --nv --bind {here},/data,/local/shards --pwd {here} {image} "
        assert sum(wanted in call for call in done.calls if call.startswith("apptainer")) == 2
    else:
        wanted = f"--container-image={image} --container-mounts={here}:{here},/data:/data,/local/shards:/local/shards"
        assert sum(wanted in call for call in done.calls if call.startswith("srun")) == 2


def test_without_a_config_the_usage_is_printed(job):
    done = job()
    assert done.code == 4
    assert "usage: sbatch slurm/train.sbatch CONFIG" in done.err


def test_the_options_of_launch_slurm_are_the_keys_of_its_section():
    assert set(OPTIONS) == set(SlurmConfig.model_fields)
