"""`masked_reconstruction_loss`: checks, the choice of implementation, registration."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..common import check_dtype, check_ndim, check_shape, compute_dtype, register_op, resolve
from ..masking import MaskPlan
from ..tokens.patches import PatchLayout, PatchSize, patch_layout, pixel_statistics
from ..tokens.rows import check_device, check_plan
from . import reference
from .fused import FusedReconstructionLoss
from .lean import LossPlan, MaskedReconstructionLoss

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ORDERS = ("auto", "tokens", "masked")

register_op("masked_reconstruction_loss", impls=("triton", "cpp", "torch"))


def masked_reconstruction_loss(
    pred: Tensor,
    pixels: Tensor,
    plan: MaskPlan,
    *,
    patch_size: PatchSize,
    norm_pix: bool = True,
    reduction: Literal["mean", "none"] = "mean",
    pixel_mean: Sequence[float] | Tensor | None = None,
    pixel_std: Sequence[float] | Tensor | None = None,
    pred_order: Literal["auto", "tokens", "masked"] = "auto",
    impl: str = "auto",
) -> Tensor:
    """Mean squared error of the predicted masked patches (MAE, arXiv 2111.06377).

    pred: (K*B, L, P), one row per token, or (K*B, L - keep, P), the masked tokens only, in
        `plan.ids_masked(view)` order. P values in the order image (y, x, channel fastest), audio
        (mel offset, time offset), video (t, y, x, channel).
    pixels: (B, C, H, W), (B, T, F) or (B, C, T, H, W), shared by the views; uint8 becomes
        ((x / 255) - pixel_mean) / pixel_std, floats go in as they are. They are the target: pixels
        that require grad get one through the plain form, which keeps all targets.
    patch_size: an int for all axes or one per grid axis, as in `embed_visible_patches`.
    norm_pix: targets are (x - patch mean) / sqrt(patch variance + 1e-6), variance unbiased.
    reduction: "none" gives (K*B,), the mean over each row's masked patches of the mean over their
        values; "mean" its mean over rows, equal to sum(error * mask) / sum(mask) over the batch.
    pred_order: "tokens" or "masked" says which of the two shapes `pred` has; "auto" tells from the
        shape, which works unless the plan keeps nothing (then name it).

    Returns float32 (float64 if pred or pixels are). Errors: ValueError naming the argument and its
    value; also for a plan that masks nothing.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is not 'mean' or 'none'")
    layout = patch_layout(pixels, patch_size)
    check_dtype("pixels", pixels, (torch.uint8, *FLOATS))
    check_plan("plan", plan, pixels.shape[0], layout.num_tokens, pixels.device)
    check_ndim("pred", pred, 3, "(K*B, L, P) or (K*B, L - keep, P)")
    masked_only = check_rows(("pred", "pred_order"), pred, pixels, plan, layout, pred_order)
    rows = plan.num_views * pixels.shape[0]
    check_shape("pred", pred, (rows, pred.shape[1], layout.num_values), "(K*B, tokens, P)")
    if norm_pix and layout.num_values < 2:
        raise ValueError("norm_pix=True needs patches of at least 2 values, these have 1")
    dtype = compute_dtype(pred, pixels)
    statistics = pixel_statistics(pixels, layout, pixel_mean, pixel_std, dtype)
    impl = resolve("masked_reconstruction_loss", impl, pixels.device.type)
    if pixels.requires_grad and torch.is_grad_enabled():
        loss = reference.masked_reconstruction_loss(
            pred, pixels, plan, layout.patch, norm_pix, statistics, masked_only
        )
    else:
        loss_plan = LossPlan(layout, plan.len_keep, plan.num_views, norm_pix, masked_only, dtype)
        mean, std = statistics or (None, None)
        if impl == "torch":
            loss = MaskedReconstructionLoss.apply(
                pred, pixels, plan.token_of_rank, mean, std, loss_plan
            )
        else:
            loss = FusedReconstructionLoss.apply(
                pred, pixels, plan.rank_of_token, mean, std, loss_plan, impl
            )
    if reduction == "none":
        return loss
    return loss.mean() if loss.shape[0] else loss.sum()  # 0 for an empty batch


def check_rows(
    named: tuple[str, str], rows: Tensor, pixels: Tensor, plan: MaskPlan, layout: PatchLayout,
    order: str,
) -> bool:  # fmt: skip
    """Whether `rows` (K*B, tokens, width) holds masked tokens only; raises if it fits neither.

    named: what the rows and their order are called as arguments.
    """
    name, order_name = named
    if order not in _ORDERS:
        raise ValueError(f"{order_name}={order!r} is not one of {', '.join(_ORDERS)}")
    check_dtype(name, rows, FLOATS)
    check_device(name, rows, pixels.device)
    masked = layout.num_tokens - plan.len_keep
    if masked == 0:
        raise ValueError(f"plan masks none of its {layout.num_tokens} tokens: there is no loss")
    if order == "auto" and plan.len_keep == 0:
        raise ValueError(f"plan keeps nothing: say {order_name}='tokens' or {order_name}='masked'")
    lengths = {"tokens": (layout.num_tokens,), "masked": (masked,)}
    if rows.shape[1] not in lengths.get(order, (layout.num_tokens, masked)):
        raise ValueError(
            f"{name} has {rows.shape[1]} tokens per row, expected {layout.num_tokens} (all) or"
            f" {masked} (masked); {order_name}={order!r}"
        )
    return order == "masked" or rows.shape[1] != layout.num_tokens


def _masked_reconstruction_loss(
    pred: Tensor,
    pixels: Tensor,
    pixel_mean: Tensor | None,
    pixel_std: Tensor | None,
    token_of_rank: Tensor,
    len_keep: int,
    num_views: int,
    patch_size: list[int],
    norm_pix: bool,
    masked_only: bool,
) -> Tensor:
    layout = patch_layout(pixels, tuple(patch_size))
    dtype = compute_dtype(pred, pixels)
    plan = LossPlan(layout, len_keep, num_views, norm_pix, masked_only, dtype)
    return MaskedReconstructionLoss.apply(pred, pixels, token_of_rank, pixel_mean, pixel_std, plan)


# `torch.ops.kdcmae_fast.masked_reconstruction_loss`, one value per row, for export and opcheck.
torch.library.define(
    "kdcmae_fast::masked_reconstruction_loss",
    "(Tensor pred, Tensor pixels, Tensor? pixel_mean, Tensor? pixel_std, Tensor token_of_rank,"
    " int len_keep, int num_views, int[] patch_size, bool norm_pix, bool masked_only) -> Tensor",
)
torch.library.impl(
    "kdcmae_fast::masked_reconstruction_loss",
    "CompositeImplicitAutograd",
    _masked_reconstruction_loss,
)
