"""The processes of a run as a mesh of three axes, and what the ranks along an axis say to each other.

Ranks along the tensor-parallel axis (tp) hold parts of each layer's matrices, ranks along the pipeline-parallel axis
(pp) other layers; both read the same samples. Ranks along the data-parallel axis (dp) hold the same parts and read
other samples. The axes lie in the order of what they exchange: neighbouring ranks share a tp axis, which stays inside
a node, and those farthest apart a pp axis, which crosses nodes first.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretrain.collectives import Group, all_gather
from pretrain.config import EngineConfig
from pretrain.errors import ConfigError

# A rank that waits this long for another one gives up. Longer than any save or evaluation between two steps.
TIMEOUT = timedelta(minutes=20)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Axis:
    """Ranks that belong together, and this process's place among them. `group` is None for a process alone."""

    rank: int
    size: int
    group: Group

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the axis, on all of its ranks; in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the axis, on all of its ranks; in place."""
        return tensor if self.group is None else self.sum(tensor).div_(self.size)

    def from_first(self, value: Any) -> Any:
        """What the first rank holds (any picklable value), on all of them."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on all of them."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, row: Tensor) -> Tensor:
        """Every rank's row of numbers, of one length, in the order of ranks, on all of them."""
        return all_gather(row[None], self.group)

    def to_first(self, value: bytes) -> Iterator[bytes]:
        """Every rank's bytes, one rank's after the other, on the first rank; nothing on the others. Use it up."""
        if self.group is None:
            yield value
            return
        sizes = self.gather(torch.tensor([len(value)])).flatten().tolist()
        if self.rank > 0:
            if value:
                dist.send(torch.frombuffer(bytearray(value), dtype=torch.uint8), group=self.group, group_dst=0)
            return
        yield value
        for rank, size in enumerate(sizes[1:], start=1):
            received = torch.empty(size, dtype=torch.uint8)
            if size:
                dist.recv(received, group=self.group, group_src=rank)
            yield received.numpy().tobytes()


ALONE = Axis(0, 1, None)


@dataclass(frozen=True)
class Mesh:
    """This process among the others."""

    device: torch.device
    world: Axis = ALONE
    dp: Axis = ALONE
    tp: Axis = ALONE
    pp: Axis = ALONE
    node: int = 0
    """The first rank of this rank's machine."""

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes what is written once."""
        return self.world.rank == 0


def make_mesh(world: Axis, device: torch.device, engine: EngineConfig) -> Mesh:
    """Cuts the world into axes; all ranks call it together.

    Raises:
        ConfigError: the configured degrees do not make up the processes of the world, or a node cuts a tp axis.
    """
    if misfit := engine.misfit(world.size):
        raise ConfigError(misfit)
    tp_size, pp_size = engine.tensor_parallel, engine.pipeline_parallel
    dp_size = world.size // (tp_size * pp_size)
    node = world.rank - int(os.environ.get("LOCAL_RANK", world.rank))
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if node_size % tp_size:
        raise ConfigError(
            f"engine.tensor_parallel {tp_size} does not divide the {node_size} processes of a node: set it to a "
            f"divisor, or start another number of processes per node."
        )
    ranks = torch.arange(world.size).view(pp_size, dp_size, tp_size)
    pp_rank, dp_rank, tp_rank = (ranks == world.rank).nonzero()[0].tolist()
    tp = _axis(world, ranks[pp_rank, dp_rank].tolist())
    dp = _axis(world, ranks[pp_rank, :, tp_rank].tolist())
    pp = _axis(world, ranks[:, dp_rank, tp_rank].tolist())
    return Mesh(device, world, dp, tp, pp, node)


def _axis(world: Axis, ranks: list[int]) -> Axis:
    if len(ranks) == 1:
        return ALONE
    if len(ranks) == world.size:
        return world
    # Made by its own ranks alone: thousands of groups, each of which all ranks waited for, would take minutes.
    group: Any = dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True)
    return Axis(ranks.index(world.rank), len(ranks), group)


def start_mesh(engine: EngineConfig) -> Mesh:
    """Joins the processes that torchrun started; a process started by hand is alone.

    Raises:
        ConfigError: the configured degrees do not fit them.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", own_gpu(local_rank, torch.cuda.device_count())), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if is_launched():
        # A rank whose launcher is gone would train on by itself, and write where the next start writes. Ours dies only
        # of SIGKILL. Plain torchrun dies of SIGUSR1, of a third SIGTERM, of a second Ctrl-C: then the rank is to stop.
        last_word = signal.SIGKILL if "PRETRAIN_EXIT_CODE_FILE" in os.environ else signal.SIGTERM
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, last_word)
    if "RANK" not in os.environ:  # DeepSpeed wants a process group even for one process
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ[name] = value
        os.environ.setdefault("MASTER_PORT", "0")
    _init_process_group(backend)
    size = dist.get_world_size()
    world = Axis(dist.get_rank(), size, dist.group.WORLD if size > 1 else None)
    return make_mesh(world, device, engine)


def _init_process_group(backend: str) -> None:
    """Joins the others, whichever attempt of torchrun's this is.

    Plain torchrun gives all attempts of a run one store, whose stale keys lead gloo to ranks that are gone: restarts
    in place came up 3 times of 12. On one node all ranks know the number of the attempt, which keeps the keys apart.
    Nodes count differently; there, `launch.torchrun` makes a new store for each attempt.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def own_gpu(local_rank: int, visible: int) -> int:
    """Which of the GPUs that this process sees is its own.

    Raises:
        ConfigError: there are fewer than processes.
    """
    if visible == 1:  # a scheduler may show each task its own GPU alone
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"Process {local_rank} of this machine has no GPU of its own, since {visible} are visible: start as many "
            f"processes per node as there are GPUs, or show each process its own by CUDA_VISIBLE_DEVICES."
        )
    return local_rank


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


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
