"""The reconstruction loss on its compiled ops: what `impl="cpp"` and `impl="triton"` run.

csrc/cpu/reconstruction.cpp fills in `<name>_cpp`, kernel.py `<name>_triton`. Nothing but inputs is
saved: a patch is formed again in backward, and its statistics with it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import compute_dtype
from ..tokens.library import define_compiled
from .lean import LossPlan


def _loss_fake(pred: Tensor, pixels: Tensor, *args: Any) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=compute_dtype(pred, pixels))


def _loss_backward_fake(grad: Tensor, pred: Tensor, *args: Any) -> Tensor:
    return pred.new_empty(pred.shape)


_KERNELS = f"{__package__}.kernel"
_REST = (
    "Tensor pred, Tensor pixels, Tensor? mean, Tensor? std, Tensor rank_of_token,"
    " SymInt len_keep, SymInt num_views, int[] patch, bool norm_pix, bool masked_only) -> Tensor"
)
LOSS = define_compiled("reconstruction_loss", f"({_REST}", _loss_fake, _KERNELS)
LOSS_BACKWARD = define_compiled(
    "reconstruction_loss_backward", f"(Tensor grad, {_REST}", _loss_backward_fake, _KERNELS
)


class FusedReconstructionLoss(torch.autograd.Function):
    """pred (K*B, L or masked, P), rank_of_token (B, L) -> (K*B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        pixels: Tensor,
        rank_of_token: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        plan: LossPlan,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(pred, pixels, mean, std, rank_of_token)
        ctx.plan, ctx.impl = plan, impl
        return LOSS[impl](pred, pixels, mean, std, rank_of_token, *_static(plan))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dpred = LOSS_BACKWARD[ctx.impl](grad, *ctx.saved_tensors, *_static(ctx.plan))
        return dpred, None, None, None, None, None, None


def _static(plan: LossPlan) -> tuple[int, int, list[int], bool, bool]:
    patch = list(plan.layout.patch)
    return plan.len_keep, plan.num_views, patch, plan.norm_pix, plan.masked_only
