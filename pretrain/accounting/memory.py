"""What a rank holds in tensors at the moments of a step, under each stage of DeepSpeed's ZeRO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pretrain.accounting.layers import LayerCost, contrasted
from pretrain.accounting.stages import Layout
from pretrain.config import Config

MAX_LOGITS = 1 << 26  # of the contrastive loss at a time; equal to the one in pretrain.objectives.contrastive
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


def memory(config: Config, costs: Sequence[LayerCost], layout: Layout, stage: int = 0, *, gpu: bool = True) -> Memory:
    """What a rank of a pipeline stage (the only one, without a pipeline) holds in tensors at its fullest moment.

    Args:
        config: the whole config.
        costs: the stage's own layers.
        layout: how samples and layers lie on the ranks.
        stage: place in the pipeline; earlier ones keep the activations of more micro-steps.
        gpu: bf16 if the config leaves it open, buffers twice for overlap, and updates of many tensors at once.
    """
    moments = _moments(_Rank(config, costs, layout, stage, gpu))
    return max((Memory(name, items) for name, items in moments.items()), key=lambda memory: memory.total)


def activations(
    config: Config, costs: Sequence[LayerCost], layout: Layout, stage: int = 0, *, gpu: bool = True
) -> float:
    """Bytes of the activations in the backward pass, at their most, whatever else the rank holds then."""
    return _Rank(config, costs, layout, stage, gpu).activations


def value_bytes(config: Config, gpu: bool) -> int:
    """Bytes of a weight or an activation in the forward and backward pass."""
    return 2 if config.engine.precision == "bf16" or (config.engine.precision == "auto" and gpu) else 4


def released(config: Config, elements: int) -> float:
    """Elements that stage 3 gathers again for the backward pass: those whose next use is too far off to wait for.

    Between a use in the forward pass and the next lie twice the weights behind it, or, computed again, three times.
    """
    return max(elements - REUSE / (3 if config.engine.activation_checkpointing else 2), 0)


@dataclass(frozen=True)
class _Rank:
    """What the moments of a rank are made of."""

    config: Config
    costs: Sequence[LayerCost]
    layout: Layout
    stage: int
    gpu: bool

    @cached_property
    def width(self) -> int:
        """Bytes of a value."""
        return value_bytes(self.config, self.gpu)

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each weight, as tensor parallelism cuts it."""
        return [weight.elements(self.layout.tensor_parallel) for cost in self.costs for weight in cost.weights]

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
        """AdamW's own bytes an element: the root of the second moment, and without fused loops its quotient too."""
        return 4 if self.gpu else 8

    @property
    def bucket(self) -> int:
        return self.width * REDUCE_BUCKET

    @property
    def reduced(self) -> int:
        """A copy of what is in the bucket."""
        return self.width * min(self.n, REDUCE_BUCKET)

    @property
    def pixels(self) -> int:
        """Bytes of the images of all micro-steps, in uint8."""
        return 3 * self.config.model.image.size**2 * self.layout.micro_batch * self.layout.micro_steps

    @cached_property
    def kept(self) -> list[float]:
        """Bytes that the forward pass of each layer leaves."""
        B, tp = self.layout.micro_batch, self.layout.tensor_parallel
        return [B * cost.footprint.kept(self.width, tp) for cost in self.costs]

    @cached_property
    def stay(self) -> list[float]:
        """What of them waits for the backward pass: of a layer that is computed again its input alone."""
        again, B = self.config.engine.activation_checkpointing, self.layout.micro_batch
        return [
            B * self.width * cost.footprint.input if again and cost.recomputed_flops else full
            for cost, full in zip(self.costs, self.kept, strict=True)
        ]

    @cached_property
    def activations(self) -> float:
        """Bytes at the fullest moment of the backward pass, gradients of activations and of one weight included."""
        B, tp = self.layout.micro_batch, self.layout.tensor_parallel
        most, before = 0.0, sum(self.stay)
        for cost, full, less in zip(reversed(self.costs), reversed(self.kept), reversed(self.stay), strict=True):
            before -= less
            one_gradient = self.width * max(weight.elements(tp) for weight in cost.weights)
            contrastive = _contrastive(self.config, self.layout) if cost.name == "align" else 0
            alive = before + full + B * cost.footprint.work(self.width, tp) + contrastive
            most = max(most, alive + one_gradient)
        in_flight = min(self.layout.pipeline_parallel - self.stage, self.layout.micro_steps)
        besides = (in_flight - 1) * sum(self.stay) + self.pixels
        return most + besides


def _contrastive(config: Config, layout: Layout) -> float:
    """Bytes of the contrastive loss on a rank: gathered embeddings, and the logits that exist at a time."""
    G = contrasted(config)
    rows = layout.micro_batch * (layout.micro_steps if config.training.global_batch == G else 1)
    logits = min(rows * G, MAX_LOGITS)
    directions = 1 if rows * G > MAX_LOGITS else 2
    return 2 * 4 * G * config.model.embed + logits * (9 * directions + 8)


def _moments(rank: _Rank) -> Moments:
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


def _without_zero(rank: _Rank) -> Moments:
    n = rank.n
    held = {"weights": rank.width * n, "gradients": 4 * n, "optimizer": (8 if rank.width == 4 else 12) * n}
    updated = n if rank.gpu else max(rank.sizes)
    return {
        "backward pass": held | {"activations": rank.activations},
        "update": held | {"activations": rank.pixels, "working space": rank.update * updated},
    }


def _stage_1_in_bf16(rank: _Rank) -> Moments:
    """Gradients in bf16 stay, those in fp32 are whole on every rank."""
    n = rank.n
    held = {"weights": 2 * n, "gradients": 2 * n + 4 * n, "optimizer": 12 * rank.share}
    buffers = 2 * n + (4 * n if n < REDUCE_BUCKET else 0)
    return {
        "backward pass": held | {"activations": rank.activations},
        "reduction": held | {"activations": rank.pixels, "buffers": buffers},
        "update": held | {"activations": rank.pixels, "working space": rank.update * rank.share},
    }


def _stage_1(rank: _Rank) -> Moments:
    """In fp32, or with the optimizer's state in host memory."""
    n, width, share, piped = rank.n, rank.width, rank.share, rank.layout.pipeline_parallel > 1
    held = {"weights": width * n, "optimizer": 12 * share * rank.on_device}
    return {
        "backward pass": held | {"gradients": width * n, "activations": rank.activations, "buffers": rank.bucket},
        "reduction": held
        | {
            "gradients": width * max(share, n if piped else 0),
            "activations": rank.pixels,
            "buffers": rank.bucket * (2 if piped else 1) + (rank.reduced if rank.layout.data_parallel > 1 else 0),
        },
        "update": held | {"gradients": (4 + width) * share, "working space": rank.update * share * rank.on_device},
    }


def _stage_2(rank: _Rank) -> Moments:
    share = rank.share
    held = {"weights": rank.width * rank.n, "optimizer": 12 * share * rank.on_device}
    gradients = {"gradients": 4 * share}  # in fp32 the first ones stay in the bucket
    earlier = gradients if rank.width == 2 or rank.layout.micro_steps > 1 else {}
    buffers = rank.bucket * (2 if rank.gpu else 1)
    work = (4 + rank.update) * share * rank.on_device
    return {
        "backward pass": held | earlier | {"activations": rank.activations, "buffers": buffers},
        "reduction": held | gradients | {"activations": rank.pixels, "buffers": buffers + rank.reduced},
        "update": held | gradients | {"activations": rank.pixels, "working space": work},
    }


def _stage_3(rank: _Rank) -> Moments:
    width, share, tp = rank.width, rank.share, rank.layout.tensor_parallel
    small = sum(size for size in rank.sizes if size < PERSISTENT)
    cut = rank.n - small
    largest = max(sum(weight.elements(tp) for weight in cost.weights) for cost in rank.costs)
    gathered = width * min(cut, REUSE / 2 + PREFETCH + largest)
    # What one fetch brings stays in its buffer until the last of it is used, besides being weights.
    fetched, fetched_again = (width * min(elements, PREFETCH) for elements in (cut, released(rank.config, cut)))
    # A block without a graph holds about half of what it else keeps.
    running = max(full - less for full, less in zip(rank.kept, rank.stay, strict=True)) / 2
    held = {
        "weights": width * (share + small),
        "gradients": (4 if rank.layout.micro_steps > 1 else width) * share * rank.on_device,
        "optimizer": 12 * share * rank.on_device,
        "buffers": rank.bucket,
    }
    forward = {"activations": sum(rank.stay) + running + rank.pixels, "gathered weights": gathered + fetched}
    backward = {"activations": rank.activations, "gathered weights": gathered + fetched_again}
    reduction = {"activations": rank.pixels, "gathered weights": gathered, "buffers": rank.bucket + rank.reduced}
    part = min(share, SUB_GROUP) * rank.on_device
    return {
        "forward pass": held | forward,
        "backward pass": held | backward,
        "reduction": held | reduction,
        "update": held | {"activations": rank.pixels, "working space": (4 + rank.update) * part},
    }
