"""How a step lies on the ranks: which samples a rank has, and which layers a stage of a pipeline."""

from collections.abc import Sequence
from functools import cache

from pretrain.accounting.layers import Layout, measure_forward
from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.models.layer import Architecture, Layer
from pretrain.models.towers import Vocabulary


def layout_of(config: Config, world: int) -> Layout:
    """The layout of the config on `world` ranks, which its degrees divide."""
    engine, training = config.engine, config.training
    data_parallel = engine.data_parallel or world // (engine.tensor_parallel * engine.pipeline_parallel)
    micro_batch = training.global_batch // (data_parallel * training.accumulation)
    return Layout(data_parallel, engine.tensor_parallel, engine.pipeline_parallel, micro_batch, training.accumulation)


def cut_into_stages(
    config: Config, vocabulary: Vocabulary, architecture: Architecture, num_stages: int
) -> list[Sequence[Layer]]:
    """Cuts the list of layers into runs, one per pipeline stage, none empty.

    The most forward FLOPs that any stage has are as few as they can be; among such cuts later stages are the fuller
    ones, since earlier ones keep the activations of more micro-batches.

    Raises:
        ConfigError: there are more stages than layers.
    """
    layers = architecture.layers
    if num_stages == 1:
        return [layers]
    if num_stages > len(layers):
        raise ConfigError(
            f"engine.pipeline_parallel {num_stages} is more than the {len(layers)} layers of the model: set it to "
            f"{len(layers)} or less."
        )
    flops = measure_forward(config, vocabulary).flops
    return [layers[part.start : part.stop] for part in cut_evenly(tuple(flops.values()), num_stages)]


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
