"""What a model is made of and what it costs, as arithmetic on the config: no weights, no torch.

Shapes: P patches, L text length, D width, E embedding width, K masked slots, V vocabulary, G samples that the
contrastive loss compares. A FLOP is an addition or a multiplication: matrices (m, k) and (k, n) multiply in 2 m k n.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from pretrain.config import Config

CONTRASTIVE, MATCHING, MASKED_LM = "contrastive", "matching", "masked_lm"
MAX_LOGITS = 1 << 26  # of the contrastive loss at a time; equal to the one in pretrain.objectives.contrastive
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's `reduce_bucket_size`, taken whether the model is as large or not
PREFETCH = 50_000_000  # elements; its `stage3_prefetch_bucket_size`
REUSE = 1_000_000_000  # elements; its `stage3_max_reuse_distance`: what is used again sooner stays gathered
PERSISTENT = 100_000  # elements; its `stage3_param_persistence_threshold`: smaller weights are not partitioned
SUB_GROUP = 1_000_000_000  # elements; its `sub_group_size`: what stage 3 updates at a time


@dataclass(frozen=True)
class Weight:
    """A parameter: its canonical name, its shape, and the dim that tensor parallelism cuts, if any."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None

    def elements(self, tensor_parallel: int = 1) -> int:
        """Elements on the first of `tensor_parallel` ranks, which holds no less than any other."""
        return _elements(self.shape, self.cut, tensor_parallel)


@cache
def _elements(shape: tuple[int, ...], cut: int | None, tensor_parallel: int) -> int:
    return math.prod(-(-size // tensor_parallel) if dim == cut else size for dim, size in enumerate(shape))


@dataclass(frozen=True)
class Footprint:
    """Elements a sample that a layer's forward pass leaves for its backward pass, and what that needs besides.

    `whole` is on every tensor-parallel rank, `shared` is divided over them, `shared_fp32` takes four bytes in bf16 too.
    """

    input: float = 0  # all that stays if the layer is computed again
    whole: float = 0
    shared: float = 0
    shared_fp32: float = 0
    work_whole: float = 0  # gradients that exist at the same time, at the fullest moment of the backward pass
    work_shared: float = 0
    work_shared_fp32: float = 0

    def kept(self, value_bytes: int, tensor_parallel: int) -> float:
        """Bytes a sample, the input included."""
        shared = value_bytes * self.shared + 4 * self.shared_fp32
        return value_bytes * (self.input + self.whole) + shared / tensor_parallel

    def work(self, value_bytes: int, tensor_parallel: int) -> float:
        """Bytes a sample."""
        shared = value_bytes * self.work_shared + 4 * self.work_shared_fp32
        return value_bytes * self.work_whole + shared / tensor_parallel


@dataclass(frozen=True)
class LayerCost:
    """One layer of the list that `pretrain.models.architectures.layer_specs` returns."""

    name: str
    weights: tuple[Weight, ...]
    flops: Mapping[tuple[str, ...], float]
    """Forward FLOPs a sample, by the objectives that need them."""
    footprint: Footprint = Footprint()
    shards_entered: float = 0
    """Elements a sample that tensor-parallel ranks sum in the backward pass, ..."""
    shards_left: float = 0
    """... and in the forward pass (and, but for those behind the last matrix, where it is computed again)."""
    recomputed_flops: float = 0
    """Of a block, what `engine.activation_checkpointing` computes again: all but the last matrix."""

    @cached_property
    def parameters(self) -> int:
        return sum(weight.elements() for weight in self.weights)

    @cached_property
    def forward_flops(self) -> float:
        """FLOPs a sample in the forward pass of a training step, all of the layer's rows together.

        Left out: normalisation, activations and softmax, whose additions a matrix unit does not run, and the
        similarities among which hard negatives are mined, 4 E for each other sample of the rank.
        """
        return sum(self.flops.values())


def layers(config: Config, vocabulary: int) -> list[LayerCost]:
    """The layers of the configured architecture, in order.

    The image tower has one row of P tokens a sample; the text tower one of L tokens, and one more for the masked
    caption; fusion layers three for matching (the pair, another image, another caption) and one for the masked caption.

    Args:
        config: the whole config.
        vocabulary: tokens of the tokenizer.
    """
    model, objectives = config.model, config.objectives
    P, L, D, E = model.image.num_patches, model.text.length, model.text.width, model.embed
    on = [MATCHING] * (objectives.matching is not None) + [MASKED_LM] * (objectives.masked_lm is not None)
    everyone = (CONTRASTIVE, *on)
    clean = tuple(name for name in everyone if name != MASKED_LM)
    sigmoid = objectives.contrastive.loss == "sigmoid"
    # Rows of L tokens a sample, by the objectives that need them.
    text_rows = {clean: 1} | ({(MASKED_LM,): 1} if MASKED_LM in on else {})
    fusion_rows = {(name,): {MATCHING: 3, MASKED_LM: 1}[name] for name in on}

    patch_values = 3 * model.image.patch**2
    found = [
        LayerCost(
            "image_embed",
            (
                Weight("image_embed.position", (P, model.image.width)),
                *_linear("image_embed.project", patch_values, model.image.width),
            ),
            {everyone: 2.0 * P * patch_values * model.image.width},
            Footprint(input=P * patch_values),
        )
    ]
    image_flops = {everyone: _self_attention_flops(P, model.image.width) + _perceptron_flops(P, model.image.width)}
    for number in range(model.image.depth):
        name = f"image_block_{number}"
        found.append(_block(name, image_flops, P, model.image.width))
    image_values = P * model.image.width
    norm_kept = Footprint(input=image_values, whole=image_values if on else 0)  # what fusion blocks look at
    found.append(LayerCost("image_norm", _norm("image_norm.norm", model.image.width), {}, norm_kept))

    found.append(
        LayerCost(
            "text_embed",
            (Weight("text_embed.position", (L, D)), Weight("text_embed.token.weight", (vocabulary, D), cut=0)),
            {},
            shards_left=sum(text_rows.values()) * L * D,
        )
    )
    row_flops = _self_attention_flops(L, D) + _perceptron_flops(L, D)
    text_flops = {needed: rows * row_flops for needed, rows in text_rows.items()}
    for number in range(model.text.depth):
        name = f"text_block_{number}"
        found.append(_block(name, text_flops, sum(text_rows.values()) * L, D))

    align = (
        Weight("align.image_project.weight", (E, model.image.width)),
        *_norm("align.text_norm", D),
        Weight("align.text_project.weight", (E, D)),
        Weight("align.temperature.log_scale", (1,)),
        *([Weight("align.temperature.bias", (1,))] if sigmoid else []),
    )
    logits = (1 if sigmoid else 2) * 2.0 * E * contrasted(config)  # the softmax goes both directions
    found.append(
        LayerCost("align", align, _summed((clean, 2.0 * E * (model.image.width + D)), ((CONTRASTIVE,), logits)))
    )

    if model.fusion is not None:
        cross_row = 2 * 2.0 * L * D**2 + 4.0 * L * P * D  # query and output; scores and mixing
        by_rows = [(needed, rows * (row_flops + cross_row)) for needed, rows in fusion_rows.items()]
        images = images_held(config)  # keys and values once an image, whatever the number of rows
        keys_and_values = images * 2.0 * P * model.image.width * 2 * D
        fusion_flops = _summed(*by_rows, (tuple(on), keys_and_values))
        for number in range(model.fusion.depth):
            name = f"fusion_block_{number}"
            tokens = sum(fusion_rows.values()) * L
            memory_tokens = sum(fusion_rows.values()) * P
            found.append(_block(name, fusion_flops, tokens, D, (memory_tokens, images * P, model.image.width)))
    if MATCHING in on:
        weights = (*_norm("matching_head.norm", D), *_linear("matching_head.classify", D, 2))
        found.append(LayerCost("matching_head", weights, {(MATCHING,): 3 * 2.0 * D * 2}))
    if MASKED_LM in on:
        name = "masked_lm_head"
        weights = (
            *_norm(f"{name}.norm", D),
            *_linear(f"{name}.transform", D, D),
            *_norm(f"{name}.transform_norm", D),
            *_linear(f"{name}.decode", D, vocabulary, "column"),
        )
        slots = masked_slots(config)
        flops = {(MASKED_LM,): 2.0 * slots * D * (D + vocabulary)}
        logits = slots * vocabulary  # their exponentials stay; on the way back a gradient of these and one of each
        found.append(
            LayerCost(
                name,
                weights,
                flops,
                Footprint(whole=6 * slots * D, shared_fp32=logits, work_shared_fp32=2 * logits),
                shards_entered=slots * D,
            )
        )
    return found


def stages(config: Config, vocabulary: int, num_stages: int) -> list[range]:
    """Cuts the list of layers into runs, one a pipeline stage, none empty.

    The most forward FLOPs that any stage has are as few as they can be; among such cuts later stages are the fuller
    ones, since earlier ones keep the activations of more micro-batches.
    """
    return cut_evenly(tuple(layer.forward_flops for layer in layers(config, vocabulary)), num_stages)


@cache
def cut_evenly(costs: tuple[float, ...], num_parts: int) -> list[range]:
    """Cuts a list of whole numbers into `num_parts` runs, none empty, whose largest sum is as small as it can be."""
    assert 1 <= num_parts <= len(costs), f"{len(costs)} layers cannot be cut into {num_parts} stages"
    low, high = max(costs) - 1, sum(costs)  # too small a bound, and one that holds
    while high - low > 1:
        bound = (low + high) // 2
        if _fill(costs, num_parts, bound):
            high = bound
        else:
            low = bound
    return _fill(costs, num_parts, high)


def _fill(costs: Sequence[float], num_parts: int, bound: float) -> list[range]:
    """Runs none of which sums to more than `bound`, each as long as it can be, from the last; [] if there are none."""
    parts, stop = [], len(costs)
    for before in reversed(range(num_parts)):  # each part before this one needs a layer
        start, total = stop, 0.0
        while start > before and total + costs[start - 1] <= bound:
            start -= 1
            total += costs[start]
        parts.append(range(start, stop))
        stop = start
    return parts[::-1] if stop == 0 else []


def masked_slots(config: Config) -> int:
    """K: pieces of a caption that are predicted at most (`data_pipelines.masking.num_masked_slots`, without numpy)."""
    masked_lm = config.objectives.masked_lm
    if masked_lm is None:
        return 0
    return max(1, math.ceil(masked_lm.probability * (config.model.text.length - 2)))


def contrasted(config: Config) -> int:
    """G: samples that stand against each other in the contrastive loss."""
    if config.objectives.contrastive.negatives == "global_batch":
        return config.training.global_batch
    return config.training.global_batch // config.training.accumulation


def _summed(*costs: tuple[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    totals: dict[tuple[str, ...], float] = {}
    for needed, flops in costs:
        totals[needed] = totals.get(needed, 0.0) + flops
    return totals


def images_held(config: Config) -> int:
    """Images a sample that fusion layers look at: its own, and a negative that came from another rank."""
    matching = config.objectives.matching
    return 2 if matching is not None and matching.pool > config.data.grain else 1


def _self_attention_flops(tokens: int, width: int) -> float:
    return 8.0 * tokens * width**2 + 4.0 * tokens**2 * width  # query, key, value and output; scores and mixing


def _perceptron_flops(tokens: int, width: int) -> float:
    return 16.0 * tokens * width**2


def _block(
    name: str,
    flops: Mapping[tuple[str, ...], float],
    tokens: int,
    width: int,
    memory: tuple[int, int, int] | None = None,
) -> LayerCost:
    """A transformer block over so many tokens a sample.

    `memory`, for one that attends to images: tokens of the images of all rows, tokens of an image, their width.
    """
    values = tokens * width
    cross = ()
    whole, shared = 3 * values, 12 * values  # two norms and a sum; query, key, value, mixed, and 4 D twice
    entered, left = 2 * values, 2 * values
    if memory is not None:
        memory_tokens, image_tokens, memory_width = memory
        cross = (
            *_norm(f"{name}.cross_norm", width),
            *_linear(f"{name}.cross.query", width, width, "column"),
            *_linear(f"{name}.cross.key_value", memory_width, 2 * width, "column"),
            *_linear(f"{name}.cross.out", width, width, "row"),
        )
        whole, shared = whole + 2 * values, shared + 2 * values + 2 * memory_tokens * width
        entered, left = entered + values + image_tokens * memory_width, left + values
    weights = (
        *_norm(f"{name}.attention_norm", width),
        *_linear(f"{name}.attention.qkv", width, 3 * width, "column"),
        *_linear(f"{name}.attention.out", width, width, "row"),
        *cross,
        *_norm(f"{name}.mlp_norm", width),
        *_linear(f"{name}.mlp.up", width, 4 * width, "column"),
        *_linear(f"{name}.mlp.down", 4 * width, width, "row"),
    )
    footprint = Footprint(values, whole, shared, work_whole=values, work_shared=4 * values)
    return LayerCost(name, weights, flops, footprint, entered, left, sum(flops.values()) - 8.0 * values * width)


def _norm(name: str, width: int) -> tuple[Weight, ...]:
    return Weight(f"{name}.weight", (width,)), Weight(f"{name}.bias", (width,))


def _linear(name: str, fan_in: int, fan_out: int, cut: str | None = None) -> tuple[Weight, ...]:
    """`cut` is the word that tensor parallelism's plan has for it: column or row."""
    weight_cut = {"column": 0, "row": 1, None: None}[cut]
    bias_cut = 0 if cut == "column" else None
    return Weight(f"{name}.weight", (fan_out, fan_in), weight_cut), Weight(f"{name}.bias", (fan_out,), bias_cut)


@dataclass(frozen=True)
class Layout:
    """How the samples of a step and the layers of the model lie on the ranks."""

    data_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    micro_batch: int
    """Samples of a micro-step on a rank."""
    micro_steps: int


def layout_of(config: Config, world: int) -> Layout:
    """The layout of the config on `world` ranks, which its degrees divide."""
    engine, training = config.engine, config.training
    data_parallel = engine.data_parallel or world // (engine.tensor_parallel * engine.pipeline_parallel)
    micro_batch = training.global_batch // (data_parallel * training.accumulation)
    return Layout(data_parallel, engine.tensor_parallel, engine.pipeline_parallel, micro_batch, training.accumulation)


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
    moments = _moments(config, costs, layout, stage, gpu)
    return max((Memory(name, items) for name, items in moments.items()), key=lambda memory: memory.total)


def value_bytes(config: Config, gpu: bool) -> int:
    """Bytes of a weight or an activation in the forward and backward pass."""
    return 2 if config.engine.precision == "bf16" or (config.engine.precision == "auto" and gpu) else 4


def _moments(
    config: Config, costs: Sequence[LayerCost], layout: Layout, stage: int, gpu: bool
) -> Mapping[str, Mapping[str, float]]:
    engine, B, tp, dp = config.engine, layout.micro_batch, layout.tensor_parallel, layout.data_parallel
    width = value_bytes(config, gpu)
    sizes = [weight.elements(tp) for cost in costs for weight in cost.weights]
    n = sum(sizes)
    share = n / dp
    on_device = 0 if engine.offload == "cpu" else 1
    # AdamW's own working space: the root of the second moment, and without fused loops its quotient too.
    update = 4 if gpu else 8

    recompute = engine.activation_checkpointing
    in_flight = min(layout.pipeline_parallel - stage, layout.micro_steps)
    kept = [B * cost.footprint.kept(width, tp) for cost in costs]
    stay = [
        B * width * cost.footprint.input if recompute and cost.recomputed_flops else full
        for cost, full in zip(costs, kept, strict=True)
    ]
    pixels = 3 * config.model.image.size**2 * B * layout.micro_steps  # uint8, of all micro-steps
    activations, before = 0.0, sum(stay)
    for cost, full, less in zip(reversed(costs), reversed(kept), reversed(stay), strict=True):
        before -= less
        one_gradient = width * max(weight.elements(tp) for weight in cost.weights)
        alive = before + full + B * cost.footprint.work(width, tp) + _contrastive(config, layout, cost.name)
        activations = max(activations, alive + one_gradient)
    activations += (in_flight - 1) * sum(stay) + pixels

    stage_1_in_bf16 = engine.zero_stage == 1 and width == 2 and on_device
    piped = layout.pipeline_parallel > 1
    bucket = width * REDUCE_BUCKET
    reduced = width * min(n, REDUCE_BUCKET)  # a copy of what is in the bucket
    match engine.zero_stage:
        case 0:
            held = {"weights": width * n, "gradients": 4 * n, "optimizer": (8 if width == 4 else 12) * n}
            return {
                "backward pass": held | {"activations": activations},
                "update": held | {"activations": pixels, "working space": update * (n if gpu else max(sizes))},
            }
        case 1 if stage_1_in_bf16:  # gradients in bf16 stay, those in fp32 are whole on every rank
            held = {"weights": 2 * n, "gradients": 2 * n + 4 * n, "optimizer": 12 * share}
            return {
                "backward pass": held | {"activations": activations},
                "reduction": held | {"activations": pixels, "buffers": 2 * n + (4 * n if n < REDUCE_BUCKET else 0)},
                "update": held | {"activations": pixels, "working space": update * share},
            }
        case 1:
            held = {"weights": width * n, "optimizer": 12 * share * on_device}
            return {
                "backward pass": held | {"gradients": width * n, "activations": activations, "buffers": bucket},
                "reduction": held
                | {
                    "gradients": width * max(share, n if piped else 0),
                    "activations": pixels,
                    "buffers": bucket * (2 if piped else 1) + (reduced if dp > 1 else 0),
                },
                "update": held | {"gradients": (4 + width) * share, "working space": update * share * on_device},
            }
        case 2:
            held = {"weights": width * n, "optimizer": 12 * share * on_device}
            gradients = {"gradients": 4 * share}  # in fp32 the first ones stay in the bucket
            earlier = gradients if width == 2 or layout.micro_steps > 1 else {}
            buffers = bucket * (2 if gpu else 1)
            return {
                "backward pass": held | earlier | {"activations": activations, "buffers": buffers},
                "reduction": held | gradients | {"activations": pixels, "buffers": buffers + reduced},
                "update": held | gradients | {"activations": pixels, "working space": (4 + update) * share * on_device},
            }
        case 3:
            small = sum(size for size in sizes if size < PERSISTENT)
            largest = max(sum(weight.elements(tp) for weight in cost.weights) for cost in costs)
            gathered = width * min(n - small, REUSE / 2 + PREFETCH + largest)
            # What one fetch brings stays in its buffer until the last of it is used, besides being weights.
            fetched, fetched_again = (
                width * min(elements, PREFETCH) for elements in (n - small, _released(config, n - small))
            )
            held = {
                "weights": width * (share + small),
                "gradients": (4 if layout.micro_steps > 1 else width) * share * on_device,
                "optimizer": 12 * share * on_device,
                "buffers": bucket,
            }
            part = min(share, SUB_GROUP) * on_device
            # A block without a graph holds about half of what it else keeps.
            running = max(full - less for full, less in zip(kept, stay, strict=True)) / 2
            return {
                "forward pass": held
                | {
                    "activations": sum(stay) + running + pixels,
                    "gathered weights": gathered + fetched,
                },
                "backward pass": held | {"activations": activations, "gathered weights": gathered + fetched_again},
                "reduction": held | {"activations": pixels, "gathered weights": gathered, "buffers": bucket + reduced},
                "update": held | {"activations": pixels, "working space": (4 + update) * part},
            }
    raise AssertionError("config allows no other stage")


def _contrastive(config: Config, layout: Layout, layer: str) -> float:
    """Bytes of the contrastive loss on a rank: gathered embeddings, and the logits that exist at a time."""
    if layer != "align":
        return 0
    G = contrasted(config)
    rows = layout.micro_batch * (layout.micro_steps if config.training.global_batch == G else 1)
    logits = min(rows * G, MAX_LOGITS)
    directions = 1 if rows * G > MAX_LOGITS else 2
    return 2 * 4 * G * config.model.embed + logits * (9 * directions + 8)


@dataclass(frozen=True)
class Transfer:
    """What a rank exchanges in an optimizer step for one purpose, along one axis of the mesh."""

    what: str
    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, point-to-point
    axis: str  # dp, tp, pp
    size: float
    """Bytes: of all-gathers what comes out, of reduce-scatters what goes in, else what the rank hands over."""
    messages: float
    overlapped: bool = False
    """Runs while the GPU computes."""


def transfers(
    config: Config,
    costs: Sequence[LayerCost],
    layout: Layout,
    borders: tuple[float, float] = (0, 0),
    *,
    gpu: bool = True,
) -> list[Transfer]:
    """What a rank that holds the layers `costs` exchanges in a step. Left out: losses, norms and signs of life.

    Args:
        config: the whole config.
        costs: the rank's own layers.
        layout: how samples and layers lie on the ranks.
        borders: bytes a sample that cross the border before these layers and the one behind them; see `parcel`.
        gpu: bf16 if the config leaves it open.
    """
    found: list[Transfer] = []
    if layout.data_parallel > 1:
        found += _weight_transfers(config, costs, layout, gpu)
        if any(cost.name == "align" for cost in costs):
            found += _align_transfers(config, layout, gpu)
    B, steps = layout.micro_batch, layout.micro_steps
    if layout.tensor_parallel > 1:
        twice = config.engine.activation_checkpointing
        elements = sum(cost.shards_entered + cost.shards_left for cost in costs)
        if twice:
            elements += sum(cost.shards_left - cost.footprint.input for cost in costs if cost.recomputed_flops)
        towers = sum(cost.shards_left for cost in _towers(costs)) if _two_passes(config) else 0
        size = value_bytes(config, gpu) * B * steps * (elements + towers)
        messages = steps * sum(4 + twice for cost in costs if cost.recomputed_flops)
        found.append(Transfer("activations of cut matrices", "all-reduce", "tp", size, messages))
        if costs[-1].name == "masked_lm_head":
            size = 20 * B * steps * masked_slots(config)  # two sums and a maximum in fp32, one of int64
            found.append(Transfer("softmax over the vocabulary", "all-reduce", "tp", size, 4 * steps))
    if layout.pipeline_parallel > 1:
        size = B * steps * sum(borders)  # activations to the next stage, gradients to the one before
        found.append(Transfer("activations and their gradients", "point-to-point", "pp", size, 2 * steps))
    return found


def _weight_transfers(config: Config, costs: Sequence[LayerCost], layout: Layout, gpu: bool) -> list[Transfer]:
    """What ZeRO exchanges over the data-parallel ranks."""
    width, steps = value_bytes(config, gpu), layout.micro_steps
    sizes = [weight.elements(layout.tensor_parallel) for cost in costs for weight in cost.weights]
    n = sum(sizes)
    buckets = math.ceil(n / REDUCE_BUCKET)
    match config.engine.zero_stage:
        case 0:
            return [Transfer("gradients", "all-reduce", "dp", 4 * n, 1)]
        case 1:
            return [
                Transfer("gradients", "all-reduce", "dp", width * n, buckets),
                Transfer("updated weights", "all-gather", "dp", width * n, 3),
            ]
        case 2:  # it sums whole buckets and keeps its share of them
            return [
                Transfer("gradients", "all-reduce", "dp", width * n * steps, buckets * steps, overlapped=True),
                Transfer("updated weights", "all-gather", "dp", width * n, 3),
            ]
        case 3:
            small = sum(size for size in sizes if size < PERSISTENT)
            cut = n - small
            gathered = cut + _released(config, cut)
            if _two_passes(config):
                gathered += sum(weight.elements(layout.tensor_parallel) for c in _towers(costs) for weight in c.weights)
            fetches = math.ceil(gathered / PREFETCH)
            return [
                Transfer("weights", "all-gather", "dp", width * gathered * steps, fetches * steps, overlapped=True),
                Transfer("gradients", "reduce-scatter", "dp", width * n * steps, buckets * steps, overlapped=True),
                Transfer("updated small weights", "all-gather", "dp", width * small, 1),
            ]
    raise AssertionError("config allows no other stage")


def _released(config: Config, elements: int) -> float:
    """Elements that stage 3 gathers again for the backward pass: those whose next use is too far off to wait for.

    Between a use in the forward pass and the next lie twice the weights behind it, or, computed again, three times.
    """
    return max(elements - REUSE / (3 if config.engine.activation_checkpointing else 2), 0)


def _align_transfers(config: Config, layout: Layout, gpu: bool) -> list[Transfer]:
    """What the contrastive objective and mining exchange over the data-parallel ranks."""
    model, matching, steps = config.model, config.objectives.matching, layout.micro_steps
    E, B, G = model.embed, layout.micro_batch, contrasted(config)
    rounds = 1 if _two_passes(config) else steps
    found = [Transfer("ids", "all-gather", "dp", 16 * G * rounds, 2 * rounds)]
    if config.objectives.contrastive.loss == "softmax":
        found += [
            Transfer("embeddings", "all-gather", "dp", 2 * 4 * G * E * rounds, 2 * rounds),
            Transfer("gradients of embeddings", "reduce-scatter", "dp", 2 * 4 * G * E * rounds, 2 * rounds),
        ]
    else:
        hops = layout.data_parallel * rounds
        found.append(Transfer("embeddings in a ring", "point-to-point", "dp", 4 * G * (2 * E + 1) * rounds, hops))
    if matching is not None and images_held(config) == 2:
        micro = B * layout.data_parallel
        tokens = B * (model.image.num_patches * model.image.width + model.text.length * model.text.width)
        size = steps * (2 * value_bytes(config, gpu) * tokens + 8 * B * model.text.length)
        found += [
            Transfer("embeddings to mine", "all-gather", "dp", steps * micro * (2 * 4 * E + 40), 7 * steps),
            Transfer("tokens of negatives", "all-to-all", "dp", size, 5 * steps),
        ]
    return found


def parcel(config: Config, costs: Sequence[LayerCost], border: int, gpu: bool = True) -> float:
    """Bytes a sample that cross the border before layer number `border` of the whole list, 0 at either end.

    Gradients of the same size come back, those of the int64 masks and indices included.
    """
    if border in (0, len(costs)):
        return 0
    names = {cost.name for cost in costs[:border]}
    model, objectives = config.model, config.objectives
    L, width = model.text.length, value_bytes(config, gpu)
    image, text = model.image.num_patches * model.image.width, L * model.text.width
    if "align" in names:
        rows = 3 * (objectives.matching is not None) + (objectives.masked_lm is not None)
        ids = rows * (L + 1) + 3 * (objectives.matching is not None)
        return width * (image * images_held(config) + rows * text) + 8 * ids + 2 * 4 * model.embed
    rows = (1 + (objectives.masked_lm is not None)) if "text_embed" in names else 0
    return width * (image + rows * text)


def step_flops(config: Config, costs: Sequence[LayerCost]) -> float:
    """FLOPs a sample that a training step executes: three forward passes' and what is computed again."""
    again = config.engine.activation_checkpointing
    flops = sum(3 * cost.forward_flops + (cost.recomputed_flops if again else 0) for cost in costs)
    return flops + (sum(cost.forward_flops for cost in _towers(costs)) if _two_passes(config) else 0)


def _two_passes(config: Config) -> bool:
    return config.objectives.contrastive.negatives == "global_batch"


def _towers(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """What runs once more, without gradient, to contrast the global batch; on the clean captions alone."""
    return [cost for cost in costs if cost.name.startswith(("image_", "text_"))]
