"""What objectives and sharded layers need of other ranks: sums, gathers, shares and single rows, with their gradients.

`group` is a process group, or None for a process alone; no other module below `parallel/` names ranks.
Shapes: B rows on this rank, G = B x ranks rows of the micro-step.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# torch 2.13 renames two collectives that older versions and DeepSpeed call by their old names, at every call.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

Group = dist.ProcessGroup | None


_ProcessGroup: Any = dist.ProcessGroup


class Pretended(_ProcessGroup):
    """The first of so many ranks, alone: on the meta device, where shapes are all there is, nobody misses the others.

    What would be exchanged is noted: its kind, and of an all-gather the bytes that come out, else those that go in.
    """

    def __init__(self, size: int, note: Callable[[str, int], None]) -> None:
        super().__init__(0, size)
        self.note = note

    def allreduce(self, tensors: list[Tensor], *_: Any) -> None:
        self.note("all-reduce", tensors[0].nbytes)

    def _allgather_base(self, output: Tensor, *_: Any) -> None:
        self.note("all-gather", output.nbytes)

    def _reduce_scatter_base(self, output: Tensor, rows: Tensor, *_: Any) -> None:
        self.note("reduce-scatter", rows.nbytes)

    def alltoall_base(self, output: Tensor, rows: Tensor, *_: Any) -> None:
        self.note("all-to-all", rows.nbytes)

    # As torch calls them from 2.13 on.
    all_gather_single, reduce_scatter_single, all_to_all_single = _allgather_base, _reduce_scatter_base, alltoall_base


def group_size(group: Group) -> int:
    """How many ranks hold rows of the same micro-step."""
    return 1 if group is None else group.size()


def row_offset(rows: int, group: Group) -> int:
    """Index, among the gathered rows, of this rank's first one."""
    return 0 if group is None else group.rank() * rows


def share_of(size: int, group: Group) -> tuple[int, int]:
    """[start, stop) of this rank's part when `size` things are cut into equal parts, the last one shorter."""
    part = -(-size // group_size(group))
    start = min(row_offset(part, group), size)
    return start, min(start + part, size)


def all_gather(rows: Tensor, group: Group) -> Tensor:
    """Every rank's rows, in the order of ranks, without gradient. (B, ...) -> (G, ...)."""
    if group is None:
        return rows
    gathered = rows.new_empty(group_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def all_gather_with_gradient(rows: Tensor, group: Group) -> Tensor:
    """Every rank's rows; the backward pass returns to each rank the sum of all ranks' gradients for its rows.

    Averaged over ranks afterwards, as data parallelism does, the result is the gradient of the mean over ranks
    of their losses: nothing is counted twice, and nothing is lost (a gather without gradient loses the share
    that other ranks' rows contribute).
    """
    return rows if group is None else _AllGatherWithGradient.apply(rows, group)


class _AllGatherWithGradient(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return all_gather(rows, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = torch.empty_like(grad[: grad.shape[0] // group_size(ctx.group)])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


class Route(NamedTuple):
    """Which rows travel when every rank asks for N rows of any ranks."""

    asked: Tensor  # (S,) int64: own rows that others, or this rank itself, ask for; those for the first rank first
    num_sent: list[int]  # to each rank, S in all
    num_received: list[int]  # from each rank, N in all
    arrival: Tensor  # (N,) int64: which of the received rows is the one asked for


def find_route(wanted: Tensor, rows: int, group: Group) -> Route:
    """Tells every rank what is asked of it.

    Args:
        wanted: (N,) int64 indices among the gathered rows, N the same on all ranks.
        rows: rows that a rank holds (B).
    """
    rank, size = row_offset(1, group), group_size(group)
    everyone = all_gather(wanted, group).view(size, -1)  # (ranks, N)
    if isinstance(group, Pretended):  # its rows are as many as it asks for
        split = [len(wanted), *[0] * (size - 1)]
        return Route(wanted, split, split, wanted)
    owners = everyone // rows
    from_here = owners == rank
    return Route(
        asked=everyone[from_here] - rank * rows,
        num_sent=from_here.sum(dim=1).tolist(),
        num_received=owners[rank].bincount(minlength=size).tolist(),
        arrival=owners[rank].argsort(stable=True).argsort(),  # rows come in the order of owners
    )


def fetch(rows: Tensor, route: Route, group: Group) -> Tensor:
    """The rows that `route` was found for, each from the rank that holds it. (B, ...) -> (N, ...).

    The backward pass returns every row's gradients to its owner and adds them up there; as for
    `all_gather_with_gradient`, their average over ranks is the gradient of the mean of all ranks' losses.
    """
    sent = rows[route.asked]
    received = sent if group is None else _Exchange.apply(sent, route.num_sent, route.num_received, group)
    return received[route.arrival]


def ring_shift(rows: Tensor, group: Group) -> Tensor:
    """Hands rows to the next rank of the ring; returns those of the previous one. Without gradient."""
    size = group_size(group)
    if group is None or size == 1:
        return rows
    received, rank = torch.empty_like(rows), group.rank()
    if isinstance(group, Pretended):
        group.note("point-to-point", rows.nbytes)
        return received
    there = dist.P2POp(dist.isend, rows.contiguous(), group=group, group_peer=(rank + 1) % size)
    here = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size)
    for work in dist.batch_isend_irecv([there, here]):
        work.wait()
    return received


class _Exchange(Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, rows: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.num_sent, ctx.num_received, ctx.group = num_sent, num_received, group
        received = rows.new_empty(sum(num_received), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), num_received, num_sent, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        returned = grad.new_empty(sum(ctx.num_sent), *grad.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), ctx.num_sent, ctx.num_received, group=ctx.group)
        return returned, None, None, None


def copy_to_tp(x: Tensor, group: Group) -> Tensor:
    """`x` itself, on its way into matrices that are cut over the group; the backward pass sums their gradients.

    Source: Shoeybi et al., Megatron-LM (2019), section 3, where it is called f.
    """
    return x if group is None else _CopyToTP.apply(x, group)


def reduce_from_tp(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's `x`, on its way out of matrices that are cut over the group; gradients pass as they are.

    Source: as above, where it is called g.
    """
    return x if group is None else _ReduceFromTP.apply(x, group)


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """The largest of every rank's `x`, element by element, without gradient."""
    if group is None:
        return x.detach()
    largest = x.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


class _CopyToTP(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromTP(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
