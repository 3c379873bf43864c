"""The layers of the model: their weights, their FLOPs, and what they keep for the backward pass.

Shapes: P patches, L text length, D width, E embedding width, K masked slots, V vocabulary, G samples that the
contrastive loss compares. A FLOP is an addition or a multiplication: matrices (m, k) and (k, n) multiply in 2 m k n.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

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
    found = [*_image_tower(config), *_text_tower(config, vocabulary), _align(config)]
    if config.model.fusion is not None:
        found += _fusion(config, config.model.fusion.depth)
    if config.objectives.matching is not None:
        found.append(_matching_head(config))
    if config.objectives.masked_lm is not None:
        found.append(_masked_lm_head(config, vocabulary))
    return found


def _fused(config: Config) -> tuple[str, ...]:
    """The objectives that look at an image and a caption together."""
    settings = {MATCHING: config.objectives.matching, MASKED_LM: config.objectives.masked_lm}
    return tuple(name for name, setting in settings.items() if setting is not None)


def _clean(config: Config) -> tuple[str, ...]:
    """The objectives that read the caption as it is."""
    return (CONTRASTIVE, *(name for name in _fused(config) if name != MASKED_LM))


def _image_tower(config: Config) -> list[LayerCost]:
    image, P = config.model.image, config.model.image.num_patches
    everyone = (CONTRASTIVE, *_fused(config))
    patch_values, values = 3 * image.patch**2, P * image.width
    embed = LayerCost(
        "image_embed",
        (
            Weight("image_embed.position", (P, image.width)),
            *_linear("image_embed.project", patch_values, image.width),
        ),
        {everyone: 2.0 * P * patch_values * image.width},
        Footprint(input=P * patch_values),
    )
    flops = {everyone: _block_flops(P, image.width)}
    blocks = [_block(f"image_block_{number}", flops, P, image.width) for number in range(image.depth)]
    kept = Footprint(input=values, whole=values if _fused(config) else 0)  # what fusion blocks look at
    return [embed, *blocks, LayerCost("image_norm", _norm("image_norm.norm", image.width), {}, kept)]


def _text_tower(config: Config, vocabulary: int) -> list[LayerCost]:
    text, L, D = config.model.text, config.model.text.length, config.model.text.width
    # Rows of L tokens a sample, by the objectives that need them.
    rows = {_clean(config): 1} | ({(MASKED_LM,): 1} if config.objectives.masked_lm is not None else {})
    tokens = sum(rows.values()) * L
    embed = LayerCost(
        "text_embed",
        (Weight("text_embed.position", (L, D)), Weight("text_embed.token.weight", (vocabulary, D), cut=0)),
        {},
        shards_left=tokens * D,
    )
    flops = {needed: count * _block_flops(L, D) for needed, count in rows.items()}
    return [embed, *(_block(f"text_block_{number}", flops, tokens, D) for number in range(text.depth))]


def _align(config: Config) -> LayerCost:
    """Projections into the common space, and the contrastive loss."""
    image_width, D, E = config.model.image.width, config.model.text.width, config.model.embed
    sigmoid = config.objectives.contrastive.loss == "sigmoid"
    weights = (
        Weight("align.image_project.weight", (E, image_width)),
        *_norm("align.text_norm", D),
        Weight("align.text_project.weight", (E, D)),
        Weight("align.temperature.log_scale", (1,)),
        *([Weight("align.temperature.bias", (1,))] if sigmoid else []),
    )
    projections = 2.0 * E * (image_width + D)
    logits = (1 if sigmoid else 2) * 2.0 * E * contrasted(config)  # the softmax goes both directions
    return LayerCost("align", weights, _summed((_clean(config), projections), ((CONTRASTIVE,), logits)))


def _fusion(config: Config, depth: int) -> list[LayerCost]:
    """Blocks over captions that attend to images: keys and values are made once an image, however many its rows."""
    image, text = config.model.image, config.model.text
    P, L, image_width, D = image.num_patches, text.length, image.width, text.width
    rows = {(name,): {MATCHING: 3, MASKED_LM: 1}[name] for name in _fused(config)}
    cross_row = 2 * 2.0 * L * D**2 + 4.0 * L * P * D  # query and output; scores and mixing
    by_rows = [(needed, count * (_block_flops(L, D) + cross_row)) for needed, count in rows.items()]
    images, num_rows = images_held(config), sum(rows.values())
    flops = _summed(*by_rows, (_fused(config), images * 2.0 * P * image_width * 2 * D))
    memory = (num_rows * P, images * P, image_width)
    return [_block(f"fusion_block_{number}", flops, num_rows * L, D, memory) for number in range(depth)]


def _matching_head(config: Config) -> LayerCost:
    D = config.model.text.width
    weights = (*_norm("matching_head.norm", D), *_linear("matching_head.classify", D, 2))
    return LayerCost("matching_head", weights, {(MATCHING,): 3 * 2.0 * D * 2})


def _masked_lm_head(config: Config, vocabulary: int) -> LayerCost:
    name, D, K = "masked_lm_head", config.model.text.width, masked_slots(config)
    weights = (
        *_norm(f"{name}.norm", D),
        *_linear(f"{name}.transform", D, D),
        *_norm(f"{name}.transform_norm", D),
        *_linear(f"{name}.decode", D, vocabulary, "column"),
    )
    logits = K * vocabulary  # their exponentials stay; on the way back a gradient of these and one of each
    return LayerCost(
        name,
        weights,
        {(MASKED_LM,): 2.0 * K * D * (D + vocabulary)},
        Footprint(whole=6 * K * D, shared_fp32=logits, work_shared_fp32=2 * logits),
        shards_entered=K * D,
    )


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


def images_held(config: Config) -> int:
    """Images a sample that fusion layers look at: its own, and a negative that came from another rank."""
    matching = config.objectives.matching
    return 2 if matching is not None and matching.pool > config.data.grain else 1


def _summed(*costs: tuple[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    totals: dict[tuple[str, ...], float] = {}
    for needed, flops in costs:
        totals[needed] = totals.get(needed, 0.0) + flops
    return totals


def _block_flops(tokens: int, width: int) -> float:
    """Of a row of so many tokens, without cross-attention."""
    attention = 8.0 * tokens * width**2 + 4.0 * tokens**2 * width  # query, key, value and output; scores and mixing
    return attention + 16.0 * tokens * width**2  # and the perceptron


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
