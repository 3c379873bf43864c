"""When a job's time ends, as far as this process can know."""

import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

STARTED = "PRETRAIN_STARTED"  # seconds since 1970: set by the launcher, since ranks may be started again in place


def time_limit(minutes: float | None, environ: Mapping[str, str]) -> tuple[float, float] | None:
    """When this job has started and will end, in seconds since 1970; None if nobody has said.

    Args:
        minutes: of the config, from the launcher's start on.
        environ: Slurm's variables among others.
    """
    started = float(environ.get(STARTED) or time.time())
    ends = [started + 60 * minutes] if minutes is not None else []
    if (slurm := _slurm_end(environ)) is not None:
        ends.append(slurm)
    return (started, min(ends)) if ends else None


def _slurm_end(environ: Mapping[str, str]) -> float | None:
    """Slurm's own end of the job. Before version 23 it sets no variable, and has to be asked: once, at the start."""
    with suppress(KeyError, ValueError):
        return float(environ["SLURM_JOB_END_TIME"])
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_TASK_ID" in environ:  # else the number of an array, for that of one of its runs
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        command = ["squeue", "-h", "-j", job, "-o", "%e"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return time.mktime(time.strptime(done.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    return None
