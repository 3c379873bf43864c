"""Jobs on a Slurm cluster: `python -m launch slurm CONFIG key=value ...` fills in slurm/train.sbatch and submits it.

What was submitted stays in the run's folder, so that a job which starts hours later trains the config as it was:

```
RUN/jobs.jsonl              a line per job: its id, its command, nodes, time
RUN/submitted/0001/         config.yaml, train.sbatch, code.txt (revision, and what was changed since)
RUN/logs/slurm-JOB.log
```
"""

import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import UserError, cannot_write
from data_pipelines.text import counted
from launch.jobs import call, record, recorded
from pretrain.config import Config, SlurmConfig, load_config


class Request(NamedTuple):
    """What is asked for: one run, or with `slurm.array` several that differ where %a stands."""

    path: Path  # of the config
    words: Sequence[str]  # key=value
    tasks: Sequence[str]  # the runs' numbers
    configs: Sequence[Config]

    @property
    def config(self) -> Config:
        return self.configs[0]

    @property
    def slurm(self) -> SlurmConfig:
        return self.config.slurm


def read_request(path: Path, words: Sequence[str]) -> Request:
    """Checks the config of every run.

    Raises:
        UserError: a config cannot be used, or several runs would share a folder.
    """
    array = load_config(path, _of_task(words, "0")).slurm.array
    tasks = _tasks(array)
    configs = [load_config(path, _of_task(words, task)) for task in tasks]
    if len({config.output for config in configs}) < len(configs):
        output = configs[0].output
        raise UserError(
            f"slurm.array {array} starts {counted(len(configs), 'run')} in one folder, {output}: put %a into it, as in "
            f"output={output}-%a."
        )
    return Request(path, words, tasks, configs)


def submit(request: Request) -> None:
    """Keeps what is submitted, submits it, and says how to go on.

    Raises:
        UserError: Slurm refuses the job, or the run's folder cannot be written.
    """
    output, slurm = request.config.output, request.slurm
    try:
        submitted, *_ = [_keep(config.output, request.path) for config in request.configs]
        (output / "logs").mkdir(exist_ok=True)
        script = submitted / "train.sbatch"
        script.write_text(render(request, submitted / "config.yaml"), encoding="utf-8")
        call(["sbatch", "--test-only", str(script)])  # a job that no nodes can take would wait for ever
        numbers: list[str] = []
        for _ in range(slurm.chain):
            after = [f"--dependency=afternotok:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []
            numbers.append(call(["sbatch", "--parsable", *after, str(script)]).strip().split(";")[0])
            for task, config in zip(request.tasks, request.configs, strict=True):
                job = {
                    "job": f"{numbers[-1]}_{task}" if task else numbers[-1],
                    "submitted": time.strftime("%F %T %Z"),
                    "log": str(_log(request, numbers[-1], task)),
                    "nodes": slurm.nodes,
                    "overrides": _of_task(request.words, task),
                }
                record(config.output, job)
    except OSError as error:
        raise cannot_write(f"the run's folder {output} (output)", error) from None
    print("\n".join(_advice(numbers, request)))


def render(request: Request, config: Path) -> str:
    """The batch script with what is asked for in the place of its #SBATCH lines."""
    slurm = request.slurm
    before, header, after = re.split(r"((?:^#SBATCH .*\n)+)", _template(), maxsplit=1, flags=re.MULTILINE)
    asked = [f"#SBATCH --{name}={value}" for name, value in _header(request).items() if value is not None]
    kept = re.findall(r"^#SBATCH --(?:open-mode|requeue|export)\b.*$", header, flags=re.MULTILINE)
    settings = {
        "MODULES": " ".join(slurm.modules),
        "ENVIRONMENT": str(slurm.environment or ""),
        "CONTAINER": slurm.container or "",
        "MOUNTS": ",".join(map(str, slurm.mounts)),
        "RANKS_BY": slurm.ranks_by,
        "RANKS": str(slurm.ranks_per_node or ""),
        "MAX_REQUEUES": str(slurm.max_requeues),
    }
    given = [f"{name}={shlex.quote(value)}" for name, value in settings.items() if value]
    given.append(f"[ $# -gt 0 ] || set -- {shlex.join([str(config), *request.words])}")
    if slurm.array:
        given.append('set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"')
    return before + "\n".join([*asked, *kept, "", *given, ""]) + after


def _header(request: Request) -> dict[str, str | None]:
    slurm = request.slurm
    ranks = slurm.ranks_per_node or max(1, slurm.gpus_per_node)
    cpus = slurm.cpus_per_node or 8 * ranks
    tasks = ranks if slurm.ranks_by == "srun" else 1
    gpus = slurm.gpus_per_node
    return {
        "job-name": request.config.output.name,
        "nodes": str(slurm.nodes),
        "gpus-per-node": str(gpus) if gpus and tasks == 1 else None,
        "ntasks-per-node": str(tasks),
        "gpus-per-task": "1" if gpus and tasks > 1 else None,
        "cpus-per-task": str(max(1, cpus // tasks)),
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "array": slurm.array,
        "output": str(_log(request, "%A" if slurm.array else "%j", "%a")),
        "signal": f"B:USR1@{slurm.warning_s}",
    }


def _log(request: Request, number: str, task: str) -> Path:
    name = f"{number}_{task}" if request.slurm.array else number
    return request.config.output / "logs" / f"slurm-{name}.log"


def _template() -> str:
    """slurm/train.sbatch of the repository, or of an installation."""
    places = [Path(__file__).parents[1], Path(sysconfig.get_path("data")) / "share/vlm-pretraining-toolkit"]
    scripts = [place / "slurm/train.sbatch" for place in places]
    for script in scripts:
        if script.is_file():
            return script.read_text(encoding="utf-8")
    raise UserError(f"No batch script at {' or '.join(map(str, scripts))}: install the toolkit again.")


def _tasks(array: str | None) -> list[str]:
    """The numbers of an array's runs; one run without a number if there is none."""
    if array is None:
        return [""]
    tasks: list[str] = []
    for part in array.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        tasks += [str(number) for number in range(int(first), int(last or first) + 1)]
    return tasks


def _of_task(words: Iterable[str], task: str) -> list[str]:
    return [word.replace("%a", task) if task else word for word in words]


def _keep(folder: Path, config: Path) -> Path:
    """Keeps the config as it is given, and the code's revision; returns their folder."""
    place = next(path for number in count(1) if not (path := folder / "submitted" / f"{number:04d}").exists())
    place.mkdir(parents=True)
    shutil.copyfile(config, place / "config.yaml")
    (place / "code.txt").write_text(_revision(), encoding="utf-8")
    return place


def _revision() -> str:
    """The version of the code; in a repository also its commit, and how it differs from that."""
    here, said = Path(__file__).parents[1], [f"version {version('vlm-pretraining-toolkit')}\n"]
    if (here / ".git").exists():
        for words in (("log", "-1", "--format=%H %ad %s"), ("status", "--short"), ("diff", "HEAD")):
            with suppress(OSError, subprocess.TimeoutExpired):  # no git, or a slow disk: what is kept is for people
                git = subprocess.run(["git", "-C", str(here), *words], capture_output=True, timeout=60)
                said.append(git.stdout.decode(errors="replace"))
    return "\n".join(said)


def _advice(numbers: Sequence[str], request: Request) -> list[str]:
    run, slurm = request.config.output, request.slurm
    chained = f", and {', '.join(numbers[1:])} to go on after it" if numbers[1:] else ""
    devices = counted(slurm.gpus_per_node, "GPU") if slurm.gpus_per_node else counted(slurm.ranks_per_node or 1, "rank")
    runs = f", {counted(len(request.tasks), 'run')}" if slurm.array else ""
    return [
        f"Submitted job {numbers[0]}{chained}: {counted(slurm.nodes, 'node')} x {devices}{runs}.",
        f"log:     {_log(request, numbers[0], request.tasks[0])}",
        f"follow:  python -m launch logs {run} --follow",
        f"status:  python -m launch status {run} --watch",
        f"cancel:  python -m launch cancel {run}",
        f"curves:  tensorboard --logdir {run.parent if slurm.array else run}",
    ]


def options_of(values: Mapping[str, object]) -> list[str]:
    """`--nodes 4` and the like as overrides of the config's section `slurm`."""
    known = SlurmConfig.model_fields
    return [f"slurm.{name}={value}" for name, value in values.items() if name in known and value is not None]


def last_submitted(run: Path) -> tuple[Path, list[str]]:
    """The config of a run's newest job, and the settings that were laid over it.

    Raises:
        UserError: no job was submitted for it.
    """
    jobs, configs = recorded(run), sorted(run.glob("submitted/*/config.yaml"))
    if not jobs or not configs:
        raise UserError(f"No job was submitted for {run}: start it by `python -m launch slurm CONFIG`.")
    return configs[-1], [word for word in jobs[-1]["overrides"] if not word.startswith("slurm.array=")]
