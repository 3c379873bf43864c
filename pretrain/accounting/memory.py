"""What a rank holds in tensors at the moments of a step, under each stage of DeepSpeed's ZeRO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pretrain.accounting.layers import LayerCost, Layout, StepCost, value_type
from pretrain.config import Config

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's `reduce_bucket_size`, taken whether the model is as large or not
PREFETCH = 50_000_000  # elements; its `stage3_prefetch_bucket_size`
REUSE = 1_000_000_000  # elements; its `stage3_max_reuse_distance`: what is used again sooner stays gathered
PERSISTENT = 100_000  # elements; its `stage3_param_persistence_threshold`: smaller weights are not partitioned
SUB_GROUP = 1_000_000_000  # elements; its `sub_group_size`: what stage 3 updates at a time

Moments = Mapping[str, Mapping[str, float]]
"""Bytes by moment and by item."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank at its fullest moment, by item, and which moment that is."""

    moment: str
    items: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


def released(config: Config, elements: int) -> float:
    """Elements that stage 3 gathers again for the backward pass: those whose next use is too far off to wait for.

    Between a use in the forward pass and the next lie twice the weights behind it, or, computed again, three times.
    """
    return max(elements - REUSE / (3 if config.engine.activation_checkpointing else 2), 0)


@dataclass(frozen=True)
class Rank:
    """A rank of a pipeline stage (the only one, without a pipeline), and what it holds in tensors."""

    config: Config
    cost: StepCost
    layout: Layout
    part: range
    """The stage's own layers."""
    stage: int = 0
    """Place in the pipeline; earlier ones keep the activations of more micro-steps."""
    gpu: bool = True
    """bf16 if the config leaves it open, buffers twice for overlap, and updates of many tensors at once."""

    @property
    def memory(self) -> Memory:
        """At its fullest moment."""
        return max((Memory(*moment) for moment in _moments(self).items()), key=lambda memory: memory.total)

    @cached_property
    def costs(self) -> Sequence[LayerCost]:
        return self.cost.layers[self.part.start : self.part.stop]

    @cached_property
    def width(self) -> int:
        """Bytes of a value."""
        return value_type(self.config, self.gpu).itemsize

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each weight."""
        return [size for cost in self.costs for size in cost.weights]

    @cached_property
    def n(self) -> int:
        """Elements of all weights."""
        return sum(self.sizes)

    @property
    def share(self) -> float:
        """Elements of what is divided over the data-parallel ranks."""
        return self.n / self.layout.data_parallel

    @property
    def on_device(self) -> int:
        return 0 if self.config.engine.offload == "cpu" else 1

    @property
    def update(self) -> int:
        """AdamW's own bytes per element: the root of the second moment, and without fused loops its quotient too."""
        return 4 if self.gpu else 8

    @property
    def bucket(self) -> int:
        return self.width * REDUCE_BUCKET

    @property
    def reduced(self) -> int:
        """A copy of what is in the bucket."""
        return self.width * min(self.n, REDUCE_BUCKET)

    @property
    def received(self) -> float:
        """Bytes of a message from the stage before."""
        return self.cost.layers[self.part.start - 1].crossing if self.part.start else 0

    @property
    def pipe_buffers(self) -> float:
        """Bytes that DeepSpeed's pipeline holds on to: a message and its gradient in each buffer, and one more."""
        buffers = max(2, min(self.layout.pipeline_parallel - self.stage, self.layout.micro_steps))
        return (2 * buffers + 1) * self.received

    @cached_property
    def waiting(self) -> float:
        """Bytes that wait for the backward pass, of micro-steps besides the one that runs, messages, and of all."""
        before = self.received
        behind = self.costs[-1].crossing if self.part.stop < len(self.cost.layers) else 0
        in_flight = min(self.layout.pipeline_parallel - self.stage, self.layout.micro_steps)
        kept = sum(cost.kept for cost in self.costs)
        return (in_flight - 1) * (kept + before + behind) + before + behind + self.cost.given

    def fullest(self, peaks: Sequence[float]) -> float:
        """Bytes of activations, if each layer's moment is so far above what those before it keep."""
        before = accumulate((cost.kept for cost in self.costs), initial=0.0)
        most = max(kept + peak for kept, peak in zip(before, peaks, strict=False))
        return self.waiting + self.cost.columns + most

    @cached_property
    def activations(self) -> float:
        """Bytes at the most in the backward pass, gradients of them and of one weight included, or before."""
        before = max(self.cost.first, self.cost.together) + self.cost.columns
        return max(self.fullest([cost.peak_backward for cost in self.costs]), before)


def _moments(rank: Rank) -> Moments:
    match rank.config.engine.zero_stage:
        case 0:
            return _without_zero(rank)
        case 1 if rank.width == 2 and rank.on_device:
            return _stage_1_in_bf16(rank)
        case 1:
            return _stage_1(rank)
        case 2:
            return _stage_2(rank)
        case 3:
            return _stage_3(rank)
    raise AssertionError("config allows no other stage")


def _without_zero(rank: Rank) -> Moments:
    n = rank.n
    held = {"weights": rank.width * n, "gradients": 4 * n, "optimizer": (8 if rank.width == 4 else 12) * n}
    updated = n if rank.gpu else max(rank.sizes)
    return {
        "backward pass": held | {"activations": rank.activations},
        "update": held | {"activations": rank.cost.columns, "working space": rank.update * updated},
    }


def _stage_1_in_bf16(rank: Rank) -> Moments:
    """Gradients in bf16 stay, those in fp32 are whole on every rank."""
    n = rank.n
    held = {"weights": 2 * n, "gradients": 2 * n + 4 * n, "optimizer": 12 * rank.share}
    buffers = 2 * n + (4 * n if n < REDUCE_BUCKET else 0)
    return {
        "backward pass": held | {"activations": rank.activations},
        "reduction": held | {"activations": rank.cost.columns, "buffers": buffers},
        "update": held | {"activations": rank.cost.columns, "working space": rank.update * rank.share},
    }


def _stage_1(rank: Rank) -> Moments:
    """In fp32, or with the optimizer's state in host memory."""
    n, width, share, piped = rank.n, rank.width, rank.share, rank.layout.pipeline_parallel > 1
    held = {"weights": width * n, "optimizer": 12 * share * rank.on_device}
    return {
        "backward pass": held | {"gradients": width * n, "activations": rank.activations, "buffers": rank.bucket},
        "reduction": held
        | {
            "gradients": width * max(share, n if piped else 0),
            "activations": rank.cost.columns + rank.pipe_buffers,
            "buffers": rank.bucket * (2 if piped else 1) + (rank.reduced if rank.layout.data_parallel > 1 else 0),
        },
        "update": held | {"gradients": (4 + width) * share, "working space": rank.update * share * rank.on_device},
    }


def _stage_2(rank: Rank) -> Moments:
    share = rank.share
    held = {"weights": rank.width * rank.n, "optimizer": 12 * share * rank.on_device}
    gradients = {"gradients": 4 * share}  # in fp32 the first ones stay in the bucket
    earlier = gradients if rank.width == 2 or rank.layout.micro_steps > 1 else {}
    buffers = rank.bucket * (2 if rank.gpu else 1)
    work = (4 + rank.update) * share * rank.on_device
    return {
        "backward pass": held | earlier | {"activations": rank.activations, "buffers": buffers},
        "reduction": held | gradients | {"activations": rank.cost.columns, "buffers": buffers + rank.reduced},
        "update": held | gradients | {"activations": rank.cost.columns, "working space": work},
    }


def _stage_3(rank: Rank) -> Moments:
    width, share = rank.width, rank.share
    small = sum(size for size in rank.sizes if size < PERSISTENT)
    cut = rank.n - small
    largest = max(sum(cost.weights) for cost in rank.costs)
    gathered = width * min(cut, REUSE / 2 + PREFETCH + largest)
    # What one fetch brings stays in its buffer until the last of it is used, besides being weights.
    fetched, fetched_again = (width * min(elements, PREFETCH) for elements in (cut, released(rank.config, cut)))
    held = {
        "weights": width * (share + small),
        "gradients": (4 if rank.layout.micro_steps > 1 else width) * share * rank.on_device,
        "optimizer": 12 * share * rank.on_device,
        "buffers": rank.bucket,
    }
    running = rank.fullest([cost.peak_forward for cost in rank.costs])
    forward = {"activations": running, "gathered weights": gathered + fetched}
    backward = {"activations": rank.activations, "gathered weights": gathered + fetched_again}
    reduction = {"activations": rank.cost.columns, "gathered weights": gathered, "buffers": rank.bucket + rank.reduced}
    part = min(share, SUB_GROUP) * rank.on_device
    return {
        "forward pass": held | forward,
        "backward pass": held | backward,
        "reduction": held | reduction,
        "update": held | {"activations": rank.cost.columns, "working space": (4 + rank.update) * part},
    }
