"""`masked_head_reconstruction_loss`: checks, the choice of implementation, registration."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import (
    check_dtype,
    check_ndim,
    check_shape,
    compute_dtype,
    register_op,
    resolve,
    unavailable,
    without_autocast,
)
from ..masking import MaskPlan
from ..tokens.patches import PatchLayout, PatchSize, patch_layout, pixel_statistics
from ..tokens.rows import check_device, check_plan
from . import reference
from .head_autograd import HeadReconstructionLoss
from .lean import LossPlan
from .op import FLOATS, check_rows

OP = "masked_head_reconstruction_loss"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

register_op(OP, impls=("triton", "cpp", "torch"))


def masked_head_reconstruction_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixels: Tensor,
    plan: MaskPlan,
    *,
    patch_size: PatchSize,
    norm_pix: bool = True,
    reduction: Literal["mean", "none"] = "mean",
    pixel_mean: Sequence[float] | Tensor | None = None,
    pixel_std: Sequence[float] | Tensor | None = None,
    row_order: Literal["auto", "tokens", "masked"] = "auto",
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    grad_in_forward: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """`masked_reconstruction_loss(F.linear(x, weight, bias), ...)` without the predictions.

    The head runs on masked tokens only, some of them at a time; neither predictions nor targets
    ever exist as a whole.

    x: (K*B, L, D'), one row per token (a slice of the decoder's sequence is read in place), or
        (K*B, L - keep, D'), the masked tokens only, in `plan.ids_masked(view)` order.
    weight: (P, D') and bias: (P,) or None, of the head. P, pixels, plan, patch_size, norm_pix,
        reduction, pixel_mean and pixel_std are those of `masked_reconstruction_loss`; `row_order`
        is to x what `pred_order` is to pred. Under ZeRO-3 call this in the weight's own module.
    precision: dtype of the operands of the products; None: the wider one of x and weight. Sums
        and statistics are float32 at least, whatever autocast says.
    grad_in_forward: compute the gradients with the loss, 6 FLOPs per row and weight instead of 8,
        and keep that of x until backward instead of x. Needs reduction="mean", with which None
        means True. False: keep x and form the predictions again in backward.
    impl: "auto", "torch", "cpp" or "triton" (no float64).

    Returns float32 (float64 if x, weight or pixels are), () or, with reduction="none", (K*B,).
    Differentiable once; pixels that require grad take the plain form, which keeps predictions and
    targets. Errors: ValueError naming the argument and its value.
    """
    grad_in_forward = _in_forward(reduction, grad_in_forward)
    layout = patch_layout(pixels, patch_size)
    check_dtype("pixels", pixels, (torch.uint8, *FLOATS))
    check_plan("plan", plan, pixels.shape[0], layout.num_tokens, pixels.device)
    check_ndim("x", x, 3, "(K*B, L, D') or (K*B, L - keep, D')")
    masked_only = check_rows(("x", "row_order"), x, pixels, plan, layout, row_order)
    check_shape("x", x, (plan.num_views * pixels.shape[0], *x.shape[1:]), "(K*B, tokens, D')")
    operand = _check_head(x, weight, bias, layout, precision)
    if norm_pix and layout.num_values < 2:
        raise ValueError("norm_pix=True needs patches of at least 2 values, these have 1")
    dtype = compute_dtype(x, weight, pixels)
    statistics = pixel_statistics(pixels, layout, pixel_mean, pixel_std, dtype)
    impl = _resolve(impl, dtype, pixels.device.type)
    operands = (x.to(operand), weight.to(operand), bias)
    loss_plan = LossPlan(layout, plan.len_keep, plan.num_views, norm_pix, masked_only, dtype)
    if pixels.requires_grad and torch.is_grad_enabled():
        loss = _plain(*operands, pixels, plan, statistics, loss_plan)
    else:
        constants = (pixels, *(statistics or (None, None)), plan.token_of_rank, plan.rank_of_token)
        in_forward = grad_in_forward and torch.is_grad_enabled()
        loss = HeadReconstructionLoss.apply(*operands, *constants, loss_plan, impl, in_forward)
    if reduction == "none":
        return loss
    return loss.mean() if loss.shape[0] else loss.sum()  # 0 for an empty batch


def _in_forward(reduction: str, chosen: bool | None) -> bool:
    """Whether to compute gradients in the forward pass."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is not 'mean' or 'none'")
    if chosen and reduction != "mean":
        raise ValueError(f"grad_in_forward=True needs reduction='mean', got {reduction!r}")
    return reduction == "mean" if chosen is None else chosen


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixels: Tensor,
    plan: MaskPlan,
    statistics: tuple[Tensor, Tensor] | None,
    static: LossPlan,
) -> Tensor:
    """Loss (K*B,), differentiable by the pixels, too."""
    with without_autocast(pixels.device):
        pred = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return reference.masked_reconstruction_loss(
        pred, pixels, plan, static.layout.patch, static.norm_pix, statistics, static.masked_only
    )


def _check_head(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout, precision: str | None
) -> torch.dtype:
    """The dtype of the operands of the products."""
    check_ndim("weight", weight, 2, "(P, D')")
    check_dtype("weight", weight, FLOATS)
    check_device("weight", weight, x.device)
    check_shape("weight", weight, (layout.num_values, x.shape[2]), "(P, D')")
    if bias is not None:
        check_shape("bias", bias, (layout.num_values,), "(P,)")
        check_dtype("bias", bias, FLOATS)
        check_device("bias", bias, x.device)
    inputs = torch.promote_types(x.dtype, weight.dtype)
    if precision is None:
        return inputs
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not None or one of {', '.join(PRECISIONS)}")
    if inputs == torch.float64:
        raise ValueError(
            f"precision={precision!r} would lower float64 inputs; pass None or float32 inputs"
        )
    return PRECISIONS[precision]


def _resolve(impl: str, dtype: torch.dtype, device: str) -> str:
    """`resolve`, but "auto" never takes Triton for float64, which its kernels do not compute."""
    chosen = resolve(OP, impl, device)
    if chosen != "triton" or dtype != torch.float64:
        return chosen
    if impl == "triton":
        raise ValueError(f"impl='triton' of {OP} has no float64; use impl='torch'")
    return "cpp" if unavailable(OP, "cpp", device) is None else "torch"
