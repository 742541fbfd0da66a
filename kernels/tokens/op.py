"""The public token ops: checks, the choice of implementation, registration."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..common import check_dtype, check_ndim, check_shape, distinct, register_op, resolve
from ..masking import MaskPlan
from . import reference
from .fused import FusedAssembleDecoderInput, FusedGatherTokens
from .lean import AssembleDecoderInput, EmbedPlan, EmbedVisiblePatches, GatherTokens, Segments
from .patches import PatchLayout, PatchSize, patch_layout, pixel_statistics
from .rows import check_device, check_plan

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PIXELS = (torch.uint8, *FLOATS)

for _op in ("gather_tokens", "embed_visible_patches", "assemble_decoder_input"):
    register_op(_op, impls=("triton", "cpp", "torch"))


def gather_tokens(x: Tensor, plan: MaskPlan, *, impl: str = "auto") -> Tensor:
    """The visible tokens of every view, in rank order.

    x: (B, L, D), any dtype and strides. Returns (K*B, keep, D), row k*B + b, same dtype.
    The gradient is a row copy: zero where no view keeps a token, nothing added up (views are
    disjoint). Errors: ValueError if the plan is not of this batch, token count or device.
    """
    check_ndim("x", x, 3, "(B, L, D)")
    check_plan("plan", plan, x.shape[0], x.shape[1], x.device)
    impl = resolve("gather_tokens", impl, x.device.type)
    static = plan.len_keep, plan.num_views
    if impl == "torch":
        return GatherTokens.apply(x, plan.token_of_rank, *static)
    return FusedGatherTokens.apply(x, plan.token_of_rank, *static, impl)


def embed_visible_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    plan: MaskPlan,
    *,
    patch_size: PatchSize,
    pixel_mean: Sequence[float] | Tensor | None = None,
    pixel_std: Sequence[float] | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Patch embedding of visible patches only, plus bias and positions, all views at once.

    pixels: (B, C, H, W) image, (B, T, F) audio (T time, F mel; token = f * (T/pT) + t) or
        (B, C, T, H, W) video. uint8 becomes ((x / 255) - pixel_mean) / pixel_std; floats go in as
        they are, and pixel_mean and pixel_std are then not used.
    weight: as the convolution has it: (D, C, pH, pW), (D, 1, pF, pT), (D, C, pT, pH, pW).
    bias: (D,) or None. pos_embed: (L, D) or (1, L, D).
    patch_size: an int for all axes, or one per axis in the order of the weight.
    pixel_mean, pixel_std: one per channel, in 0..1 units; None: 0 and 1.

    Returns (K*B, keep, D), row k*B + b, in the dtype of the weight, in which the product is
    computed too (fp32 accumulation), whatever autocast says.
    Pixels that require grad take the plain form, which embeds all patches and keeps them.
    Errors: ValueError naming the argument and its value.
    """
    layout = _check_pixels(pixels, patch_size, plan)
    _check_embedding(pixels, weight, bias, layout)
    pos_embed = _table("pos_embed", pos_embed, (layout.num_tokens, weight.shape[0]), pixels.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    statistics = pixel_statistics(pixels, layout, pixel_mean, pixel_std, wide)
    impl = resolve("embed_visible_patches", impl, pixels.device.type)
    if pixels.requires_grad and torch.is_grad_enabled():
        return reference.embed_visible_patches(
            pixels, weight, bias, pos_embed, plan, layout.patch, statistics
        )
    embed_plan = EmbedPlan(layout, plan.len_keep, plan.num_views, impl)
    mean, std = statistics or (None, None)
    return EmbedVisiblePatches.apply(
        pixels, weight, bias, pos_embed, plan.token_of_rank, mean, std, embed_plan
    )


def assemble_decoder_input(
    x: Tensor,
    plans: Sequence[MaskPlan],
    mask_token: Tensor,
    pos_embed: Tensor,
    *,
    restore: Literal["corrected", "released"] = "corrected",
    impl: str = "auto",
) -> Tensor:
    """Visible tokens at their places, the mask token everywhere else, plus positions.

    x: (K*B, sum of keeps, D), the visible tokens of all segments one after the other, as
        `gather_tokens` and `embed_visible_patches` order them.
    plans: one per segment, such as [audio, video]. mask_token: (D,) or (1, 1, D).
    pos_embed: (sum of L, D) or (1, sum of L, D).
    restore: "corrected" puts the tokens of view k at view k's positions; "released" puts those of
        every view at view 0's, as the published KDC-MAE code does.

    Returns (K*B, sum of L, D) in the wider dtype of x and mask_token; a wider pos_embed is rounded
    once, after the addition. Errors: ValueError naming the argument and its value.
    """
    if restore not in ("corrected", "released"):
        raise ValueError(f"restore={restore!r} is not 'corrected' or 'released'")
    plans = _check_plans(x, plans)
    dim = x.shape[2]
    mask_token = _table("mask_token", mask_token, (dim,), x.device)
    length = sum(plan.num_tokens for plan in plans)
    pos_embed = _table("pos_embed", pos_embed, (length, dim), x.device)
    impl = resolve("assemble_decoder_input", impl, x.device.type)
    keeps = tuple(plan.len_keep for plan in plans)
    segments = Segments(keeps, plans[0].num_views, restore == "released")
    if impl == "torch":
        orders = distinct(*(plan.token_of_rank for plan in plans))
        return AssembleDecoderInput.apply(x, mask_token, pos_embed, segments, *orders)
    ranks = distinct(*(plan.rank_of_token for plan in plans))
    return FusedAssembleDecoderInput.apply(x, mask_token, pos_embed, segments, impl, *ranks)


def _check_pixels(pixels: Tensor, patch_size: PatchSize, plan: MaskPlan) -> PatchLayout:
    layout = patch_layout(pixels, patch_size)
    check_dtype("pixels", pixels, PIXELS)
    check_plan("plan", plan, pixels.shape[0], layout.num_tokens, pixels.device)
    return layout


def _check_embedding(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout
) -> None:
    check_ndim("weight", weight, 2 + len(layout.patch), "(D, C, *patch_size)")
    check_dtype("weight", weight, FLOATS)
    check_device("weight", weight, pixels.device)
    wanted = (weight.shape[0], layout.channels, *layout.patch)
    check_shape("weight", weight, wanted, "(D, C, *patch_size)")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(D,)")
        check_dtype("bias", bias, FLOATS)
        check_device("bias", bias, pixels.device)


def _table(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`tensor` without its leading axes of 1, checked to be a float tensor of this shape."""
    check_dtype(name, tensor, FLOATS)
    check_device(name, tensor, device)
    extra = tensor.dim() - len(shape)
    if 0 < extra <= 3 - len(shape) and tensor.shape[:extra].numel() == 1:
        tensor = tensor.view(tensor.shape[extra:])
    check_shape(name, tensor, shape, "(..., D)")
    return tensor


def _check_plans(x: Tensor, plans: Sequence[MaskPlan]) -> tuple[MaskPlan, ...]:
    check_ndim("x", x, 3, "(K*B, sum of keeps, D)")
    check_dtype("x", x, FLOATS)
    if isinstance(plans, MaskPlan) or len(plans) == 0:
        raise ValueError("plans must be a sequence with one MaskPlan per segment, such as [plan]")
    num_views = getattr(plans[0], "num_views", 1)
    if x.shape[0] % num_views:
        raise ValueError(f"x has {x.shape[0]} rows, not a multiple of the {num_views} views")
    for index, plan in enumerate(plans):
        num_tokens = getattr(plan, "num_tokens", 0)
        check_plan(f"plans[{index}]", plan, x.shape[0] // num_views, num_tokens, x.device)
        if plan.num_views != num_views:
            raise ValueError(f"plans[{index}] has {plan.num_views} views, plans[0] {num_views}")
    visible = sum(plan.len_keep for plan in plans)
    if x.shape[1] != visible:
        raise ValueError(f"x has {x.shape[1]} tokens per row, the plans keep {visible}")
    return tuple(plans)


def _gather_tokens(x: Tensor, token_of_rank: Tensor, len_keep: int, num_views: int) -> Tensor:
    return GatherTokens.apply(x, token_of_rank, len_keep, num_views)


def _embed_visible_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    pixel_mean: Tensor | None,
    pixel_std: Tensor | None,
    token_of_rank: Tensor,
    len_keep: int,
    num_views: int,
) -> Tensor:
    layout = patch_layout(pixels, tuple(weight.shape[2:]))
    plan = EmbedPlan(layout, len_keep, num_views)
    return EmbedVisiblePatches.apply(
        pixels, weight, bias, pos_embed, token_of_rank, pixel_mean, pixel_std, plan
    )


def _assemble_decoder_input(
    x: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    token_of_rank: list[Tensor],
    len_keep: list[int],
    num_views: int,
    released: bool,
) -> Tensor:
    segments = Segments(tuple(len_keep), num_views, released)
    return AssembleDecoderInput.apply(x, mask_token, pos_embed, segments, *token_of_rank)


def _register() -> None:
    """Name the ops in the torch library: `torch.ops.kdcmae_fast.<op>`, for export and opcheck."""
    schemas = {
        "gather_tokens": "(Tensor x, Tensor token_of_rank, int len_keep, int num_views) -> Tensor",
        "embed_visible_patches": "(Tensor pixels, Tensor weight, Tensor? bias, Tensor pos_embed,"
        " Tensor? pixel_mean, Tensor? pixel_std, Tensor token_of_rank, int len_keep,"
        " int num_views) -> Tensor",
        "assemble_decoder_input": "(Tensor x, Tensor mask_token, Tensor pos_embed,"
        " Tensor[] token_of_rank, int[] len_keep, int num_views, bool released) -> Tensor",
    }
    functions: dict[str, Callable[..., Tensor]] = {
        "gather_tokens": _gather_tokens,
        "embed_visible_patches": _embed_visible_patches,
        "assemble_decoder_input": _assemble_decoder_input,
    }
    for op, schema in schemas.items():
        torch.library.define(f"kdcmae_fast::{op}", schema)
        torch.library.impl(f"kdcmae_fast::{op}", "CompositeImplicitAutograd", functions[op])


_register()
