"""What the losses over pairs share: options and their checks, losses and targets of the logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import check_dtype, check_ndim, check_number, resolve
from . import fused, reference
from .distributed import GlobalMean, Ranks, gather, merge_columns

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNEL_ONLY = ("tf32", "bf16x3")


class InfoNCE(NamedTuple):
    """The loss, and the share of pairs whose own logit is the largest of their softmax."""

    loss: Tensor  # () or, with reduction="none", (B,)
    accuracy: Tensor  # the same shape, without gradient


class Options(NamedTuple):
    """How an autograd function computes."""

    symmetric: bool
    normalize: bool
    operand: torch.dtype  # of the products' operands
    ranks: Ranks
    impl: str


class Losses(NamedTuple):
    """(N,) each, of this rank's pairs."""

    loss: Tensor
    hits: Tensor
    row_loss: Tensor
    column_loss: Tensor  # the row's again when one-sided


def resolve_impl(op: str, operand: torch.dtype, impl: str, device: str) -> str:
    """`resolve`, and `torch` in place of Triton for float64."""
    found = resolve(op, impl, device)
    if found != "triton" or operand != torch.float64:
        return found
    if impl == "triton":
        raise ValueError(f"impl='triton' of {op} takes no float64; use impl='auto' or 'torch'")
    return "torch"


def check_options(
    temperature: float | Tensor, reduction: str, beside: tuple[str, torch.device]
) -> None:
    """Raise ValueError for a wrong option; `beside`: the operand whose device the options share."""
    name, device = beside
    if isinstance(temperature, Tensor):
        check_ndim("temperature", temperature, 0, "a float or a 0-d tensor")
        check_dtype("temperature", temperature, FLOATS)
        if temperature.device != device:
            raise ValueError(f"temperature is on {temperature.device}, {name} on {device}")
    else:
        check_number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def operand_dtype(inputs: torch.dtype, precision: str | None) -> torch.dtype:
    """The dtype of the products' operands, for inputs whose wider dtype is `inputs`."""
    if precision is None:
        return inputs
    if precision in KERNEL_ONLY:
        raise ValueError(
            f"precision={precision!r} has no impl='torch' form; use one of {', '.join(PRECISIONS)}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not None or one of {', '.join(PRECISIONS)}")
    if inputs == torch.float64:
        raise ValueError(
            f"precision={precision!r} would lower float64 inputs; pass None or float32 inputs"
        )
    return PRECISIONS[precision]


def temperature_tensor(
    temperature: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The temperature as a 0-d tensor in the dtype of the computation."""
    if isinstance(temperature, Tensor):
        return temperature.to(dtype)
    return torch.full((), temperature, dtype=dtype, device=device)


def unit_rows(x: Tensor, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    """Rows of x (N, D) over their norms, in the operand dtype, and their inverse norms (N, 1)."""
    if options.impl == "triton" and options.normalize:
        return fused.unit_rows(x, options.operand)
    unit, inverse = reference.normalise(x.to(dtype), options.normalize)
    return unit.to(options.operand).contiguous(), inverse


def losses_of(found: reference.Statistics, offset: int, options: Options) -> Losses:
    """Losses and hits of this rank's pairs, from the statistics of its rows' logits."""
    positive = found.positive
    row_loss = column_loss = loss = reference.loss_of(positive, found.row_lse)
    hits = (positive > found.row_max).to(positive.dtype)
    if options.symmetric:
        lse, top = merge_columns(found.column_lse, found.column_max, options.ranks)
        own = slice(offset, offset + positive.shape[0])
        column_loss = reference.loss_of(positive, lse[own])
        loss = (row_loss + column_loss) / 2
        hits = (hits + (positive > top[own]).to(positive.dtype)) / 2
    return Losses(loss, hits, row_loss, column_loss)


def targets_of(
    grad: Tensor, saved: tuple[Tensor, ...], options: Options
) -> tuple[reference.Targets, Tensor]:
    """Targets for the gradient of sum over ranks of grad . loss, and the unit they are in.

    saved: positive, row_loss, column_loss and logits. The weights are divided by their largest
    value: at a batch of 32768 the mean's weights times small probabilities would leave float16's
    range.
    """
    positive, row_loss, column_loss, logits = saved
    share = grad / 2 if options.symmetric else grad
    miss = row_loss.neg().expm1()  # -(1 - p)
    none = grad.new_empty(0)
    column_lse, column_weight, weights = none, none, share
    if options.symmetric:
        miss = miss + column_loss.neg().expm1()
        column_lse, column_weight = gather(
            torch.stack([positive + column_loss, share], dim=1), options.ranks
        ).unbind(1)
        weights = column_weight
    unit = weights.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny)
    row_weight, column_weight = share / unit, column_weight / unit
    targets = reference.Targets(
        positive + row_loss, row_weight, row_weight * miss, column_lse, column_weight, logits
    )
    return targets, unit


def result_of(
    losses: tuple[Tensor, Tensor], ranks: Ranks, reduction: str, return_accuracy: bool
) -> Any:
    """What the public functions return, from the (B,) losses and hits of this rank's pairs."""
    loss, hits = losses
    if reduction == "mean":
        means = torch.stack([loss.sum(), hits.sum()]) / max(1, loss.shape[0])
        if ranks.group is not None:
            means = GlobalMean.apply(means, ranks)
        loss, hits = means[0], means[1].detach()
    return InfoNCE(loss, hits) if return_accuracy else loss
