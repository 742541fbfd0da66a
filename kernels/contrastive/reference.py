"""InfoNCE of one rank's rows against all columns, and its gradient, in plain PyTorch.

Letters: N rows (this rank's b), M columns (every rank's a, in rank order; M = N on one rank).
Logits are Z = scale * b @ a.T; the pair of row j is column offset + j. The README has the maths.
Logits that fit one block of BLOCK_ELEMENTS are kept for the gradient. More than that are walked
in blocks of rows, in both passes, so that never more than one block of them exists.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # logits alive at once: 64 MiB in float32
TINY_NORM = 1e-12  # smallest norm a feature is divided by


class Statistics(NamedTuple):
    """What the losses need of the logits; "other" leaves out the row's or column's own pair."""

    positive: Tensor  # (N,) logit of row j's own pair
    row_lse: Tensor  # (N,) log-sum-exp over the other columns
    row_max: Tensor  # (N,) largest other logit of the row
    column_lse: Tensor  # (M,) the same over this rank's rows; (0,) when not asked for
    column_max: Tensor  # (M,)
    logits: Tensor  # (N, M) if they fit one block, else (0, 0)


class Targets(NamedTuple):
    """What the gradient needs beside the operands."""

    row_lse: Tensor  # (N,) log-sum-exp over all columns
    row_weight: Tensor  # (N,) gradient of the objective by each row's loss
    positive_grad: Tensor  # (N,) gradient by the positives' logits
    column_lse: Tensor  # (M,) over all rows of all ranks; (0,) when one-sided
    column_weight: Tensor  # (M,)
    logits: Tensor  # (N, M), or (0, 0) to recompute them block by block


def normalise(x: Tensor, enabled: bool) -> tuple[Tensor, Tensor]:
    """Rows of x (N, D) over their L2 norms, and those inverse norms (N, 1); ones if disabled."""
    if not enabled:
        return x, x.new_ones(x.shape[0], 1)
    inverse = x.norm(dim=1, keepdim=True).clamp_min(TINY_NORM).reciprocal()
    return x * inverse, inverse


def normalise_grad(grad: Tensor, unit: Tensor, inverse: Tensor, enabled: bool) -> Tensor:
    """Gradient by x of `normalise`, from the gradient by its result `unit`."""
    if not enabled:
        return grad
    return (grad - unit * (unit * grad).sum(1, keepdim=True)) * inverse


def product(x: Tensor, y: Tensor, operand: torch.dtype) -> Tensor:
    """x @ y with operands rounded to `operand`, accumulated and returned in float32 (float64)."""
    x, y = x.to(operand), y.to(operand)
    if operand in (torch.float32, torch.float64):
        return x @ y
    if x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()  # the products of 16-bit operands are exact in float32


def blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the row blocks of a rows x columns matrix of logits."""
    if rows * columns <= BLOCK_ELEMENTS:
        yield 0, rows
        return
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def log_sum_exp(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, maximum) over one axis; both are -inf where every logit is."""
    top = logits.amax(dim)
    shift = top.clamp_min(torch.finfo(logits.dtype).min)
    return shift + (logits - shift.unsqueeze(dim)).exp().sum(dim).log(), top


def statistics(
    b: Tensor, a: Tensor, scale: Tensor, offset: int, operand: torch.dtype, columns: bool
) -> Statistics:
    """Statistics of the logits of b (N, D) against a (M, D); `columns` asks for theirs too."""
    found: list[Statistics] = []
    for start, stop in blocks(b.shape[0], a.shape[0]):
        logits = product(b[start:stop], a.t(), operand) * scale
        part = statistics_of(logits, offset + start, columns)
        if stop - start == b.shape[0]:
            return part
        if found:
            part = part._replace(
                column_lse=torch.logaddexp(found[-1].column_lse, part.column_lse),
                column_max=torch.maximum(found[-1].column_max, part.column_max),
            )
        found.append(part._replace(logits=scale.new_empty(0, 0)))
    positive, row_lse, row_max = (torch.cat([part[index] for part in found]) for index in range(3))
    return found[-1]._replace(positive=positive, row_lse=row_lse, row_max=row_max)


def statistics_of(logits: Tensor, offset: int, columns: bool) -> Statistics:
    """Statistics of these rows of logits, which are in it; row 0's pair is column `offset`."""
    own = logits.diagonal(offset)
    positive = own.clone()
    own.fill_(-torch.inf)  # kept apart: see `loss_of`
    row_lse, row_max = log_sum_exp(logits, 1)
    column_lse = column_max = logits.new_empty(0)
    if columns:
        column_lse, column_max = log_sum_exp(logits, 0)
    own.copy_(positive)
    return Statistics(positive, row_lse, row_max, column_lse, column_max, logits)


def loss_of(positive: Tensor, other_lse: Tensor) -> Tensor:
    """-log p of the pair: log(1 + exp(other_lse - positive)).

    With the pair kept out of the log-sum-exp the loss has full relative precision when it is
    nearly 0, and so has 1 - p = -expm1(-loss), on which the gradient rests.
    """
    return torch.logaddexp(other_lse - positive, torch.zeros_like(positive))


def logit_gradient(logits: Tensor, offset: int, targets: Targets, start: int, stop: int) -> Tensor:
    """Gradient by rows [start, stop) of the logits, which are `logits`."""
    rows = slice(start, stop)
    grad = (logits - targets.row_lse[rows, None]).exp_().mul_(targets.row_weight[rows, None])
    if targets.column_lse.shape[0]:
        grad += (logits - targets.column_lse).exp_().mul_(targets.column_weight)
    grad.diagonal(offset + start).copy_(targets.positive_grad[rows])
    return grad


def gradients(
    b: Tensor,
    a: Tensor,
    scale: Tensor,
    offset: int,
    operand: torch.dtype,
    targets: Targets,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by b (N, D), a (M, D) and scale (0-d) of the objective that `targets` describe.

    `needed`: which of the three to compute; the others come back empty or zero.
    """
    need_b, need_a, need_scale = needed
    by_b, by_scale = [], torch.zeros_like(scale)
    by_a = b.new_zeros(a.shape if need_a else (0,), dtype=scale.dtype)
    for start, stop in blocks(b.shape[0], a.shape[0]):
        rows = slice(start, stop)
        logits = targets.logits
        if logits.shape[0] == 0:
            logits = product(b[rows], a.t(), operand) * scale
        grad = logit_gradient(logits, offset, targets, start, stop)
        if need_scale:
            by_scale = by_scale + (grad * logits).sum() / scale
        if need_b:
            by_b.append(product(grad, a, operand) * scale)
        if need_a:
            by_a = by_a + product(grad.t(), b[rows], operand) * scale
    return torch.cat(by_b) if need_b else scale.new_empty(0), by_a, by_scale
