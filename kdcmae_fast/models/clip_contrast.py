"""InfoNCE between frames when a batch has several of each clip (CAV-MAE Sync, arXiv 2505.01237).

Rows are frames, those of a clip side by side: row r belongs to clip r // n. Z[i, j] is the cosine
of audio i and video j over the temperature. N rows on this rank, M on all of them, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from kdcmae_fast.kernels.contrastive.distributed import (
    GlobalMean,
    Ranks,
    gather,
    ranks_of,
    scatter_sum,
)

BLOCK_ELEMENTS = 2**24  # similarities alive at once


def clip_info_nce(
    a: Tensor,
    b: Tensor,
    frames_per_clip: int,
    within_clip: str,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mean over frames j of b, softmax over a; `symmetric`: and the other way round, halved.

    a, b: (N, D), N a multiple of n = frames_per_clip, else ValueError.
    within_clip: "masked", the other frames of j's clip take no part,
        -log e^Z[j, j] / (e^Z[j, j] + sum of e^Z[i, j] over other clips' i);
        "positives", all frames of the clip count as right,
        -log (sum of e^Z[i, j] over the clip's i) / (sum over all i).
    group: ranks whose clips are negatives of each other. Values and gradients are then those that
        `kernels.info_nce` promises.

    Memory: blocks of similarities, which backward computes anew; never N x M of them.
    """
    if a.shape[0] % frames_per_clip:
        raise ValueError(
            f"frames_per_clip={frames_per_clip}: a batch of {a.shape[0]} rows is no whole number "
            "of clips"
        )
    if a.shape[0] == 0:
        return (a.sum() + b.sum()).float()
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    ranks = ranks_of(group)
    a, b = (F.normalize(x.to(dtype), dim=1) for x in (a, b))
    sides = [(b, a), (a, b)] if symmetric else [(b, a)]
    losses = []
    for rows, columns in sides:
        everyone = _Gather.apply(columns, ranks)
        step = max(1, BLOCK_ELEMENTS // everyone.shape[0])
        total = rows.new_zeros(())
        for start in range(0, rows.shape[0], step):
            first = ranks.rank * rows.shape[0] + start
            block = rows[start : start + step] / temperature
            total = total + checkpoint(
                _block_loss, block, everyone, first, frames_per_clip, within_clip,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        losses.append(total / rows.shape[0])
    loss = torch.stack(losses).mean()
    return loss if ranks.group is None else GlobalMean.apply(loss, ranks)


def _block_loss(
    rows: Tensor, everyone: Tensor, first: int, frames_per_clip: int, within_clip: str
) -> Tensor:
    """Sum of the losses of these rows, of which the first is number `first` of all."""
    logits = rows @ everyone.mT
    row = torch.arange(first, first + rows.shape[0], device=rows.device)[:, None]
    column = torch.arange(everyone.shape[0], device=rows.device)
    own, clip = row == column, row // frames_per_clip == column // frames_per_clip
    never = float("-inf")
    if within_clip == "positives":
        positive = logits.masked_fill(~clip, never).logsumexp(dim=1)
    else:
        positive = logits.masked_fill(~own, 0).sum(dim=1)
        logits = logits.masked_fill(clip & ~own, never)
    return (logits.logsumexp(dim=1) - positive).sum()


class _Gather(torch.autograd.Function):
    """Every rank's rows on every rank; backward sums what all ranks have for this one's."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return gather(x, ranks) if ranks.group is not None else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(grad, ctx.ranks), None
