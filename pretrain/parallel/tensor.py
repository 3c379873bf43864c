"""Tensor parallelism: a table says which matrices are cut over the ranks of an axis, and how.

The layers themselves know nothing of it: they are built whole, one at a time, and their modules are exchanged for ones
that hold a part. A column-cut matrix is followed by a row-cut one, so that a block exchanges its activations twice.
Source: Shoeybi et al., Megatron-LM (2019), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.collectives import Group, copy_to_tp, reduce_from_tp, share_of
from pretrain.models.initial import build_layer
from pretrain.models.layer import Layer

# The end of a module's path -> how its matrix is cut. What is not here is held whole by every rank.
PLAN = {
    "attention.qkv": "column",  # whole heads, each with its q, k and v
    "attention.out": "row",
    "cross.query": "column",
    "cross.key_value": "column",
    "cross.out": "row",
    "mlp.up": "column",
    "mlp.down": "row",
    "embed.token": "vocabulary",
    "head.decode": "column",  # by vocabulary; its loss is computed without gathering the logits
}


@dataclass(frozen=True)
class Part:
    """Which part of a parameter this rank holds."""

    shape: tuple[int, ...]  # of the whole parameter
    offset: tuple[int, ...]  # where the part begins
    size: tuple[int, ...]  # of the part
    is_cut: bool  # the other ranks of the axis hold other parts


def whole(parameter: Tensor) -> Part:
    """All of a parameter."""
    shape = tuple(parameter.shape)
    return Part(shape, (0,) * len(shape), shape, is_cut=False)


class ColumnLinear(nn.Module):
    """A linear layer whose outputs are cut: (..., fan in) -> (..., fan out / ranks)."""

    def __init__(self, full: nn.Linear, group: Group) -> None:
        super().__init__()
        self.group = group
        start, stop = share_of(full.out_features, group)
        self.weight = _part(full.weight, 0, start, stop)
        self.bias = None if full.bias is None else _part(full.bias, 0, start, stop)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to_tp(x, self.group), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer whose inputs are cut: (..., fan in / ranks) -> (..., fan out), the same on all ranks."""

    def __init__(self, full: nn.Linear, group: Group) -> None:
        super().__init__()
        self.group = group
        self.weight = _part(full.weight, 1, *share_of(full.in_features, group))
        self.bias = full.bias

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_from_tp(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(nn.Module):
    """A table whose rows are cut: ids (...) -> (..., width), the same on all ranks."""

    def __init__(self, full: nn.Embedding, group: Group) -> None:
        super().__init__()
        self.group = group
        self.start, self.stop = share_of(full.num_embeddings, group)
        self.weight = _part(full.weight, 0, self.start, self.stop)

    def forward(self, ids: Tensor) -> Tensor:
        elsewhere = (ids < self.start) | (ids >= self.stop)
        found = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tp(found.masked_fill(elsewhere[..., None], 0), self.group)


_CUTS: dict[str, Callable[..., nn.Module]] = {
    "column": ColumnLinear,
    "row": RowLinear,
    "vocabulary": VocabularyEmbedding,
}


def build_part(spec: Layer, seed: int, device: torch.device, group: Group) -> tuple[nn.Module, dict[str, Part]]:
    """Builds one layer, keeps this rank's part of it, and says which part of each parameter that is.

    The initial values are those of the whole layer: every layout starts from the same weights.

    Returns:
        The layer, and the parts by canonical parameter name.
    """
    layer = build_layer(spec, seed, device)
    return layer, cut(spec.name, layer, group)


def cut(layer_name: str, layer: nn.Module, group: Group) -> dict[str, Part]:
    """Exchanges a whole layer's modules for this rank's parts; says which parts those are, by canonical name."""
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    if group is not None:
        for path, module in list(layer.named_modules()):
            name = f"{layer_name}.{path}"
            kind = next((kind for end, kind in PLAN.items() if name.endswith(end)), None)
            if kind:
                parent, _, leaf = path.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, _CUTS[kind](module, group))
    parts: dict[str, Part] = {}
    for name, parameter in layer.named_parameters():
        size, shape = tuple(parameter.shape), shapes[name]
        dim = next((dim for dim, (part, full) in enumerate(zip(size, shape, strict=True)) if part != full), None)
        offset = [0] * len(shape)
        if dim is not None:
            offset[dim] = share_of(shape[dim], group)[0]
        # DeepSpeed counts a parameter in the gradient norm on every rank if it carries this mark, else on one.
        parameter.tensor_model_parallel = dim is not None  # pyright: ignore[reportAttributeAccessIssue]
        parts[f"{layer_name}.{name}"] = Part(shape, tuple(offset), size, dim is not None)
    return parts


def _part(full: Tensor, dim: int, start: int, stop: int) -> nn.Parameter:
    return nn.Parameter(full.detach().narrow(dim, start, stop - start).clone())
