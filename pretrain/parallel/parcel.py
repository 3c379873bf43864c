"""A flow on its way to the next stage of a pipeline: one tensor, and one of the same size with its gradient comes back.

DeepSpeed's pipeline runs a backward pass for each floating tensor that it has sent, over the same graph, and wants a
gradient for each. So a flow travels as a single one: the bytes of whatever the layers so far have put into it. What
every rank can make of its own batch stays where it is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pretrain.models.flow import Flow

_TYPES = (
    torch.int64,
    torch.float32,
    torch.bfloat16,
)  # widest first, so that every piece lies at a multiple of its width


class Piece(NamedTuple):
    """One field of the flow inside a parcel."""

    field: int  # its index
    dtype: torch.dtype
    shape: tuple[int, ...]


class Parcels:
    """Packs and unpacks the flows that cross one border between two stages, or two of them.

    A parcel opens with what lies in it, as int64: how many numbers follow, then of each piece its field, type,
    number of dims and dims. It is read once for each size, since reading waits for the device.
    """

    def __init__(self, carrier: torch.dtype) -> None:
        """`carrier` is the type a parcel has on its way: the narrowest that layers put into a flow."""
        self.carrier = carrier
        self._headers: dict[tuple[Piece, ...], Tensor] = {}
        self._pieces: dict[tuple[int, ...], list[Piece]] = {}

    def pack(self, flow: Flow, fresh: Flow) -> Tensor:
        """Every field in which `flow` is not `fresh`, the flow that the batch alone makes. () -> (N,) carrier."""
        fields = [index for index, (new, old) in enumerate(zip(flow, fresh, strict=True)) if new is not old]
        fields.sort(key=lambda index: _TYPES.index(flow[index].dtype))
        pieces = tuple(Piece(index, flow[index].dtype, tuple(flow[index].shape)) for index in fields)
        if pieces not in self._headers:
            numbers = [n for p in pieces for n in (p.field, _TYPES.index(p.dtype), len(p.shape), *p.shape)]
            device = flow.positions.device
            self._headers[pieces] = torch.tensor([len(numbers), *numbers], device=device).view(self.carrier)
        return _Pack.apply(self._headers[pieces], *(flow[index] for index in fields))  # pyright: ignore[reportReturnType]

    def unpack(self, parcel: Tensor, fresh: Flow) -> Flow:
        """The flow that was packed. `fresh` is what the same batch makes here."""
        key = (len(parcel), *fresh.text.shape)
        if key not in self._pieces:
            self._pieces[key] = self._read_header(parcel)
        pieces = self._pieces[key]
        tensors: Any = _Unpack.apply(parcel, pieces)
        return fresh._replace(**{Flow._fields[p.field]: t for p, t in zip(pieces, tensors, strict=True)})

    def _read_header(self, parcel: Tensor) -> list[Piece]:
        wide = torch.int64.itemsize // self.carrier.itemsize
        length = int(parcel.detach()[:wide].view(torch.int64))
        numbers = iter(parcel.detach()[wide : (1 + length) * wide].view(torch.int64).tolist())
        return [
            Piece(field, _TYPES[next(numbers)], tuple(next(numbers) for _ in range(next(numbers)))) for field in numbers
        ]


class _Pack(Function):
    """Bytes laid end to end; the backward pass takes the gradient apart in the same way."""

    @staticmethod
    def forward(ctx, header: Tensor, *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.before = len(header)
        ctx.pieces = [Piece(0, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        return torch.cat([header, *(_flat(tensor, header.dtype) for tensor in tensors)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = _cut(grad, ctx.before, ctx.pieces)
        return None, *(g if g.is_floating_point() else None for g in gradients)


class _Unpack(Function):
    """The reverse. What later layers do not look at gets a gradient of zero."""

    @staticmethod
    def forward(ctx, parcel: Tensor, pieces: list[Piece]) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inside = sum(_length(piece, parcel.dtype) for piece in pieces)
        ctx.before, ctx.carrier = len(parcel) - inside, parcel.dtype
        tensors = tuple(_cut(parcel, ctx.before, pieces))
        ctx.mark_non_differentiable(*(tensor for tensor in tensors if not tensor.is_floating_point()))
        return tensors

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        header = gradients[0].new_zeros(ctx.before, dtype=ctx.carrier)
        return torch.cat([header, *(_flat(gradient, ctx.carrier) for gradient in gradients)]), None


def _flat(tensor: Tensor, carrier: torch.dtype) -> Tensor:
    return tensor.reshape(-1).view(carrier)


def _length(piece: Piece, carrier: torch.dtype) -> int:
    elements = torch.Size(piece.shape).numel()
    return elements * piece.dtype.itemsize // carrier.itemsize


def _cut(flat: Tensor, start: int, pieces: list[Piece]) -> list[Tensor]:
    """Views of the pieces that lie end to end in `flat` from `start` on."""
    tensors = []
    for piece in pieces:
        stop = start + _length(piece, flat.dtype)
        tensors.append(flat[start:stop].view(piece.dtype).view(piece.shape))
        start = stop
    return tensors
