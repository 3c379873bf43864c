"""Tensors on their way to another stage of a pipeline, as one message; a gradient of the same size comes back.

DeepSpeed's pipeline runs a backward pass for each floating tensor that it has sent, over the same graph, and wants a
gradient for each. So what crosses a border travels as a single tensor: the bytes of all of it, laid end to end.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pretrain.models.layer import Flow

# Widest first, so that every piece lies at a multiple of its width.
_TYPES = (torch.int64, torch.float32, torch.bfloat16, torch.bool)


class Piece(NamedTuple):
    """One tensor inside a message."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Messages:
    """Packs and unpacks the tensors that cross one border between two stages, or two of them.

    A message opens with what lies in it, as int64: how many numbers follow, then of each piece its type, number of dims
    and dims. It is read once for each set of shapes, since reading waits for the device.
    """

    def __init__(self, carrier: torch.dtype, device: torch.device) -> None:
        """`carrier` is the type a message has on its way: the narrowest floating type that crosses."""
        self.carrier, self.device = carrier, device
        self._headers: dict[tuple[Piece, ...], Tensor] = {}
        self._pieces: dict[Any, list[Piece]] = {}

    def pack(self, flow: Flow, names: Collection[str]) -> Tensor:
        """The tensors of these names. () -> (N,) carrier."""
        tensors = [flow[name] for name in sorted(names)]
        pieces = tuple(Piece(tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        if pieces not in self._headers:
            numbers = [n for p in pieces for n in (_TYPES.index(p.dtype), len(p.shape), *p.shape)]
            self._headers[pieces] = torch.tensor([len(numbers), *numbers], device=self.device).view(self.carrier)
        return _Pack.apply(self._headers[pieces], *tensors)  # pyright: ignore[reportReturnType]

    def unpack(self, message: Tensor, names: Collection[str], batch: Flow) -> Flow:
        """What was packed. `batch` is the micro-batch it was made of: like shapes give like messages."""
        if not names:
            return {}
        key = len(message), frozenset(names), *(tuple(tensor.shape) for tensor in batch.values())
        if key not in self._pieces:
            self._pieces[key] = self._read_header(message)
        tensors: Any = _Unpack.apply(message, self._pieces[key])
        return dict(zip(sorted(names), tensors, strict=True))

    def _read_header(self, message: Tensor) -> list[Piece]:
        wide = torch.int64.itemsize // self.carrier.itemsize
        length = int(message.detach()[:wide].view(torch.int64))
        numbers = iter(message.detach()[wide : (1 + length) * wide].view(torch.int64).tolist())
        return [Piece(_TYPES[kind], tuple(next(numbers) for _ in range(next(numbers)))) for kind in numbers]


class _Pack(Function):
    """Bytes laid end to end; the backward pass takes the gradient apart in the same way."""

    @staticmethod
    def forward(ctx, header: Tensor, *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.before = len(header)
        ctx.pieces = [Piece(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        return torch.cat([header, *(_flat(tensors[i], header.dtype) for i in _in_order(ctx.pieces))])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = _cut(grad, ctx.before, ctx.pieces)
        return None, *(g if g.is_floating_point() else None for g in gradients)


class _Unpack(Function):
    """The reverse. What later layers do not look at gets a gradient of zero."""

    @staticmethod
    def forward(ctx, message: Tensor, pieces: list[Piece]) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inside = sum(_length(piece, message.dtype) for piece in pieces)
        ctx.before, ctx.carrier, ctx.pieces = len(message) - inside, message.dtype, pieces
        tensors = tuple(_cut(message, ctx.before, pieces))
        ctx.mark_non_differentiable(*(tensor for tensor in tensors if not tensor.is_floating_point()))
        return tensors

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        header = gradients[0].new_zeros(ctx.before, dtype=ctx.carrier)
        return torch.cat([header, *(_flat(gradients[i], ctx.carrier) for i in _in_order(ctx.pieces))]), None


def _in_order(pieces: list[Piece]) -> list[int]:
    """The numbers of the pieces in the order in which they lie."""
    return sorted(range(len(pieces)), key=lambda i: _TYPES.index(pieces[i].dtype))


def _flat(tensor: Tensor, carrier: torch.dtype) -> Tensor:
    flat = tensor.reshape(-1)
    if missing := -flat.nbytes % carrier.itemsize:  # an odd number of bools
        flat = torch.cat([flat, flat.new_zeros(missing // flat.itemsize)])
    return flat.view(carrier)


def _length(piece: Piece, carrier: torch.dtype) -> int:
    return -(-torch.Size(piece.shape).numel() * piece.dtype.itemsize // carrier.itemsize)


def _cut(flat: Tensor, start: int, pieces: list[Piece]) -> list[Tensor]:
    """Views of the pieces that lie end to end in `flat` from `start` on."""
    tensors: dict[int, Tensor] = {}
    for i in _in_order(pieces):
        dtype, shape = pieces[i]
        stop = start + _length(pieces[i], flat.dtype)
        tensors[i] = flat[start:stop].view(dtype)[: torch.Size(shape).numel()].view(shape)
        start = stop
    return [tensors[i] for i in range(len(pieces))]
