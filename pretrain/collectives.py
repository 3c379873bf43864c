"""What objectives and sharded layers need to know of other ranks: sums, gathers and shares, with their gradients.

`group` is a process group, or None for a process alone; no other module below `parallel/` names ranks.
Shapes: B rows on this rank, G = B x ranks rows of the micro-step.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """How many ranks hold rows of the same micro-step."""
    return 1 if group is None else dist.get_world_size(group)


def row_offset(rows: int, group: Group) -> int:
    """Index, among the gathered rows, of this rank's first one."""
    return 0 if group is None else dist.get_rank(group) * rows


def share_of(size: int, group: Group) -> tuple[int, int]:
    """[start, stop) of this rank's part when `size` things are cut into equal parts, the last one shorter."""
    part = -(-size // group_size(group))
    start = min(row_offset(part, group), size)
    return start, min(start + part, size)


def gather(rows: Tensor, group: Group) -> Tensor:
    """Every rank's rows, in the order of ranks, without gradient. (B, ...) -> (G, ...)."""
    if group is None:
        return rows
    gathered = rows.new_empty(group_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def gather_with_gradient(rows: Tensor, group: Group) -> Tensor:
    """Every rank's rows; the backward pass returns to each rank the sum of all ranks' gradients for its rows.

    Averaged over ranks afterwards, as data parallelism does, the result is the gradient of the mean over ranks
    of their losses: nothing is counted twice, and nothing is lost (a gather without gradient loses the share
    that other ranks' rows contribute).
    """
    return rows if group is None else _GatherWithGradient.apply(rows, group)


class _GatherWithGradient(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return gather(rows, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = torch.empty_like(grad[: grad.shape[0] // group_size(ctx.group)])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def enter_shards(x: Tensor, group: Group) -> Tensor:
    """`x` itself, on its way into matrices that are cut over the group; the backward pass sums their gradients.

    Source: Shoeybi et al., Megatron-LM (2019), section 3, where it is called f.
    """
    return x if group is None else _EnterShards.apply(x, group)


def leave_shards(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's `x`, on its way out of matrices that are cut over the group; gradients pass as they are.

    Source: as above, where it is called g.
    """
    return x if group is None else _LeaveShards.apply(x, group)


def maximum(x: Tensor, group: Group) -> Tensor:
    """The largest of every rank's `x`, element by element, without gradient."""
    if group is None:
        return x.detach()
    largest = x.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


class _EnterShards(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _LeaveShards(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
