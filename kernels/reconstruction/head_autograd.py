"""The head with its loss as ops of the torch library, one set per implementation, and autograd.

head_lean.py is `<name>_torch`, csrc/cpu/head_reconstruction.cpp `<name>_cpp`, kernel_head.py
`<name>_triton`. Saved for backward are inputs and two numbers per masked patch (C++: inputs only).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import compute_dtype
from . import head_lean
from .lean import LossPlan

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor pixels, Tensor? mean, Tensor? std,"
    " Tensor token_of_rank, Tensor rank_of_token"
)
_STATIC = "SymInt len_keep, SymInt num_views, int[] patch, bool norm_pix, bool masked_only"
_IMPLS = ("torch", "cpp", "triton")


def _loss_fake(impl: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, pixels, _, _, token_of_rank, _, len_keep, num_views, _, norm_pix, _ = args
    loss = x.new_empty(x.shape[0], dtype=compute_dtype(x, weight, pixels))
    patches = num_views * token_of_rank.shape[0] * (token_of_rank.shape[1] - len_keep)
    statistics = (0, 0) if impl == "cpp" else (patches, int(norm_pix))
    return loss, loss.new_empty(statistics), loss.new_empty(statistics)


def _gradients_fake(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    dweight = weight.new_empty(weight.shape, dtype=wide)
    return x.new_empty(x.shape), dweight, dweight.new_empty(weight.shape[0])


def _backward_fake(impl: str, row_weight: Tensor, mean: Tensor, rstd: Tensor, *args: Any) -> Any:
    return _gradients_fake(*args[:2])


def _both_fake(impl: str, *args: Any) -> tuple[Tensor, ...]:
    return _loss_fake(impl, *args)[0], *_gradients_fake(*args[:2])


def _blocks(*args: Any) -> head_lean.HeadBlocks:
    x, weight, bias, pixels, mean, std, token_of_rank, _, *static = args
    dtype = compute_dtype(x, weight, pixels)
    plan = head_lean.static_plan(pixels, dtype, *static)
    return head_lean.HeadBlocks(x, weight, bias, pixels, (mean, std), token_of_rank, plan)


def _loss_torch(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return head_lean.loss(_blocks(*args))


def _backward_torch(row_weight: Tensor, mean: Tensor, rstd: Tensor, *args: Any) -> Any:
    return head_lean.loss_backward(row_weight, _blocks(*args), mean, rstd)


def _both_torch(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return head_lean.loss_and_gradients(_blocks(*args))


def _define(
    name: str, schema: str, fake: Callable[..., Any], plain: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Define `<name>_<impl>` for every implementation; returns implementation -> op."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.kernel_head"), name)(*args)

    for impl in _IMPLS:
        torch.library.define(f"kdcmae_fast::{name}_{impl}", schema)

        def own_fake(*args: Any, impl: str = impl) -> Any:
            return fake(impl, *args)

        torch.library.register_fake(f"kdcmae_fast::{name}_{impl}", own_fake)
    torch.library.impl(f"kdcmae_fast::{name}_torch", ("cuda", "cpu"), plain)
    torch.library.impl(f"kdcmae_fast::{name}_triton", ("cuda", "cpu"), launch)
    return {impl: getattr(torch.ops.kdcmae_fast, f"{name}_{impl}").default for impl in _IMPLS}


# Loss (K*B,), and the statistics of the masked patches that backward wants.
LOSS = _define(
    "head_reconstruction_loss", f"({_INPUTS}, {_STATIC}) -> (Tensor, Tensor, Tensor)",
    _loss_fake, _loss_torch,
)  # fmt: skip
# dx as x; dweight and dbias in float32 at least. row_weight (K*B,): gradient by squared error / 2.
LOSS_BACKWARD = _define(
    "head_reconstruction_loss_backward",
    "(Tensor row_weight, Tensor patch_mean, Tensor patch_rstd,"
    f" {_INPUTS}, {_STATIC}) -> (Tensor, Tensor, Tensor)",
    _backward_fake, _backward_torch,
)  # fmt: skip
# Loss, and the gradients for a row_weight of 1.
LOSS_AND_GRADIENTS = _define(
    "head_reconstruction_loss_and_gradients",
    f"({_INPUTS}, {_STATIC}) -> (Tensor, Tensor, Tensor, Tensor)",
    _both_fake, _both_torch,
)  # fmt: skip


class HeadReconstructionLoss(torch.autograd.Function):
    """x (K*B, L or masked, D'), weight (P, D'), bias (P,) -> (K*B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pixels: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        token_of_rank: Tensor,
        rank_of_token: Tensor,
        plan: LossPlan,
        impl: str,
        grad_in_forward: bool,
    ) -> Tensor:
        ctx.plan, ctx.impl, ctx.operand = plan, impl, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.has_gradients = grad_in_forward and any(ctx.needs_input_grad[:3])
        inputs = (x, weight, bias, pixels, mean, std, token_of_rank, rank_of_token)
        if ctx.has_gradients:
            loss, *gradients = LOSS_AND_GRADIENTS[impl](*inputs, *_static(plan))
            ctx.save_for_backward(*gradients)
            return loss
        loss, patch_mean, patch_rstd = LOSS[impl](*inputs, *_static(plan))
        ctx.save_for_backward(patch_mean, patch_rstd, *inputs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, len_keep = ctx.plan.layout, ctx.plan.len_keep
        row_weight = grad * (2 / ((layout.num_tokens - len_keep) * layout.num_values))
        if ctx.has_gradients:
            dx, dweight, dbias = ctx.saved_tensors
            unit = row_weight[:1].sum()  # the mean's gradient is that of every row
            dx, dweight, dbias = dx * unit, dweight * unit, dbias * unit
        elif ctx.operand == torch.float16 and grad.shape[0]:
            # Weights of about 1 / (K * B * masked * P) would leave the range of float16.
            unit = row_weight.abs().amax().clamp_min(torch.finfo(row_weight.dtype).tiny)
            dx, dweight, dbias = _gradients(ctx, row_weight / unit)
            dx, dweight, dbias = dx.mul_(unit), dweight * unit, dbias * unit
        else:
            dx, dweight, dbias = _gradients(ctx, row_weight)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        return (
            dx if need_x else None,
            dweight.to(ctx.operand) if need_weight else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            *(None for _ in range(8)),
        )


def _gradients(ctx: Any, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    patch_mean, patch_rstd, *inputs = ctx.saved_tensors
    return LOSS_BACKWARD[ctx.impl](row_weight, patch_mean, patch_rstd, *inputs, *_static(ctx.plan))


def _static(plan: LossPlan) -> tuple[int, int, list[int], bool, bool]:
    patch = list(plan.layout.patch)
    return plan.len_keep, plan.num_views, patch, plan.norm_pix, plan.masked_only
