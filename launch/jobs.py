"""A run's jobs: which there are, as its folder knows, and how they are, as Slurm knows."""

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import UserError
from data_pipelines.text import to_json

_FILE = "jobs.jsonl"
_PATIENCE_S = 10.0
_FIELDS = ("JobState", "Reason", "NodeList", "Restarts", "RunTime", "TimeLimit", "StartTime")


def record(run: Path, job: dict[str, Any]) -> None:
    """Adds a submitted job to the run's list."""
    with (run / _FILE).open("a", encoding="utf-8") as file:
        file.write(to_json(job) + "\n")


def recorded(run: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted for a run, oldest first."""
    try:
        lines = (run / _FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines]


class JobState(NamedTuple):
    """What Slurm says of a job."""

    state: str  # RUNNING, PENDING, ...
    reason: str
    nodes: str
    restarts: int
    ran: str
    limit: str
    starts: str

    @property
    def is_over(self) -> bool:
        return self.state not in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")


def ask(number: str) -> JobState | None:
    """How a job is; None if Slurm has forgotten it, as it does a while after the end.

    Raises:
        UserError: there is no Slurm here, or it does not answer.
    """
    try:
        line = call(["scontrol", "show", "job", "-o", number])
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    found = dict(re.findall(r"(\w+)=(\S+)", line.splitlines()[0]))
    state, reason, nodes, restarts, ran, limit, starts = (found.get(name, "") for name in _FIELDS)
    return JobState(state, reason, nodes, int(restarts or 0), ran, limit, starts)


def cancel(run: Path, now: bool) -> str:
    """Stops a run and its waiting jobs; says what was done.

    Raises:
        UserError: Slurm does not answer; the run itself is told all the same.
    """
    if not now:
        (run / "STOP").touch()  # first, and without Slurm's help
    said, is_told = [], False
    for job in recorded(run):
        if not (state := ask(job["job"])) or state.is_over:
            continue
        if now or state.state == "PENDING":
            call(["scancel", job["job"]])
            said.append(f"Job {job['job']} is cancelled.")
        else:
            call(["scontrol", "update", f"JobId={job['job']}", "Requeue=0"])  # or it would come back
            said.append(f"Job {job['job']} finishes its step, saves and ends.")
            is_told = True
    if said and not is_told:
        (run / "STOP").unlink(missing_ok=True)  # nobody heeds it, and the next job must not find it
    return " ".join(said) or f"{run / 'STOP'} is there: a run in this folder saves and stops at its next step."


def call(words: Sequence[str]) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: it is not here, does not answer, or says no.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S)
    except FileNotFoundError:
        raise UserError(f"There is no {words[0]} here: run this where Slurm's commands are, on a login node.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm's controller does not answer `{words[0]}`: try again later.") from None
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if "failure" in line or "error" in line]
    said = re.sub(r"^(\w+: error: |allocation failure: )", "", lines[0]) if lines else done.stderr.strip()
    raise UserError(f"Slurm says no to {words[0]}: {said.rstrip('.')}{_there_is()}.")


def _there_is() -> str:
    """What the cluster has, where Slurm says that it lacks something."""
    try:
        shape = "partition %R has %D nodes of %c cores and GPUs %G"
        found = subprocess.run(["sinfo", "-h", "-o", shape], capture_output=True, text=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    there = [line.replace(" and GPUs (null)", "") for line in sorted(set(found.stdout.splitlines()))]
    return f" ({'; '.join(there)})" if there else ""
