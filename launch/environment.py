"""The environment a run needs, and what this machine has. The user's own setting always wins."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def variables(*, processes: int, gpus: int, cores: int, nodes: int) -> dict[str, str]:
    """Say which environment variables a run needs, before the user's own are laid over them.

    Args:
        processes: Ranks on this machine.
        gpus: GPUs on this machine.
        cores: CPU cores this process may use.
        nodes: Machines in the run.
    """
    needed = {
        # PyTorch starts a thread per core in every process: left alone, ranks fight over the same cores.
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        # The tokenizers library warns, and runs on one thread anyway, once a process with threads has forked.
        "TOKENIZERS_PARALLELISM": "false",
        # A rank that is told to stop finishes its step and saves; torchrun's 30 s would kill it half way.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
        # A restart in place meets the store's stale keys: gloo came up 3 times of 12, and 6 of 6 with this.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if not gpus:
        # DeepSpeed would search for an accelerator and warn that it found none.
        needed["DS_ACCELERATOR"] = "cpu"
    if nodes == 1:
        # gloo resolves the machine's own name, which on a laptop or in a container may lead nowhere.
        needed["GLOO_SOCKET_IFNAME"] = "lo"
    return needed


def missing(needed: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Drop what the user has set already."""
    return {name: value for name, value in needed.items() if name not in environ}


def count_cores() -> int:
    """Count the cores this process may use: under Slurm or taskset, fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def count_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Count the NVIDIA GPUs this process may use, without importing torch."""
    present = sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not present or visible is None:
        return present
    # An empty list or -1 hides them all; the names may be numbers, GPU-... or MIG-... identifiers.
    return sum(1 for name in visible.split(",") if name.strip() and name.strip() != "-1")
