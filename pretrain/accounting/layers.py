"""The layers of the model: their weights and FLOPs, measured on the meta device from the layers themselves."""

import math
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Config
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import Flow
from pretrain.models.model import Model
from pretrain.models.towers import Vocabulary
from pretrain.synthetic import made_up_batch


@dataclass(frozen=True)
class LayerCost:
    """One layer of an architecture."""

    name: str
    forward_flops: float


def measure_layers(config: Config, vocabulary: Vocabulary) -> list[LayerCost]:
    architecture = architecture_of(config, vocabulary)
    samples = math.lcm(config.data.grain, config.objectives.matching.pool if config.objectives.matching else 1)
    with torch.device("meta"):
        model = Model(architecture, {layer.name: layer.build() for layer in architecture.layers})
        batch = made_up_batch(config, vocabulary, torch.arange(samples, device="meta"))
    flops = dict.fromkeys([layer.name for layer in architecture.layers], 0.0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        have: Flow = batch | {"targets/captioning": torch.ones(1, device="meta")}
        have |= model.run(architecture.handed_on, have)
        flow = have
        for call in model.calls(architecture.reports, have):
            counter = FlopCounterMode(display=False)
            with counter:
                flow = model.run_calls([call], have, {n: t for n, t in flow.items() if n not in have})
            flops[call.layer.name] += counter.get_total_flops() / samples
    return [LayerCost(name, count) for name, count in flops.items()]
