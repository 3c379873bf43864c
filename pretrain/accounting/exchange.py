"""What ranks exchange in an optimizer step: bytes and messages, by purpose and by axis of the mesh."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pretrain.accounting.layers import LayerCost, Layout, StepCost, Transfer, value_type
from pretrain.accounting.memory import PERSISTENT, PREFETCH, REDUCE_BUCKET, released
from pretrain.config import Config


def transfers(config: Config, cost: StepCost, layout: Layout, part: range, *, gpu: bool = True) -> list[Transfer]:
    """What a rank that holds the layers `part` exchanges in a step. Left out: losses, norms and signs of life.

    Args:
        config: the whole config.
        cost: of all layers.
        layout: how samples and layers lie on the ranks.
        part: the rank's own layers.
        gpu: bf16 if the config leaves it open.
    """
    costs, steps = cost.layers[part.start : part.stop], layout.micro_steps
    found = list(_weight_transfers(config, costs, layout, gpu)) if layout.data_parallel > 1 else []
    if layout.tensor_parallel > 1:
        share = layout.data_parallel if config.engine.zero_stage else 1
        copied = 4 * sum(layer.copied for layer in costs) / share
        # ZeRO has groups of matrices, of 1-D parameters and of the temperature.
        found.append(Transfer("gradients of copies", "all-reduce", "tp", copied, 3 if config.engine.zero_stage else 1))
    merged: dict[tuple[str, str, str], Transfer] = {}
    for each in (transfer for layer in costs for transfer in layer.transfers):
        key = each.what, each.kind, each.axis
        so_far = merged.get(key, replace(each, size=0, messages=0))
        merged[key] = replace(each, size=so_far.size + each.size, messages=so_far.messages + each.messages)
    found += merged.values()
    if layout.pipeline_parallel > 1:
        before = cost.layers[part.start - 1] if part.start else None
        behind = costs[-1] if part.stop < len(cost.layers) else None
        sent = [*([before.crossing] if before else []), *([behind.crossing] if behind else [])]
        found.append(Transfer("activations and gradients", "point-to-point", "pp", steps * sum(sent), 2 * steps))
        if behind and behind.crossing_first:
            size = steps * behind.crossing_first
            found.append(Transfer("activations of the first pass", "point-to-point", "pp", size, steps))
        if cost.results:
            found.append(Transfer("results of the first pass", "broadcast", "pp", steps * cost.results, steps))
    return found


def _weight_transfers(config: Config, costs: Sequence[LayerCost], layout: Layout, gpu: bool) -> Iterator[Transfer]:
    """What ZeRO exchanges over the data-parallel ranks."""
    width, steps = value_type(config, gpu).itemsize, layout.micro_steps
    sizes = [size for cost in costs for size in cost.weights]
    n = sum(sizes)
    buckets = math.ceil(n / REDUCE_BUCKET)
    match config.engine.zero_stage:
        case 0:
            yield Transfer("gradients", "all-reduce", "dp", 4 * n, 1)
        case 1:
            yield Transfer("gradients", "all-reduce", "dp", width * n, buckets)
            yield Transfer("updated weights", "all-gather", "dp", width * n, 3)
        case 2:  # it sums whole buckets and keeps its share of them
            yield Transfer("gradients", "all-reduce", "dp", width * n * steps, buckets * steps, overlapped=True)
            yield Transfer("updated weights", "all-gather", "dp", width * n, 3)
        case 3:
            small = sum(size for size in sizes if size < PERSISTENT)
            cut = n - small
            times = (cut + released(config, cut)) / max(cut, 1)  # in the training pass
            again = [size for cost in costs if cost.runs_first for size in cost.weights]
            gathered = times * cut + sum(again)
            fetches = math.ceil(gathered / PREFETCH)
            tensors = times * len([size for size in sizes if size >= PERSISTENT])
            tensors += len([size for size in again if size >= PERSISTENT])
            what = "weights", "all-gather", "dp", width * gathered * steps, fetches * steps
            yield Transfer(*what, overlapped=True, parameters=tensors * steps)
            what = "gradients", "reduce-scatter", "dp", width * n * steps, buckets * steps
            yield Transfer(*what, overlapped=True, parameters=len(sizes) * steps)
            yield Transfer("updated small weights", "all-gather", "dp", width * small, 1)
