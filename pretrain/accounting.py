"""What a model is made of and what it costs, as arithmetic on the config: no weights, no torch.

Shapes: P patches, L text length, D width, E embedding width, K masked slots, V vocabulary, G samples that the
contrastive loss compares. A FLOP is an addition or a multiplication: matrices (m, k) and (k, n) multiply in 2 m k n.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pretrain.config import Config

CONTRASTIVE, MATCHING, MASKED_LM = "contrastive", "matching", "masked_lm"


@dataclass(frozen=True)
class Weight:
    """A parameter: its canonical name, its shape, and the dim that tensor parallelism cuts, if any."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None

    def elements(self, tensor_parallel: int = 1) -> int:
        """Elements on the first of `tensor_parallel` ranks, which holds no less than any other."""
        return math.prod(
            -(-size // tensor_parallel) if dim == self.cut else size for dim, size in enumerate(self.shape)
        )


@dataclass(frozen=True)
class LayerCost:
    """One layer of the list that `pretrain.models.architectures.layer_specs` returns."""

    name: str
    weights: tuple[Weight, ...]
    flops: Mapping[tuple[str, ...], float]
    """Forward FLOPs a sample, by the objectives that need them."""

    @cached_property
    def parameters(self) -> int:
        return sum(weight.elements() for weight in self.weights)

    @cached_property
    def forward_flops(self) -> float:
        """FLOPs a sample in the forward pass of a training step, all of the layer's rows together.

        Left out: normalisation, activations and softmax, whose additions a matrix unit does not run, and the
        similarities among which hard negatives are mined, 2 E for each other sample of the rank.
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
        )
    ]
    image_flops = {everyone: _self_attention_flops(P, model.image.width) + _perceptron_flops(P, model.image.width)}
    for number in range(model.image.depth):
        name = f"image_block_{number}"
        found.append(LayerCost(name, _block(name, model.image.width), image_flops))
    found.append(LayerCost("image_norm", _norm("image_norm.norm", model.image.width), {}))

    found.append(
        LayerCost(
            "text_embed",
            (Weight("text_embed.position", (L, D)), Weight("text_embed.token.weight", (vocabulary, D), cut=0)),
            {},
        )
    )
    row_flops = _self_attention_flops(L, D) + _perceptron_flops(L, D)
    text_flops = {needed: rows * row_flops for needed, rows in text_rows.items()}
    for number in range(model.text.depth):
        name = f"text_block_{number}"
        found.append(LayerCost(name, _block(name, D), text_flops))

    align = (
        Weight("align.image_project.weight", (E, model.image.width)),
        *_norm("align.text_norm", D),
        Weight("align.text_project.weight", (E, D)),
        Weight("align.temperature.log_scale", (1,)),
    )
    logits = 2 * 2.0 * E * contrasted(config)  # both directions
    found.append(
        LayerCost("align", align, _summed((clean, 2.0 * E * (model.image.width + D)), ((CONTRASTIVE,), logits)))
    )

    if model.fusion is not None:
        cross_row = 2 * 2.0 * L * D**2 + 4.0 * L * P * D  # query and output; scores and mixing
        by_rows = [(needed, rows * (row_flops + cross_row)) for needed, rows in fusion_rows.items()]
        keys_and_values = 2.0 * P * model.image.width * 2 * D  # once an image, whatever the number of rows
        fusion_flops = _summed(*by_rows, (tuple(on), keys_and_values))
        for number in range(model.fusion.depth):
            name = f"fusion_block_{number}"
            found.append(LayerCost(name, _block(name, D, memory_width=model.image.width), fusion_flops))
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
        found.append(LayerCost(name, weights, {(MASKED_LM,): 2.0 * masked_slots(config) * D * (D + vocabulary)}))
    return found


def stages(config: Config, vocabulary: int, num_stages: int) -> list[range]:
    """Cuts the list of layers into runs, one a pipeline stage, none empty.

    The most forward FLOPs that any stage has are as few as they can be; among such cuts later stages are the fuller
    ones, since earlier ones keep the activations of more micro-batches.
    """
    return cut_evenly([layer.forward_flops for layer in layers(config, vocabulary)], num_stages)


def cut_evenly(costs: Sequence[float], num_parts: int) -> list[range]:
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


def _self_attention_flops(tokens: int, width: int) -> float:
    return 8.0 * tokens * width**2 + 4.0 * tokens**2 * width  # query, key, value and output; scores and mixing


def _perceptron_flops(tokens: int, width: int) -> float:
    return 16.0 * tokens * width**2


def _block(name: str, width: int, memory_width: int | None = None) -> tuple[Weight, ...]:
    cross = ()
    if memory_width is not None:
        cross = (
            *_norm(f"{name}.cross_norm", width),
            *_linear(f"{name}.cross.query", width, width, "column"),
            *_linear(f"{name}.cross.key_value", memory_width, 2 * width, "column"),
            *_linear(f"{name}.cross.out", width, width, "row"),
        )
    return (
        *_norm(f"{name}.attention_norm", width),
        *_linear(f"{name}.attention.qkv", width, 3 * width, "column"),
        *_linear(f"{name}.attention.out", width, width, "row"),
        *cross,
        *_norm(f"{name}.mlp_norm", width),
        *_linear(f"{name}.mlp.up", width, 4 * width, "column"),
        *_linear(f"{name}.mlp.down", 4 * width, width, "row"),
    )


def _norm(name: str, width: int) -> tuple[Weight, ...]:
    return Weight(f"{name}.weight", (width,)), Weight(f"{name}.bias", (width,))


def _linear(name: str, fan_in: int, fan_out: int, cut: str | None = None) -> tuple[Weight, ...]:
    """`cut` is the word that tensor parallelism's plan has for it: column or row."""
    weight_cut = {"column": 0, "row": 1, None: None}[cut]
    bias_cut = 0 if cut == "column" else None
    return Weight(f"{name}.weight", (fan_out, fan_in), weight_cut), Weight(f"{name}.bias", (fan_out,), bias_cut)
