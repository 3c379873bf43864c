"""Initial weights, a function of (seed, canonical name) alone, so that every layout starts from the same ones."""

import hashlib
import math

import torch
from torch import Tensor, nn

from pretrain.models.layer import Layer


def build_layer(layer: Layer, seed: int, device: torch.device) -> nn.Module:
    """Builds one layer, without ever holding another's memory, and gives it its initial weights."""
    with torch.device("meta"):
        module = layer.build()
    module.to_empty(device=device)
    constants, stack = getattr(module, "initial_values", {}), getattr(module, "stack", 1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in constants:
                parameter.fill_(constants[name])
            else:
                parameter.copy_(initial_value(f"{layer.name}.{name}", parameter.shape, seed, stack))
    return module


def initial_value(name: str, shape: torch.Size, seed: int, stack: int = 1) -> Tensor:
    """The value a parameter starts with, on the CPU, in fp32.

    | parameter                                      | value                                                  |
    |------------------------------------------------|--------------------------------------------------------|
    | norm weights, biases                           | 1, 0                                                   |
    | token embeddings, positions, learned queries   | normal, std width^-0.5                                 |
    | classifiers                                    | normal, std 0.02                                       |
    | a block's last projections, which it adds to x | normal, std fan_in^-0.5 / sqrt(2 x blocks that add to x) |
    | other projections                              | normal, std fan_in^-0.5                                |

    A layer whose module has `initial_values` says itself what its constants are.

    Args:
        name: the canonical name.
        shape: of the whole parameter.
        seed: the run's.
        stack: blocks that add to the same residual stream.

    Source: CLIP's and GPT-2's published initialisation (GPT-2, section 2.3, for the residual projections).
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith(("classify.weight", "decode.weight")):
        std = 0.02
    else:
        std = shape[1] ** -0.5  # (fan out, fan in) of a projection, (rows, width) of an embedding
        if name.endswith(("out.weight", "down.weight")):
            std /= math.sqrt(2 * stack)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(std=std, generator=generator)
