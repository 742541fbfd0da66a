"""The token ops with explicit backward passes, in plain torch: what `impl="torch"` runs.

The embedding is that of the other implementations too, with rows and patches gathered by them.

The maths is that of `reference.py`. Beyond inputs that live anyway, nothing is kept for backward:
int16 plans instead of int64 indices, pixels instead of patches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import without_autocast
from .library import (
    EMBED_PATCHES,
    EMBED_PATCHES_BACKWARD,
    GATHER_ROWS,
    VISIBLE_PATCHES,
)
from .patches import PatchLayout, gather_patches, normalize_pixels
from .rows import (
    masked_tokens,
    place_rows,
    rows_of_samples,
    rows_of_views,
    sum_by_token,
    visible_tokens,
)


class GatherTokens(torch.autograd.Function):
    """x (B, L, D), token_of_rank (B, L) -> (K*B, keep, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_of_rank: Tensor, len_keep: int, num_views: int
    ) -> Tensor:
        ctx.save_for_backward(token_of_rank)
        ctx.len_keep, ctx.num_views = len_keep, num_views
        batch, num_tokens, dim = x.shape
        tokens = visible_tokens(token_of_rank, len_keep, num_views)
        if x.is_contiguous():
            visible = x.flatten(0, 1).index_select(0, rows_of_samples(tokens, num_tokens))
            return visible.view(num_views * batch, len_keep, dim)
        # Slower per row, but copies nothing first: x may be a slice or expanded.
        sample = torch.arange(batch, device=x.device).unsqueeze(1)
        return x[sample, tokens].flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_rank,) = ctx.saved_tensors
        batch, num_tokens = token_of_rank.shape
        tokens = visible_tokens(token_of_rank, ctx.len_keep, ctx.num_views)
        in_no_view = token_of_rank[:, ctx.num_views * ctx.len_keep :].long().unsqueeze(0)
        dx = place_rows(
            grad.flatten(0, 1),
            rows_of_samples(tokens, num_tokens),
            rows_of_samples(in_no_view, num_tokens),
            batch * num_tokens,
        )
        return dx.view(batch, num_tokens, grad.shape[-1]), None, None, None


class EmbedPlan(NamedTuple):
    """What is static about one patch embedding."""

    layout: PatchLayout
    len_keep: int
    num_views: int
    impl: str = "torch"

    def gathers_in_product(self, pixels: Tensor, weight: Tensor) -> bool:
        """Whether the product reads its patches from the pixels, not from a copy of them.

        Told from dtypes and shapes, for Triton: the operands are 16 bits wide (a float32 product
        is bound by its arithmetic, which cuBLAS does faster), and what lies together in memory
        comes in multiples of 16 bytes: runs of pixels, rows of the weight and of the result.
        """
        if self.impl != "triton" or weight.dtype not in (torch.float16, torch.bfloat16):
            return False
        run = self.layout.memory_shape[-1] * pixels.element_size()
        return run % 16 == 0 and self.layout.num_values % 8 == 0 and weight.shape[0] % 8 == 0

    def visible_rows(self, table: Tensor, token_of_rank: Tensor) -> Tensor:
        """(K*B*keep, D): the row of `table` (L, D) of every visible token."""
        if self.impl == "torch":
            tokens = visible_tokens(token_of_rank, self.len_keep, self.num_views)
            return table.index_select(0, tokens.flatten())
        per_sample = table.expand(token_of_rank.shape[0], -1, -1)
        gather = GATHER_ROWS[self.impl]
        return gather(per_sample, token_of_rank, self.len_keep, self.num_views).flatten(0, 1)

    def visible_patches(
        self,
        pixels: Tensor,
        token_of_rank: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """(K*B*keep, P) in memory order, normalised, in `dtype`."""
        static, patch = (self.len_keep, self.num_views), self.layout.patch
        if self.impl != "torch":
            gather = VISIBLE_PATCHES[self.impl]
            return gather(pixels, mean, std, token_of_rank, *static, list(patch), dtype)
        patches = gather_patches(pixels, visible_tokens(token_of_rank, *static), patch)
        patches = patches.flatten(0, 2)
        if mean is not None and std is not None:
            patches = normalize_pixels(patches, mean, std)
        return patches.to(dtype)


# oneDNN's product of float32 matrices, about twice as fast as MKL's on AMD processors.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(a: Tensor, b: Tensor, impl: str, onto: Tensor | None = None) -> Tensor:
    """a (M, K) times the transpose of b (N, K), added in place to `onto` if given."""
    # torch.compile knows this op with constant weights only, and picks a GEMM itself.
    eager = _ONEDNN and not torch.compiler.is_compiling()
    if impl == "cpp" and eager and a.dtype == torch.float32 and a.numel() > 0:
        product = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product if onto is None else onto.add_(product)
    return a @ b.t() if onto is None else onto.addmm_(a, b.t())


class EmbedVisiblePatches(torch.autograd.Function):
    """Gathered patches times weight plus (bias + positions) in one GEMM that adds to its output."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos_embed: Tensor,
        token_of_rank: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        plan: EmbedPlan,
    ) -> Tensor:
        ctx.save_for_backward(pixels, token_of_rank, mean, std)
        ctx.plan, ctx.weight_shape, ctx.dtype = plan, weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.pos_dtype, ctx.pos_shape = pos_embed.dtype, pos_embed.shape
        # The weight is permuted to the order of the pixels, which is cheaper than the reverse.
        kernel = (weight.squeeze(1).transpose(1, 2) if plan.layout.audio else weight).flatten(1)
        shape = (plan.num_views * pixels.shape[0], plan.len_keep, weight.shape[0])
        ctx.gathers_in_product = plan.gathers_in_product(pixels, weight)
        if ctx.gathers_in_product:
            static = (token_of_rank, plan.len_keep, plan.num_views, list(plan.layout.patch))
            op = EMBED_PATCHES[plan.impl]
            return op(pixels, kernel, bias, pos_embed, mean, std, *static).view(shape)
        table = (pos_embed if bias is None else pos_embed + bias).to(weight.dtype)
        y = plan.visible_rows(table, token_of_rank)
        patches = plan.visible_patches(pixels, token_of_rank, mean, std, weight.dtype)
        with without_autocast(pixels.device):
            y = _product(patches, kernel, plan.impl, onto=y)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pixels, token_of_rank, mean, std = ctx.saved_tensors
        _, need_weight, need_bias, need_pos, *_ = ctx.needs_input_grad
        plan = ctx.plan
        grad = grad.flatten(0, 1).contiguous()
        dweight = dbias = dpos = None
        if need_weight and ctx.gathers_in_product:
            static = (token_of_rank, plan.len_keep, plan.num_views, list(plan.layout.patch))
            op = EMBED_PATCHES_BACKWARD[plan.impl]
            dweight = op(grad, pixels, mean, std, *static).to(ctx.dtype)
        elif need_weight:
            patches = plan.visible_patches(pixels, token_of_rank, mean, std, ctx.dtype)
            with without_autocast(pixels.device):
                dweight = _product(patches.t(), grad.t(), plan.impl).t()
        if dweight is not None:
            if plan.layout.audio:
                dweight = dweight.unflatten(1, plan.layout.memory_shape).transpose(1, 2)
            dweight = dweight.reshape(ctx.weight_shape)
        wide = torch.promote_types(grad.dtype, torch.float32)
        if need_bias:
            dbias = grad.sum(0, dtype=wide).to(ctx.bias_dtype)
        if need_pos:
            tokens = visible_tokens(token_of_rank, plan.len_keep, plan.num_views)
            dpos = sum_by_token(grad.to(wide), tokens, ctx.pos_shape[0]).to(ctx.pos_dtype)
        return None, dweight, dbias, dpos, None, None, None, None


class Segments(NamedTuple):
    """What is static about one decoder sequence; `len_keep` per segment."""

    len_keep: tuple[int, ...]
    num_views: int
    released: bool

    def positions(self, token_of_rank: Sequence[Tensor], *, masked: bool) -> Tensor:
        """(K, B, n): places in the joint sequence of the visible tokens, or of the mask tokens."""
        tokens_of = masked_tokens if masked else visible_tokens
        parts, offset = [], 0
        for order, keep in zip(token_of_rank, self.len_keep, strict=True):
            # The released KDC-MAE code restores every view with the index of view 0.
            tokens = tokens_of(order, keep, 1 if self.released else self.num_views)
            parts.append(tokens.expand(self.num_views, -1, -1) + offset)
            offset += order.shape[1]
        return torch.cat(parts, dim=2)


class AssembleDecoderInput(torch.autograd.Function):
    """Mask token + positions broadcast to all rows, then the visible tokens put over them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # Named parameters, with ctx as many as the arguments of two segments, would make
        # torch.compile leave ctx out where nothing requires a gradient.
        x, mask_token, pos_embed, segments, *token_of_rank = inputs
        ctx.save_for_backward(*token_of_rank)
        ctx.segments, ctx.x_dtype = segments, x.dtype
        ctx.mask_dtype, ctx.pos_dtype = mask_token.dtype, pos_embed.dtype
        dtype = torch.promote_types(x.dtype, mask_token.dtype)
        rows, (length, dim) = x.shape[0], pos_embed.shape
        places = segments.positions(token_of_rank, masked=False)
        visible = pos_embed.index_select(0, places.flatten())
        if visible.dtype == torch.promote_types(dtype, pos_embed.dtype):
            visible.add_(x.flatten(0, 1))
        else:
            visible = visible + x.flatten(0, 1)
        y = (mask_token + pos_embed).to(dtype).repeat(rows, 1)
        y.index_copy_(0, rows_of_views(places, length), visible.to(dtype))
        return y.view(rows, length, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token_of_rank, segments = ctx.saved_tensors, ctx.segments
        need_x, need_mask, need_pos, *_ = ctx.needs_input_grad
        rows, length, dim = grad.shape
        flat = grad.flatten(0, 1)
        wide = torch.promote_types(grad.dtype, torch.float32)
        dx = dmask = dpos = None
        if need_x:
            places = segments.positions(token_of_rank, masked=False)
            dx = flat.index_select(0, rows_of_views(places, length))
            dx = dx.view(rows, sum(segments.len_keep), dim).to(ctx.x_dtype)
        if need_mask:
            # One bag per row adds up its mask tokens in place: nothing gathered, no float atomics.
            places = segments.positions(token_of_rank, masked=True)
            bags = rows_of_views(places, length).view(rows, places.shape[2])
            dmask = F.embedding_bag(bags, flat, mode="sum").sum(0, dtype=wide).to(ctx.mask_dtype)
        if need_pos:
            dpos = grad.sum(0, dtype=wide).to(ctx.pos_dtype)
        return dx, dmask, dpos, None, *(None for _ in token_of_rank)
