"""What a plan takes for granted of GPUs and of the links between them. Every figure names its source."""

import math
from dataclasses import dataclass

from data_pipelines.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU with its links. Bandwidths are in one direction."""

    name: str
    tflops: float
    """Dense bf16 matrix products, 10^12 FLOP/s."""
    memory_gib: float
    nvlink_gb_s: float
    """To the other GPUs of a node, 10^9 bytes/s."""
    network_gb_s: float
    """Each GPU's share of the node's network adapters."""


# Source: NVIDIA's data sheets of the SXM modules, without sparsity; the network is that of DGX and HGX systems, one
# 400 Gb/s adapter per GPU (A100: 200 Gb/s). Memory is what the driver leaves of 80 and 141 GB.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989, 79, 450, 50),
        Gpu("h200", 989, 139, 450, 50),
        Gpu("a100", 312, 79, 300, 25),
    )
}

# Share of the peak that matrix products of these sizes reach, with what lies between them. Narayanan et al., Efficient
# large-scale language model training on GPU clusters (2021), table 1: 44-52 % from 1.7 B to 1 T parameters.
COMPUTE_EFFICIENCY = 0.5
# Share of a link's bandwidth that large collectives reach: NCCL's own tests show 360 of 450 GB/s on H100 nodes.
LINK_EFFICIENCY = 0.8
# What a collective takes before its first byte is there: its start, and each hop on its way, inside a node and between
# nodes. Rings have as many hops as ranks, trees, which all-reduces take, as many as the ranks of a node and levels of
# nodes. Source: NCCL's own model, src/graph/tuning.cc, protocol LL128.
START_S = 14e-6
RING_HOP_S = (1.9e-6, 4e-6)
TREE_HOP_S = (1.25e-6, 8.5e-6)
# What DeepSpeed 0.19 does on the processor for each rank and parameter that stage 3 gathers, or reduces: it lays out
# every rank's slice in Python. Measured on one rank of a pretended world of 32 to 2,048: docs/measurements.md.
HOST_S = {"all-gather": 1.5e-6, "reduce-scatter": 5e-6}
# Share of the computing time behind which an overlapped transfer can hide: it takes some of the GPU's own cores.
OVERLAP = 0.8
# Predicted times that differ by less are not told apart: the efficiency above spans 44 to 52 % in its source, and no
# time has been held against a GPU's clock.
TIME_ERROR = 0.2
# Images that a core decodes a second, of 640 x 480 to 224 pixels. Source: docs/measurements.md, `make bench-data`.
DECODED_PER_CORE_S = 559
# The CUDA context, NCCL's buffers, cuBLAS' workspaces and what the allocator loses to fragments.
RESERVED_GIB = 6


def find_gpu(text: str) -> Gpu:
    """A GPU of the table by its name, or any as NAME:TFLOPS:GIB:NVLINK_GB_S:NETWORK_GB_S.

    Raises:
        UserError: neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    name, *numbers = text.split(":")
    try:
        tflops, memory, nvlink, network = map(float, numbers)
    except ValueError:
        raise UserError(
            f"--gpu {text} is not known: give {', '.join(GPUS)}, or NAME:TFLOPS:GIB:NVLINK_GB_S:NETWORK_GB_S, such as "
            f"h100:989:79:450:50."
        ) from None
    if not all(0 < figure < math.inf for figure in (tflops, memory, nvlink, network)):
        raise UserError(f"--gpu {text} has a figure that is not above 0 and finite: all four must be.")
    return Gpu(name, tflops, memory, nvlink, network)


def latency_s(kind: str, ranks: int, nodes: int) -> float:
    """Of a collective over so many ranks, evenly spread over the nodes."""
    if kind == "all-reduce":
        inside, between = TREE_HOP_S
        return START_S + 2 * ((ranks / nodes - 1) * inside + math.log2(nodes) * between)
    inside, between = RING_HOP_S
    if kind == "point-to-point":
        return START_S + (between if nodes > 1 else inside)
    return START_S + (ranks - nodes) * inside + (nodes - 1) * between
