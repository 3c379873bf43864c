"""Submit a run to a Slurm cluster: check the config, plan the layout, keep both in the run's folder, and hand
slurm/train.sbatch to sbatch. The job saves before its time limit, and goes back into the queue until the run is done.
Each option is a key of the config's section `slurm`, where a cluster's own settings can stand once and for all.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

HELP = "submit a run to a Slurm cluster"
EXAMPLES = (
    "configs/base.yaml --nodes 4 --gpus-per-node 8 --time 48:00:00 --partition gpu",
    "configs/large.yaml --nodes 8 --container pretrain.sqsh --mounts /data --dry-run",
    "configs/base.yaml --array 0-3 output=runs/seed-%a seed=%a",
)
OPTIONS = {
    "nodes": "machines",
    "gpus_per_node": "0: the ranks are on CPUs",
    "gpu": "the kind, for the plan: h100, h200, a100, or as `plan` takes it",
    "ranks_per_node": "one per GPU if not given",
    "ranks_by": "torchrun (a task per node), or srun (a task per GPU)",
    "cpus_per_node": "cores, for ranks and decoding",
    "time": "limit, such as 24:00:00",
    "partition": "of the cluster",
    "account": "that pays",
    "qos": "quality of service",
    "constraint": "on nodes, such as a feature",
    "reservation": "to run in",
    "array": "several runs, such as 0-3; %%a is the run's number",
    "environment": "venv, conda environment, or a tar of one",
    "container": "image for Pyxis, or .sif for Apptainer",
    "mounts": "what a container sees: /data,/local",
    "modules": "to load: cuda/12.4,gcc",
    "warning_s": "seconds before the limit at which ranks save and stop",
    "max_requeues": "how often the job goes back into the queue",
    "chain": "jobs that go on one after the other, where nothing is requeued",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    add_options(parser)


def run(options: Namespace) -> None:
    start(options.config, [], options)


def add_options(parser: ArgumentParser) -> None:
    """What `resume` takes as well."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    for name, words in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="X", help=words)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")


def start(config: Path, words: Sequence[str], options: Namespace) -> None:
    """Submits a config with settings that were given before, and the options' laid over them."""
    from launch.slurm import options_of, read_request, render, submit

    request = read_request(config, [*words, *options_of(vars(options)), *options.overrides])
    if request.slurm.gpus_per_node:  # it takes seconds, which a wrong key need not wait for
        from launch.plan_report import refuse_what_does_not_fit

        refuse_what_does_not_fit(request.config)
    if options.dry_run:
        print(render(request, config), end="")
    else:
        submit(request)
