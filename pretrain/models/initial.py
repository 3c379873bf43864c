"""Initial weights, a function of (seed, canonical name) alone, so that every layout starts from the same ones."""

import hashlib
import math

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.models.architectures import LayerSpec


def build_layer(spec: LayerSpec, config: Config, device: torch.device) -> nn.Module:
    """Builds one layer, without ever holding another's memory, and gives it its initial weights."""
    with torch.device("meta"):
        layer = spec.build()
    layer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(initial_value(f"{spec.name}.{name}", parameter.shape, config))
    return layer


def initial_value(name: str, shape: torch.Size, config: Config) -> Tensor:
    """The value a parameter starts with, on the CPU, in fp32.

    | parameter                             | value                                                   |
    |---------------------------------------|---------------------------------------------------------|
    | log_scale                             | log(1 / temperature)                                    |
    | bias of the sigmoid loss              | -10                                                     |
    | norm weights, biases                  | 1, 0                                                    |
    | token embeddings, positions           | normal, std width^-0.5                                  |
    | classifiers                           | normal, std 0.02                                        |
    | projections that leave a residual sum | normal, std fan_in^-0.5, over sqrt(2 x blocks)          |
    | other projections                     | normal, std fan_in^-0.5                                 |

    Source: CLIP's and GPT-2's published initialisation (GPT-2, section 2.3, for the residual projections); Zhai et al.,
    Sigmoid loss for language image pre-training (2023), section 3.2, for the bias.
    """
    if name == "align.temperature.log_scale":
        return torch.full(shape, math.log(1 / config.objectives.contrastive.temperature))
    if name == "align.temperature.bias":
        return torch.full(shape, -10.0)
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith(("classify.weight", "decode.weight")):
        std = 0.02
    else:
        std = shape[1] ** -0.5  # (fan out, fan in) of a projection, (rows, width) of an embedding
        if name.endswith(("out.weight", "down.weight")):
            std /= math.sqrt(2 * _blocks_in_stack(name, config))
    digest = hashlib.sha256(f"{config.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(std=std, generator=generator)


def _blocks_in_stack(name: str, config: Config) -> int:
    """Blocks on the residual stream that the named parameter adds to."""
    if name.startswith("image"):
        return config.model.image.depth
    return config.model.text.depth + (config.model.fusion.depth if config.model.fusion else 0)
