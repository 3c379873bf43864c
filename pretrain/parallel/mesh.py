"""The processes of a run: who this one is, which device it drives, and sums over all of them."""

import ctypes
import os
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.collectives import Group
from pretrain.config import EngineConfig

# A rank that waits this long for another one gives up. Longer than any save or evaluation between two steps.
TIMEOUT = timedelta(minutes=20)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Mesh:
    """This process among the others. `group` is None when it is alone."""

    dp_rank: int
    dp_size: int
    device: torch.device
    group: Group

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes what is written once."""
        return self.dp_rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on all of them; in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, on all of them; in place."""
        return self.sum(tensor).div_(self.dp_size)

    def from_main(self, value: Any) -> Any:
        """What the main process holds (any picklable value), on all of them."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on all of them."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.dp_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def start_mesh() -> Mesh:
    """Joins the processes that torchrun started; a process started by hand is alone."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank whose launcher is killed would train on by itself, and write where the next start writes.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if "RANK" not in os.environ:  # DeepSpeed wants a process group even for one process
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ[name] = value
        os.environ.setdefault("MASTER_PORT", "0")
    # torch 2.13 renames two collectives that older versions and DeepSpeed call by their old names, at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    dist.init_process_group(backend, timeout=TIMEOUT)
    size = dist.get_world_size()
    return Mesh(dist.get_rank(), size, device, dist.group.WORLD if size > 1 else None)


def stop_mesh() -> None:
    """Leaves the process group in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def training_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The type of weights and activations in the forward and backward pass."""
    match config.precision:
        case "fp32":
            return torch.float32
        case "bf16":
            return torch.bfloat16
        case "auto":  # a CPU without bf16 instructions is some 250 times slower in bf16 than in fp32
            native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float32
