"""Running on this machine: `python -m launch local CONFIG key=value ...`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import UserError
from launch.environment import count_cores, count_gpus, missing, variables
from pretrain.config import load_config


def run_local(
    config: Path, overrides: Sequence[str], num_processes: int | None, dry_run: bool, command: str, max_restarts: int
) -> None:
    """Check the config, then become torchrun: its process id, its signals and its exit code are ours.

    Args:
        config: The run's YAML file.
        overrides: Settings laid over the file's.
        num_processes: Ranks; None for as many as suit the machine.
        dry_run: Print the command line and stop.
        command: Of `python -m pretrain`: train, or doctor.
        max_restarts: How often ranks that failed are started again.

    Raises:
        UserError: The config cannot be used, or there are fewer GPUs than processes.
    """
    load_config(config, overrides)
    gpus = count_gpus(os.environ)
    processes = num_processes or default_processes(gpus, count_cores())
    if 0 < gpus < processes:
        raise UserError(
            f"--nproc {processes} needs a GPU for each process and there are {gpus}: "
            f"give --nproc {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    words = torchrun_command(config, overrides, processes, command, max_restarts if command == "train" else 0)
    if dry_run:
        needed = variables(processes=processes, gpus=gpus, cores=count_cores(), nodes=1)
        settings = [f"{name}={shlex.quote(value)}" for name, value in missing(needed, os.environ).items()]
        print(" ".join([*settings, shlex.join(words)]))
        return
    os.execv(words[0], words)


def default_processes(gpus: int, cores: int) -> int:
    """One process per GPU; without any, two if there are cores for them, so that a laptop run is distributed."""
    return gpus or min(2, cores)


def torchrun_command(
    config: Path, overrides: Sequence[str], processes: int, command: str = "train", max_restarts: int = 0
) -> list[str]:
    """Build the command line of a run on this machine."""
    return [
        *(sys.executable, "-m", "launch.torchrun"),
        *("--nnodes", "1", "--nproc-per-node", str(processes)),
        # A free port on this machine. With the address given, no part looks up the machine's own name.
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
        *("--max-restarts", str(max_restarts)),
        *("-m", "pretrain", command, str(config), *overrides),
    ]
