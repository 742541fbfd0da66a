"""The collectives of InfoNCE over a process group; on one rank every function is the identity.

Every rank holds the same number of rows. The softmax over a needs a's features from all ranks and
nothing else; the other direction needs sums over all ranks' rows, a few floats per column.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Its name since torch 2.13, which warns about the older one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks(NamedTuple):
    """A process group as this process sees it; `group` is None for a single process."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Ranks(None, 0, 1)


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Rank and size in `group`; a group of one needs no collectives and counts as none."""
    if group is None:
        return ALONE
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group does not contain this process; pass a group that it belongs to")
    size = dist.get_world_size(group)
    return Ranks(group, rank, size) if size > 1 else ALONE


def check_equal_rows(name: str, x: Tensor, ranks: Ranks) -> None:
    """Raise on every rank unless all hold as many rows of x, the argument `name`.

    CPU tensors only: on a GPU the comparison would stall the host in every step.
    """
    if ranks.group is None or x.device.type != "cpu":
        return
    counts = gather(torch.tensor([x.shape[0]]), ranks).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"{name} must have the same batch size on every rank, got {counts} by rank"
        )


def gather(x: Tensor, ranks: Ranks) -> Tensor:
    """(N, ...) of every rank -> (W*N, ...) in rank order, on every rank."""
    if ranks.group is None:
        return x
    parts = x.new_empty((ranks.size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(parts, x.contiguous(), group=ranks.group)
    return parts


def scatter_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """Sum of every rank's x (W*N, ...), of which each rank gets its own N rows."""
    if ranks.group is None:
        return x
    own = x.new_empty((x.shape[0] // ranks.size, *x.shape[1:]))
    _reduce_scatter(own, x.contiguous(), group=ranks.group)
    return own


def merge_columns(lse: Tensor, top: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Column log-sum-exp and maximum over this rank's rows -> over all ranks' rows, (M,) each."""
    if ranks.group is None:
        return lse, top
    largest = torch.stack([lse, top])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks.group)
    shift = largest[0].clamp_min(torch.finfo(lse.dtype).min)
    total = (lse - shift).exp()
    dist.all_reduce(total, group=ranks.group)
    return shift + total.log(), largest[1]


class GlobalMean(torch.autograd.Function):
    """Mean over ranks of each entry, bit-equal on all of them; backward hands the gradient on.

    The gradient of each rank's own value is what an engine that averages gradients over ranks
    needs to end up with the gradient of the mean.
    """

    @staticmethod
    def forward(ctx, values: Tensor, ranks: Ranks) -> Tensor:
        mean = values / ranks.size
        dist.all_reduce(mean, group=ranks.group)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
