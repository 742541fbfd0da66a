"""The reconstruction loss with an explicit backward pass: what `impl="torch"` runs.

Targets are formed for masked patches only, in one buffer that every step overwrites, and again in
backward: the pixels live anyway and are small (uint8, or shared by all views).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tokens.patches import PatchLayout, gather_patches, normalize_pixels
from ..tokens.rows import masked_tokens, place_rows, rows_of_views, visible_tokens
from .reference import EPS


class LossPlan(NamedTuple):
    """What is static about one loss. `dtype`: of the statistics and the result."""

    layout: PatchLayout
    len_keep: int
    num_views: int
    norm_pix: bool
    masked_only: bool
    dtype: torch.dtype


def raw_targets(
    pixels: Tensor, tokens: Tensor, plan: LossPlan, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    """(K*B*masked, P) in target order and `plan.dtype`, a fresh buffer."""
    layout = plan.layout
    patches = gather_patches(pixels, tokens, layout.patch)
    order = [1 + axis for axis in layout.memory_to_target]
    patches = patches.view(-1, *layout.memory_shape).permute(0, *order)
    target = patches.flatten(1).to(plan.dtype)  # bytes are permuted before they are widened
    if mean is None or std is None:
        return target
    return normalize_pixels(target, mean, std, channel_fastest=True)


def patch_statistics(target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation per row, (rows, 1); the rows come back with their mean subtracted.

    Two passes, sum of squares after centring: as exact as Welford's way and several times faster
    than torch.var_mean on a CPU.
    """
    mean = target.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(target.sub_(mean), dim=1, keepdim=True)
    return mean, (norm.square_().div_(target.shape[1] - 1).add_(EPS)).rsqrt_()


class MaskedReconstructionLoss(torch.autograd.Function):
    """pred (K*B, L or masked, P) -> (K*B,). Saves one mean and one deviation per masked patch."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        pixels: Tensor,
        token_of_rank: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        plan: LossPlan,
    ) -> Tensor:
        tokens = masked_tokens(token_of_rank, plan.len_keep, plan.num_views)
        target = raw_targets(pixels, tokens, plan, mean, std)
        patch_mean = patch_rstd = None
        if plan.norm_pix:
            patch_mean, patch_rstd = patch_statistics(target)
            target.mul_(patch_rstd)
        ctx.save_for_backward(pred, pixels, token_of_rank, mean, std, patch_mean, patch_rstd)
        ctx.plan = plan
        error = target.sub_(_masked_rows(pred, tokens, plan)).square_()
        return error.view(pred.shape[0], tokens.shape[2] * pred.shape[2]).mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, pixels, token_of_rank, mean, std, patch_mean, patch_rstd = ctx.saved_tensors
        plan = ctx.plan
        tokens = masked_tokens(token_of_rank, plan.len_keep, plan.num_views)
        target = raw_targets(pixels, tokens, plan, mean, std)
        if plan.norm_pix:
            target.sub_(patch_mean).mul_(patch_rstd)
        masked, values = tokens.shape[2], pred.shape[2]
        target.sub_(_masked_rows(pred, tokens, plan))
        scale = (grad * (-2 / (masked * values))).view(-1, 1, 1)
        error = target.view(pred.shape[0], masked, values)
        dpred = error.mul_(scale).to(pred.dtype)
        if not plan.masked_only:
            visible = visible_tokens(token_of_rank, plan.len_keep, plan.num_views)
            length = plan.layout.num_tokens
            rows, zero_rows = rows_of_views(tokens, length), rows_of_views(visible, length)
            dpred = place_rows(dpred.flatten(0, 1), rows, zero_rows, pred.shape[0] * length)
        return dpred.view(pred.shape), None, None, None, None, None


def _masked_rows(pred: Tensor, tokens: Tensor, plan: LossPlan) -> Tensor:
    """(K*B*masked, P): the predictions of the masked patches in `ids_masked` order."""
    rows = pred.flatten(0, 1)
    if plan.masked_only:
        return rows
    return rows.index_select(0, rows_of_views(tokens, plan.layout.num_tokens))
