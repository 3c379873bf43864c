"""What ranks exchange in an optimizer step: bytes and messages, by purpose and by axis of the mesh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.accounting.layers import LayerCost, contrasted, images_held, masked_slots
from pretrain.accounting.memory import PERSISTENT, PREFETCH, REDUCE_BUCKET, released, value_bytes
from pretrain.accounting.stages import Layout, first_pass, two_passes
from pretrain.config import Config


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
    if layout.tensor_parallel > 1:
        found += _shard_transfers(config, costs, layout, gpu)
    if layout.pipeline_parallel > 1:
        steps = layout.micro_steps
        size = layout.micro_batch * steps * sum(borders)  # activations to the next stage, gradients to the one before
        found.append(Transfer("activations and their gradients", "point-to-point", "pp", size, 2 * steps))
        if first_pass(config, costs[-1:]):  # these layers end inside the towers: the next stage has a part in it too
            rows = 1 if costs[-1].name.startswith("text_") else 0
            size = layout.micro_batch * steps * _tokens(config, rows, gpu)
            found.append(Transfer("activations of the first pass", "point-to-point", "pp", size, steps))
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
            gathered = cut + released(config, cut)
            again = [weight for cost, _ in first_pass(config, costs) for weight in cost.weights]
            gathered += sum(weight.elements(layout.tensor_parallel) for weight in again)
            fetches = math.ceil(gathered / PREFETCH)
            return [
                Transfer("weights", "all-gather", "dp", width * gathered * steps, fetches * steps, overlapped=True),
                Transfer("gradients", "reduce-scatter", "dp", width * n * steps, buckets * steps, overlapped=True),
                Transfer("updated small weights", "all-gather", "dp", width * small, 1),
            ]
    raise AssertionError("config allows no other stage")


def _align_transfers(config: Config, layout: Layout, gpu: bool) -> list[Transfer]:
    """What the contrastive objective and mining exchange over the data-parallel ranks."""
    model, matching, steps = config.model, config.objectives.matching, layout.micro_steps
    E, B, G = model.embed, layout.micro_batch, contrasted(config)
    rounds = 1 if two_passes(config) else steps
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


def _shard_transfers(config: Config, costs: Sequence[LayerCost], layout: Layout, gpu: bool) -> list[Transfer]:
    """What tensor-parallel ranks sum after their parts of cut matrices."""
    B, steps, again = layout.micro_batch, layout.micro_steps, config.engine.activation_checkpointing
    elements = sum(cost.shards_entered + cost.shards_left for cost in costs)
    if again:
        elements += sum(cost.shards_left - cost.footprint.input for cost in costs if cost.recomputed_flops)
    before = first_pass(config, costs)
    elements += sum(share * cost.shards_left for cost, share in before)
    size = value_bytes(config, gpu) * B * steps * elements
    messages = steps * sum(4 + again for cost in costs if cost.recomputed_flops)
    messages += steps * sum(2 for cost, _ in before if cost.recomputed_flops)
    found = [Transfer("activations of cut matrices", "all-reduce", "tp", size, messages)]
    if costs[-1].name == "masked_lm_head":
        size = 20 * B * steps * masked_slots(config)  # two sums and a maximum in fp32, one of int64
        found.append(Transfer("softmax over the vocabulary", "all-reduce", "tp", size, 4 * steps))
    return found


def parcel(config: Config, costs: Sequence[LayerCost], border: int, gpu: bool = True) -> float:
    """Bytes a sample that cross the border before layer number `border` of the whole list, 0 at either end.

    Gradients of the same size come back, those of the int64 masks and indices included.
    """
    if border in (0, len(costs)):
        return 0
    names = {cost.name for cost in costs[:border]}
    model, objectives = config.model, config.objectives
    if "align" not in names:
        rows = (1 + (objectives.masked_lm is not None)) if "text_embed" in names else 0
        return _tokens(config, rows, gpu)
    rows = 3 * (objectives.matching is not None) + (objectives.masked_lm is not None)
    ids = rows * (model.text.length + 1) + 3 * (objectives.matching is not None)
    return _tokens(config, rows, gpu, images_held(config)) + 8 * ids + 2 * 4 * model.embed


def _tokens(config: Config, rows: int, gpu: bool, images: int = 1) -> float:
    """Bytes a sample of so many captions' and images' tokens."""
    image, text = config.model.image, config.model.text
    return value_bytes(config, gpu) * (images * image.num_patches * image.width + rows * text.length * text.width)
