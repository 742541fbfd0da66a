"""The public max-pooled InfoNCE: argument checks, autograd, the global batch, registration."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import check_dtype, check_ndim, compute_dtype, register_op, resolve, without_autocast
from . import max_pooled_fused as fused
from . import max_pooled_reference as reference
from .distributed import ALONE, check_equal_rows, gather, ranks_of, scatter_sum
from .fused import unit_rows as unit_rows_fused
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
from .reference import TINY_NORM, logit_gradient, normalise_grad, statistics_of

OP = "max_pooled_info_nce"

register_op(OP, impls=("cpp", "triton", "torch"))
register_op("diagonal_maps", impls=("torch",))


def max_pooled_info_nce(
    maps: Tensor,
    vectors: Tensor,
    *,
    temperature: float | Tensor = 0.03,
    symmetric: bool = True,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    return_accuracy: bool = False,
    precision: str | None = None,
    impl: str = "auto",
) -> Tensor | InfoNCE:
    """InfoNCE of the pairs (maps[i], vectors[i]), a map matching a vector by its best cell.

    S[n, m] = max over p of <maps[n, p], vectors[m]> / temperature (EZ-VSL, arXiv 2203.09324: maps
    of images, vectors of sounds); of equal cells the first counts, and takes the gradient. The loss
    is the mean over pairs of -log softmax of S[i, i], averaged over both directions: over the
    vectors for each map, and over the maps for each vector. EZ-VSL and AVL sum the directions:
    theirs is twice this loss. `symmetric=False` leaves only the softmax over the vectors for each
    map (CAV-MAE's direction: audio for each image).

    maps: (B, HW, D), vectors: (B, D), float64, float32, bfloat16 or float16, also of two dtypes. An
        (B, D, H, W) output of a convolution goes in as x.flatten(2).transpose(1, 2): strides are
        free. HW is 1 to 32768.
    temperature: a positive float, or a 0-d tensor on the same device that may be learned (its
        value is not looked at, so keep it positive).
    normalize: divide each cell and each vector by its L2 norm (shorter than 1e-12: by 1e-12).
    group: as of info_nce: the negatives are those of all ranks (maps stay where they are, vectors
        are gathered), the loss is that of the global batch, bit-equal on every rank, and gradients
        are `size` times this rank's share of its gradient. EZ-VSL takes local negatives, as None.
    reduction, return_accuracy, precision: as of info_nce.
    impl: "auto", "torch", "cpp" or "triton" (no float64).

    Returns a float32 (float64 for float64 inputs) scalar or (B,), or InfoNCE(loss, accuracy). The
    B x HW x B similarities never exist as a whole: saved for backward are maps, vectors, and per
    pair (n, m) a logit and the cell it is of. An empty batch gives 0. Deterministic; differentiable
    once; autocast does not change it. Errors are ValueErrors that name the argument.
    """
    _check_inputs(maps, vectors)
    check_options(temperature, reduction, ("maps", maps.device))
    operand = operand_dtype(torch.promote_types(maps.dtype, vectors.dtype), precision)
    impl = resolve_impl(OP, operand, impl, maps.device.type)
    ranks = ranks_of(group)
    check_equal_rows("maps", maps, ranks)
    tau = temperature_tensor(temperature, compute_dtype(maps, vectors), maps.device)
    losses = _pair_losses(maps, vectors, tau, Options(symmetric, normalize, operand, ranks, impl))
    return result_of(losses, ranks, reduction, return_accuracy)


def diagonal_maps(
    maps: Tensor,
    vectors: Tensor,
    *,
    temperature: float | Tensor = 0.03,
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Each pair's own map of logits, (B, HW): <maps[i, p], vectors[i]> / temperature.

    Its maximum over p is the positive logit of `max_pooled_info_nce`, whose arguments these are; it
    is the heat map that localises a sound. float32 (float64 for float64 inputs), differentiable.
    impl: "auto" or "torch", a batched product.
    """
    _check_inputs(maps, vectors)
    check_options(temperature, "none", ("maps", maps.device))
    resolve("diagonal_maps", impl, maps.device.type)
    dtype = compute_dtype(maps, vectors)
    with without_autocast(maps.device):
        cells, rows = maps.to(dtype), vectors.to(dtype)
        products = torch.bmm(cells, rows.unsqueeze(2)).squeeze(2)
        if normalize:
            norms = cells.norm(dim=2).clamp_min(TINY_NORM)
            products = products / norms / rows.norm(dim=1, keepdim=True).clamp_min(TINY_NORM)
        return products / temperature_tensor(temperature, dtype, maps.device)


def _pair_losses(
    maps: Tensor, vectors: Tensor, tau: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """(losses, hits), (B,) each, of this rank's pairs."""
    if maps.shape[0] == 0:
        empty = maps.sum((1, 2)).to(tau.dtype) + vectors.sum(1).to(tau.dtype)
        return empty, empty.detach()
    return _PairLosses.apply(maps, vectors, tau, options)


class _PairLosses(torch.autograd.Function):
    """Losses (N,) and hits (N,) of this rank's pairs.

    Rows of logits are this rank's maps, columns are all vectors. Saves the maps (as they came;
    impl="triton": as unit cells), the vectors, and N x M logits and cells.
    """

    @staticmethod
    def forward(
        ctx, maps: Tensor, vectors: Tensor, tau: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        offset = options.ranks.rank * maps.shape[0]
        with without_autocast(maps.device):
            own, own_inverse = unit_rows(vectors, tau.dtype, options)
            everyone = gather(own, options.ranks)
            rows = (*_cells(maps, tau.dtype, options), everyone, tau.reciprocal())
            if options.impl == "torch":
                logits, cells = reference.scores(*rows, options.operand)
            else:
                logits, cells = fused.scores(options.impl, *rows)
            found = statistics_of(logits, offset, options.symmetric)
        losses = losses_of(found, offset, options)
        by_pair = (found.positive, losses.row_loss, losses.column_loss)
        ctx.save_for_backward(*rows, own_inverse, cells, *by_pair, logits)
        ctx.options, ctx.dtypes = options, (maps.dtype, vectors.dtype)
        ctx.mark_non_differentiable(losses.hits)
        return losses.loss, losses.hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        rows = ctx.saved_tensors[:4]
        own_inverse, cells = ctx.saved_tensors[4:6]
        options = ctx.options
        scale, count = rows[3], rows[0].shape[0]
        offset = options.ranks.rank * count
        need_maps, need_vectors, need_tau, _ = ctx.needs_input_grad
        targets, unit = targets_of(grad, ctx.saved_tensors[6:], options)
        grad_maps = grad_vectors = grad_tau = None
        with without_autocast(grad.device):
            by_logits = logit_gradient(targets.logits, offset, targets, 0, count)
            if need_tau:
                grad_tau = -(by_logits * targets.logits).sum() * unit * scale
            by_maps, by_vectors = _gradients(ctx, rows, unit, by_logits, targets.logits, cells)
            if need_maps:
                grad_maps = by_maps.to(ctx.dtypes[0])
            if need_vectors:
                own = rows[2][offset : offset + count].to(scale.dtype)
                by_own = scatter_sum(by_vectors, options.ranks)
                by_own = normalise_grad(by_own, own, own_inverse, options.normalize)
                grad_vectors = by_own.to(ctx.dtypes[1])
        return grad_maps, grad_vectors, grad_tau, None


def _cells(maps: Tensor, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    """The maps as the implementation wants them, and their cells' inverse norms (N, P)."""
    if options.impl == "triton":
        flat = maps.reshape(-1, maps.shape[2])
        if options.normalize:
            unit, inverse = unit_rows_fused(flat, options.operand)
            return unit.view(maps.shape), inverse.view(maps.shape[:2])
        return maps.to(options.operand).contiguous(), maps.new_ones(maps.shape[:2], dtype=dtype)
    if not options.normalize:
        inverse = maps.new_ones(maps.shape[:2], dtype=dtype)
    else:
        norms = torch.linalg.vector_norm(maps, dim=2, dtype=dtype)
        inverse = norms.clamp_min(TINY_NORM).reciprocal()
    if torch.promote_types(maps.dtype, options.operand) == options.operand:
        return maps, inverse  # widening is exact and can wait
    return (maps if options.impl == "torch" else maps.to(options.operand)), inverse


def _gradients(
    ctx, rows: tuple, unit: Tensor, by_logits: Tensor, logits: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by the maps that came in and by the unit vectors of all ranks, where needed."""
    need_maps, need_vectors = ctx.needs_input_grad[:2]
    _, normalize, operand, _, impl = ctx.options
    if impl == "torch":
        return reference.gradients(
            rows, unit, operand, by_logits, cells, normalize, (need_maps, need_vectors)
        )
    by_maps = by_vectors = unit
    if need_maps:
        found = (by_logits, logits, cells)
        by_maps = fused.gradient_by_maps(impl, rows, unit, found, normalize, ctx.dtypes[0])
    if need_vectors:
        by_vectors = fused.gradient_by_vectors(impl, rows, unit, by_logits, cells)
    return by_maps, by_vectors


def _check_inputs(maps: Tensor, vectors: Tensor) -> None:
    check_ndim("maps", maps, 3, "(B, HW, D)")
    check_ndim("vectors", vectors, 2, "(B, D)")
    batch, cells, width = maps.shape
    if tuple(vectors.shape) != (batch, width):
        raise ValueError(
            f"vectors must be (B, D) = {(batch, width)} as maps, got {tuple(vectors.shape)}"
        )
    if not 1 <= cells <= reference.MAX_CELLS:
        raise ValueError(f"maps must have 1 to {reference.MAX_CELLS} cells HW, got {cells}")
    check_dtype("maps", maps, FLOATS)
    check_dtype("vectors", vectors, FLOATS)
    if vectors.device != maps.device:
        raise ValueError(
            f"vectors is on {vectors.device}, maps on {maps.device}; they must share a device"
        )


def _op(
    maps: Tensor, vectors: Tensor, temperature: Tensor, symmetric: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    operand = torch.promote_types(maps.dtype, vectors.dtype)
    tau = temperature.to(compute_dtype(maps, vectors))
    return _pair_losses(maps, vectors, tau, Options(symmetric, normalize, operand, ALONE, "torch"))


torch.library.define(
    f"kdcmae_fast::{OP}",
    "(Tensor maps, Tensor vectors, Tensor temperature, bool symmetric, bool normalize)"
    " -> (Tensor, Tensor)",
)
torch.library.impl(f"kdcmae_fast::{OP}", "CompositeImplicitAutograd", _op)
