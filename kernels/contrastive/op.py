"""The public InfoNCE: argument checks, autograd, the global batch, registration."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import (
    check_dtype,
    check_ndim,
    check_shape,
    compute_dtype,
    distinct,
    register_op,
    without_autocast,
)
from . import fused, reference
from .distributed import ALONE, check_equal_rows, gather, ranks_of, scatter_sum
from .pairs import (
    FLOATS,
    InfoNCE,
    Options,
    check_options,
    losses_of,
    operand_dtype,
    resolve_impl,
    result_of,
    targets_of,
    temperature_tensor,
    unit_rows,
)

register_op("info_nce", impls=("cpp", "triton", "torch"))


def info_nce(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    return_accuracy: bool = False,
    precision: str | None = None,
    impl: str = "auto",
) -> Tensor | InfoNCE:
    """InfoNCE of the pairs (a[i], b[i]): the other rows are the negatives.

    One-sided (CAV-MAE, arXiv 2210.07839): mean over j of -log softmax over i of
    <a[i], b[j]> / temperature, at i = j; CAV-MAE passes audio as a and video as b. `symmetric`
    averages it with the other direction, from the same similarities.

    a, b: (B, D), float64, float32, bfloat16 or float16, also of two different dtypes.
    temperature: a positive float, or a 0-d tensor on the same device that may be learned (its
        value is not looked at, so keep it positive).
    normalize: divide each row by its L2 norm (rows shorter than 1e-12 by 1e-12).
    group: a process group whose ranks each hold B rows. The negatives are the rows of all ranks
        and the loss is that of the global batch, bit-equal on every rank; gradients, also the
        temperature's, are `size` times this rank's share of the global loss's gradient, so that
        an engine which averages gradients over ranks ends up with exactly that gradient.
        All ranks call with the same options. On CPU unequal B is an error; on GPUs it is not
        detected (the collectives fail or hang; TORCH_DISTRIBUTED_DEBUG=DETAIL finds it).
    reduction: "mean", or "none" for the (B,) losses of this rank's pairs; their gradient is that
        of the sum over all ranks of what the caller made of them, not scaled.
    return_accuracy: return InfoNCE(loss, accuracy); a tie for the largest logit counts as wrong,
        so collapsed features score 0; with `symmetric` the mean of both directions.
    precision: dtype of the matrix products' operands, "fp32", "bf16" or "fp16"; None: the
        inputs' (the wider of the two). Logits, log-sum-exp and sums are float32 at least.
    impl: "auto", "torch", "cpp" or "triton" (no float64).

    Returns a float32 (float64 for float64 inputs) scalar or (B,). An empty batch gives 0 and
    accuracy 0. Deterministic; differentiable once; autocast does not change it. Errors are
    ValueErrors that name the argument.
    """
    operand = _check(a, b, temperature, reduction, precision)
    impl = resolve_impl("info_nce", operand, impl, a.device.type)
    ranks = ranks_of(group)
    check_equal_rows("a", a, ranks)
    tau = temperature_tensor(temperature, compute_dtype(a, b), a.device)
    losses = _pair_losses(a, b, tau, Options(symmetric, normalize, operand, ranks, impl))
    return result_of(losses, ranks, reduction, return_accuracy)


def _pair_losses(a: Tensor, b: Tensor, tau: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(losses, hits), (B,) each, of this rank's pairs."""
    if a.shape[0] == 0:
        empty = a.sum(1).to(tau.dtype) + b.sum(1).to(tau.dtype)
        return empty, empty.detach()
    return _PairLosses.apply(*distinct(a, b), tau, options)


class _PairLosses(torch.autograd.Function):
    """Losses (N,) and hits (N,) of this rank's pairs.

    Saves the operands, five vectors and the logits if they fit one block; larger ones are
    recomputed, at 8NMD FLOPs in all instead of 6NMD. The operands are normalised copies, for
    impl="cpp" the inputs themselves in the operand dtype.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, tau: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        symmetric, normalize, operand, ranks, impl = options
        rows_a, inverse_a = _operand(a, tau.dtype, options)
        rows_b, inverse_b = _operand(b, tau.dtype, options)
        all_a = gather(rows_a, ranks)
        offset = ranks.rank * a.shape[0]
        with without_autocast(a.device):
            scale = tau.reciprocal()
            if impl == "torch":
                found = reference.statistics(rows_b, all_a, scale, offset, operand, symmetric)
            elif impl == "triton":
                found = fused.tile_statistics(rows_b, all_a, scale, offset, symmetric, normalize)
            else:
                inverse_a = gather(inverse_a, ranks)
                inverses = (inverse_b, inverse_a)
                found = fused.statistics(rows_b, all_a, inverses, scale, offset, symmetric)
        losses = losses_of(found, offset, options)
        vectors = (inverse_a, inverse_b, found.positive, losses.row_loss, losses.column_loss)
        ctx.save_for_backward(all_a, rows_b, tau, *vectors, found.logits)
        ctx.options, ctx.dtypes = options, (a.dtype, b.dtype)
        ctx.mark_non_differentiable(losses.hits)
        return losses.loss, losses.hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        targets, unit = targets_of(grad, ctx.saved_tensors[5:], ctx.options)
        with without_autocast(grad.device):
            by_impl = _norm_free_grads if ctx.options.impl == "cpp" else _unit_grads
            grad_a, grad_b, by_scale = by_impl(ctx, targets, unit)
        need_a, need_b, need_tau, _ = ctx.needs_input_grad
        grad_tau = -by_scale * unit / ctx.saved_tensors[2].square() if need_tau else None
        return (
            grad_a.to(ctx.dtypes[0]) if need_a and grad_a is not None else None,
            grad_b.to(ctx.dtypes[1]) if need_b and grad_b is not None else None,
            grad_tau,
            None,
        )


def _operand(x: Tensor, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    """The rows that are multiplied, in the operand dtype, and their inverse norms (N, 1)."""
    if options.impl == "cpp":
        return x.to(options.operand), fused.inverse_norms(x, options.normalize, dtype)
    return unit_rows(x, dtype, options)


def _unit_grads(
    ctx: Any, targets: reference.Targets, unit: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients by a and b, None where not needed, and by the scale in units of `unit`."""
    all_a, unit_b, tau, inverse_a, inverse_b = ctx.saved_tensors[:5]
    _, normalize, operand, ranks, impl = ctx.options
    need_a, need_b, need_tau, _ = ctx.needs_input_grad
    offset, scale = ranks.rank * unit_b.shape[0], tau.reciprocal()
    if impl == "triton":
        by_b, by_a, by_scale = fused.tile_gradients(unit_b, all_a, scale, offset, targets)
    else:
        needed = (need_b, need_a, need_tau)
        by_b, by_a, by_scale = reference.gradients(
            unit_b, all_a, scale, offset, operand, targets, needed
        )
    grad_a = grad_b = None
    if need_a:
        own = all_a[offset : offset + unit_b.shape[0]].to(tau.dtype)
        by_a = scatter_sum(by_a * unit, ranks)
        grad_a = reference.normalise_grad(by_a, own, inverse_a, normalize)
    if need_b:
        own = unit_b.to(tau.dtype)
        grad_b = reference.normalise_grad(by_b * unit, own, inverse_b, normalize)
    return grad_a, grad_b, by_scale


def _norm_free_grads(
    ctx: Any, targets: reference.Targets, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from rows and inverse norms; always both gradients, in place where they are ours."""
    all_a, rows_b, tau, inverse_a, inverse_b = ctx.saved_tensors[:5]
    _, normalize, _, ranks, _ = ctx.options
    offset = ranks.rank * rows_b.shape[0]
    own = slice(offset, offset + rows_b.shape[0])
    by_b, by_a, by_scale = fused.gradients(
        rows_b, all_a, (inverse_b, inverse_a), tau.reciprocal(), offset, targets
    )
    by_a = scatter_sum(by_a.mul_(unit), ranks)
    grad_a = fused.norm_grad_(by_a, all_a[own], inverse_a[own], normalize)
    grad_b = fused.norm_grad_(by_b.mul_(unit), rows_b, inverse_b, normalize)
    return grad_a, grad_b, by_scale


def _check(
    a: Tensor, b: Tensor, temperature: float | Tensor, reduction: str, precision: str | None
) -> torch.dtype:
    """Raise ValueError for a wrong argument; returns the dtype of the products' operands."""
    check_ndim("a", a, 2, "(B, D)")
    check_shape("b", b, tuple(a.shape), "(B, D) as a")
    check_dtype("a", a, FLOATS)
    check_dtype("b", b, FLOATS)
    if b.device != a.device:
        raise ValueError(f"b is on {b.device}, a on {a.device}; they must share a device")
    check_options(temperature, reduction, ("a", a.device))
    return operand_dtype(torch.promote_types(a.dtype, b.dtype), precision)


def _info_nce_op(
    a: Tensor, b: Tensor, temperature: Tensor, symmetric: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    operand = torch.promote_types(a.dtype, b.dtype)
    tau = temperature.to(compute_dtype(a, b))
    return _pair_losses(a, b, tau, Options(symmetric, normalize, operand, ALONE, "torch"))


torch.library.define(
    "kdcmae_fast::info_nce",
    "(Tensor a, Tensor b, Tensor temperature, bool symmetric, bool normalize) -> (Tensor, Tensor)",
)
torch.library.impl("kdcmae_fast::info_nce", "CompositeImplicitAutograd", _info_nce_op)
