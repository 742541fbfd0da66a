"""Gathering and decoder assembly on the compiled ops of `library.py`: `impl="cpp"` and "triton".

The embedding on them is that of `lean.py`, which asks them for its rows and patches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lean import Segments
from .library import (
    ASSEMBLE,
    ASSEMBLE_BACKWARD,
    ASSEMBLE_BACKWARD_POS,
    GATHER_ROWS,
    GATHER_ROWS_BACKWARD,
)


class FusedGatherTokens(torch.autograd.Function):
    """x (B, L, D), token_of_rank (B, L) -> (K*B, keep, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_of_rank: Tensor, len_keep: int, num_views: int, impl: str
    ) -> Tensor:
        ctx.save_for_backward(token_of_rank)
        ctx.static = len_keep, num_views
        ctx.impl = impl
        return GATHER_ROWS[impl](x, token_of_rank, len_keep, num_views)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_rank,) = ctx.saved_tensors
        dx = GATHER_ROWS_BACKWARD[ctx.impl](grad, token_of_rank, *ctx.static)
        return dx, None, None, None, None


class FusedAssembleDecoderInput(torch.autograd.Function):
    """Every place of the sequence is written once: a visible token or the mask token, plus its
    position. The plans are `rank_of_token`, one per segment."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # Not named in the signature for the reason that `AssembleDecoderInput` gives.
        x, mask_token, pos_embed, segments, impl, *rank_of_token = inputs
        ctx.save_for_backward(*rank_of_token)
        ctx.segments, ctx.impl, ctx.x_dtype = segments, impl, x.dtype
        ctx.mask_dtype, ctx.pos_dtype = mask_token.dtype, pos_embed.dtype
        dtype = torch.promote_types(x.dtype, mask_token.dtype)
        wide = torch.promote_types(torch.promote_types(dtype, pos_embed.dtype), torch.float32)
        # Positions in float64 make the whole addition one in float64, rounded once.
        inner = wide if wide == torch.float64 else dtype
        filler = (mask_token.to(wide) + pos_embed).to(inner)
        static = _static(segments)
        y = ASSEMBLE[impl](x.to(inner), pos_embed.to(wide), filler, rank_of_token, *static)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plans, static = list(ctx.saved_tensors), _static(ctx.segments)
        dpos = None
        if ctx.needs_input_grad[2]:
            dx, dmask, dpos = ASSEMBLE_BACKWARD_POS[ctx.impl](grad, plans, *static)
            dpos = dpos.to(ctx.pos_dtype)
        else:
            dx, dmask = ASSEMBLE_BACKWARD[ctx.impl](grad, plans, *static)
        dx, dmask = dx.to(ctx.x_dtype), dmask.to(ctx.mask_dtype)
        return dx, dmask, dpos, None, None, *(None for _ in plans)


def _static(segments: Segments) -> tuple[list[int], int, bool]:
    return list(segments.len_keep), segments.num_views, segments.released
