"""A rank that srun started, one task per GPU: `python -m launch.task HOST:PORT train CONFIG key=value ...`.

It gives the rank what torchrun would have given it, and becomes the rank.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from launch.environment import count_cores, count_gpus, missing, variables


def environment(slurm: Mapping[str, str], meeting_point: str) -> dict[str, str]:
    """Say torch where this rank stands, from Slurm's variables of its task."""
    host, _, port = meeting_point.rpartition(":")
    nodes, tasks = int(slurm["SLURM_NNODES"]), int(slurm["SLURM_NTASKS"])
    local = tasks // nodes
    # A task sees its own GPU, or all of the node's; its cores are its own.
    needed = variables(processes=1, gpus=count_gpus(slurm), cores=count_cores(), nodes=nodes)
    return needed | {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }


def main(words: Sequence[str]) -> None:
    os.environ.update(missing(environment(os.environ, words[0]), os.environ))
    os.execv(sys.executable, [sys.executable, "-m", "pretrain", *words[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
