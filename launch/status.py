"""How a run is, from its folder and from Slurm: `python -m launch status RUN`. Works without either's help."""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.errors import UserError
from data_pipelines.text import counted
from launch.jobs import JobState, ask, recorded

_TAIL_BYTES = 1 << 18  # of metrics.jsonl: some hundred steps
_RECENT = 50  # steps whose median tells the speed


def find_run(word: str) -> Path:
    """The folder that a user means, by its path or by the number of a job that was submitted from here.

    Raises:
        UserError: there is no such run.
    """
    if (run := Path(word)).is_dir():
        return run
    if word.isdecimal():
        for jobs in sorted(Path.cwd().glob("**/jobs.jsonl")):
            if any(job["job"].partition("_")[0] == word for job in recorded(jobs.parent)):
                return jobs.parent
        raise UserError(f"No run below {Path.cwd()} knows job {word}: give the run's folder.")
    raise UserError(f"There is no folder {word}: give a run's output folder, or a job's number.")


def report(run: Path) -> Iterator[str]:
    """The lines of a run's status."""
    config, steps = _config(run), _steps(run)
    total = config.get("training", {}).get("steps", 0)
    last = steps[-1] if steps else {}
    number = int(last.get("step", 0))
    yield f"{run}: {_state(run, number, total)}"
    if not steps:
        yield "no step yet"
        return
    epochs = [f"{name.replace('/', ' of ')} {value:.2f}" for name, value in last.items() if name.startswith("epoch")]
    yield f"step         {number:,} of {total:,} ({number / max(total, 1):.1%}), {', '.join(epochs)}"
    losses = [f"{name[5:]} {value:.3f}" for name, value in last.items() if name.startswith("loss/")]
    yield f"loss         {last['loss']:.4f} ({', '.join(losses)})"
    step_s = statistics.median(step["time/step_s"] for step in steps[-_RECENT:])
    batch = last["time/samples_per_s"] * last["time/step_s"]
    speed = f"{batch / step_s:,.0f} samples/s, {step_s:.3g} s per step"
    yield f"speed        {speed}, {last['time/data_wait_share']:.0%} of it waiting for data"
    if number < total:
        yield f"time left    {_duration(step_s * (total - number))}"
    yield f"checkpoint   {_checkpoint(run)}"
    scores = {name: value for step in steps for name, value in step.items() if name.startswith("heldout/")}
    if scores:
        shown = [
            f"{name.removeprefix('heldout/')} {value:.3f}" for name, value in scores.items() if "/" not in name[8:]
        ]
        yield f"held out     {', '.join(shown)}"
    yield from _alarms(last)


def _state(run: Path, step: int, total: int) -> str:
    """Of the jobs the one that runs, else the one that waits, else the newest."""
    numbers = [job["job"] for job in recorded(run)]
    if not numbers:
        return _by_itself(run, step, total)
    try:
        jobs = [(number, job) for number in numbers if (job := ask(number))]
    except UserError as error:
        return f"job {numbers[-1]}; {error} {_by_itself(run, step, total).capitalize()}."
    for number, job in sorted(jobs, key=lambda each: each[1].state != "RUNNING"):
        if not job.is_over:
            return f"job {number} {_in_words(job)}"
    ended = f"{jobs[-1][1].state.lower()} after {jobs[-1][1].ran}" if jobs else "ended"
    return f"job {numbers[-1]} {ended}; {_by_itself(run, step, total)}"


def _in_words(job: JobState) -> str:
    restarts = f", {counted(job.restarts, 'restart')}" if job.restarts else ""
    if job.state == "PENDING":
        starts = f", expected to start {job.starts}" if job.starts[:1].isdigit() else ""
        return f"waits in the queue ({job.reason}){starts}{restarts}"
    return f"{job.state.lower()} on {job.nodes} for {job.ran} of {job.limit}{restarts}"


def _by_itself(run: Path, step: int, total: int) -> str:
    """What the folder alone tells."""
    if total and step >= total:
        return "done"
    try:
        age_s = time.time() - (run / "metrics.jsonl").stat().st_mtime
    except OSError:
        return "not begun"
    return f"last step {_duration(age_s)} ago"


def _config(run: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _steps(run: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:  # the first may have lost its beginning, and the last may be half written
        try:
            step = json.loads(line)
        except ValueError:
            continue
        if isinstance(step, dict) and "time/step_s" in step:
            found.append(step)
    return found


def _checkpoint(run: Path) -> str:
    committed = sorted(run.glob("checkpoints/step-*/COMMIT"), key=lambda path: path.parent.name)
    if not committed:
        return "none yet"
    age_s = time.time() - committed[-1].stat().st_mtime
    others = f", {len(committed) - 1} older" if committed[1:] else ""
    return f"step {int(committed[-1].parent.name.removeprefix('step-')):,}, {_duration(age_s)} ago{others}"


def _alarms(last: dict[str, Any]) -> Iterator[str]:
    counts = {"health/skipped_steps": "skipped step", "health/bad_samples": "bad sample"}
    found = [counted(int(last[name]), words) for name, words in counts.items() if last.get(name)]
    if found:
        yield f"watch out    {', '.join(found)}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
