"""Some tokens of every row, and tokens that all rows share. N rows, L tokens, D width."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcmae_fast.kernels import MaskPlan


def kept_tokens(plan: MaskPlan, released: bool = False) -> Tensor:
    """The kept tokens of every view, (K*B, keep) int64; `released`: view 0's for all of them."""
    views = [0] * plan.num_views if released else range(plan.num_views)
    return torch.cat([plan.ids_keep(view) for view in views])


def masked_tokens(plan: MaskPlan) -> Tensor:
    """The removed tokens of every view, (K*B, L - keep) int64."""
    return torch.cat([plan.ids_masked(view) for view in range(plan.num_views)])


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens ids (N, M) of (N, L, D) -> (N, M, D); a row names each token at most once."""
    return _TakeTokens.apply(x, ids)


class Filler(NamedTuple):
    """Tokens that are the same in every row where they stand: mask tokens before any attention.

    What acts on each token alone can act on them once, for all rows together.
    tokens: (L, D), the filler at every place. places: (N, M) int64, those of the other tokens.
    """

    tokens: Tensor
    places: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (L + N*M, D): the filler, then the other tokens of all rows."""
        return torch.cat([self.tokens.to(x.dtype), take_tokens(x, self.places).flatten(0, 1)])

    def spread(self, packed: Tensor) -> Tensor:
        """(L + N*M, W) -> (N, L, W)."""
        length = self.tokens.shape[0]
        return _SpreadTokens.apply(packed[:length], packed[length:], self.places)


class _TakeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.length = x.shape[1]
        rows = x.flatten(0, 1).index_select(0, _flat(ids, x.shape[1]))
        return rows.view(*ids.shape, x.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        dx = grad.new_zeros(grad.shape[0] * ctx.length, grad.shape[2])
        dx.index_copy_(0, _flat(ids, ctx.length), grad.flatten(0, 1))
        return dx.view(grad.shape[0], ctx.length, grad.shape[2]), None


class _SpreadTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, filler: Tensor, others: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        out = filler.repeat(places.shape[0], 1)
        out.index_copy_(0, _flat(places, filler.shape[0]), others)
        return out.view(places.shape[0], *filler.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (places,) = ctx.saved_tensors
        rows, at = grad.flatten(0, 1), _flat(places, grad.shape[1])
        dfiller = rows.index_fill(0, at, 0).view(grad.shape).sum(dim=0)
        return dfiller, rows.index_select(0, at), None


def _flat(ids: Tensor, length: int) -> Tensor:
    """Tokens (N, M) as row numbers of a flattened (N * length, ...) tensor."""
    offset = torch.arange(ids.shape[0], device=ids.device)[:, None] * length
    return (ids + offset).flatten()
