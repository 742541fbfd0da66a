"""Row divergences in Triton: a row of both views in registers, one program per row.

The forward kernel writes the losses, the backward kernel computes everything anew from the inputs
and writes both gradients; nothing is kept in between. The README has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype
from .reference import EPS

_EPS = tl.constexpr(EPS)
_DIVERGENCES = ("kl", "kl_12", "js")
_DISTRIBUTIONS = ("softmax", "shift", "batch_shift")
_KL = tl.constexpr(0)
_KL_12 = tl.constexpr(1)
_JS = tl.constexpr(2)
_SOFTMAX = tl.constexpr(0)
_SHIFT = tl.constexpr(1)
_BATCH_SHIFT = tl.constexpr(2)


@triton.jit
def _row(z_ptr, stride, D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """This program's row (BLOCK,), zeros past D, in float32 (float64 if WIDE)."""
    column = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + tl.program_id(0).to(tl.int64) * stride + column, mask=column < D, other=0)
    return z.to(tl.float64) if WIDE else z.to(tl.float32)


@triton.jit
def _probabilities(z, low_ptr, D: tl.constexpr, BLOCK: tl.constexpr, DISTRIBUTION: tl.constexpr,
                   SCALE: tl.constexpr):  # fmt: skip
    """(probabilities, log-sum-exp or the minimum, 1 / sum, whether there is mass)."""
    valid = tl.arange(0, BLOCK) < D
    if DISTRIBUTION == _SOFTMAX:
        top = tl.max(tl.where(valid, z, -float("inf"))) * SCALE
        x = tl.where(valid, tl.exp(z * SCALE - top), 0.0)
        total = tl.sum(x)
        return x / total, top + tl.log(total), 1.0 / total, total > 0
    else:
        if DISTRIBUTION == _SHIFT:
            low = tl.min(tl.where(valid, z, float("inf")))
        else:
            low = tl.load(low_ptr)
        x = tl.where(valid, z + tl.abs(low), 0.0)
        total = tl.sum(x)
        mass = total > 0
        inverse = 1.0 / tl.where(mass, total, 1.0)
        return x * inverse, low, inverse, mass


@triton.jit
def distillation_fwd_kernel(
    p_ptr, q_ptr, low_p_ptr, low_q_ptr, loss_ptr, stride_pb, stride_qb,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, DIVERGENCE: tl.constexpr,
    DISTRIBUTION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Divergence of each row. Grid: B."""
    u = _row(p_ptr, stride_pb, D, BLOCK, WIDE)
    v = _row(q_ptr, stride_qb, D, BLOCK, WIDE)
    x, lse_x, _, _ = _probabilities(u, low_p_ptr, D, BLOCK, DISTRIBUTION, SCALE)
    y, lse_y, _, _ = _probabilities(v, low_q_ptr, D, BLOCK, DISTRIBUTION, SCALE)
    if DIVERGENCE == _JS:
        middle = (x + y) / 2 + _EPS
        terms = (x * tl.log((x + _EPS) / middle) + y * tl.log((y + _EPS) / middle)) / 2
    else:
        if DISTRIBUTION == _SOFTMAX:
            ratio = (u - v) * SCALE - (lse_x - lse_y)
        else:
            ratio = tl.log((x + _EPS) / (y + _EPS))
        terms = ratio * ((x - y) / 2 if DIVERGENCE == _KL else x)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(terms))


@triton.jit
def _feature_grad(
    grad, x, z, low, inverse, mass, low_grad_ptr, weight,
    D: tl.constexpr, BLOCK: tl.constexpr, DISTRIBUTION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """weight * gradient by the features, from the gradient by their probabilities."""
    inner = tl.sum(grad * x)
    if DISTRIBUTION == _SOFTMAX:
        return weight * SCALE * x * (grad - inner)
    else:
        valid = tl.arange(0, BLOCK) < D
        inner = tl.where(mass, inner, 0.0)
        grad = tl.where(valid, weight * inverse * (grad - inner), 0.0)
        lowest = valid & (z == low)
        others = tl.sum(tl.where(lowest, 0.0, grad))
        if DISTRIBUTION == _SHIFT:
            # |low| moves with the minimum. Below zero its mass is 0 whatever it is, and the
            # gradient by its mass, of the order of 1 / eps, has to cancel first.
            ties = tl.sum(lowest.to(tl.int32))
            mean = tl.sum(tl.where(lowest, grad, 0.0)) / ties
            share = others / ties
            moved = tl.where(low > 0, grad + mean + share, grad)
            moved = tl.where(low < 0, (grad - mean) - share, moved)
            grad = tl.where(lowest, moved, grad)
        else:
            tl.store(low_grad_ptr + tl.program_id(0) * 2, others)
        return grad


@triton.jit
def distillation_bwd_kernel(
    grad_ptr, p_ptr, q_ptr, low_p_ptr, low_q_ptr, grad_p_ptr, grad_q_ptr, low_grad_ptr,
    stride_grad, stride_pb, stride_qb,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, DIVERGENCE: tl.constexpr,
    DISTRIBUTION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients by both views; low_grad (B, 2): what flows into the batch's minima from the
    entries that are not it. Grid: B."""
    u = _row(p_ptr, stride_pb, D, BLOCK, WIDE)
    v = _row(q_ptr, stride_qb, D, BLOCK, WIDE)
    x, low_x, inverse_x, mass_x = _probabilities(u, low_p_ptr, D, BLOCK, DISTRIBUTION, SCALE)
    y, low_y, inverse_y, mass_y = _probabilities(v, low_q_ptr, D, BLOCK, DISTRIBUTION, SCALE)
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(grad_ptr + row * stride_grad)
    if DISTRIBUTION == _SOFTMAX and DIVERGENCE != _JS:
        ratio = (u - v) * SCALE - (low_x - low_y)  # the difference of the log-sum-exps
        if DIVERGENCE == _KL_12:
            by_p = weight * SCALE * x * (ratio - tl.sum(x * ratio))
            by_q = weight * SCALE * (y - x)
        else:
            by_p = weight * SCALE / 2 * (x * (ratio - tl.sum(x * ratio)) + (x - y))
            by_q = weight * SCALE / 2 * (y * (tl.sum(y * ratio) - ratio) + (y - x))
    else:
        a, b = x + _EPS, y + _EPS
        if DIVERGENCE == _JS:
            middle = (x + y) / 2
            m = middle + _EPS
            by_p = (tl.log(a / m) + x / a - middle / m) / 2
            by_q = (tl.log(b / m) + y / b - middle / m) / 2
        elif DIVERGENCE == _KL_12:
            by_p = tl.log(a / b) + x / a
            by_q = -x / b
        else:
            ratio = tl.log(a / b)
            by_p = (ratio + (x - y) / a) / 2
            by_q = (-ratio + (y - x) / b) / 2
        by_p = _feature_grad(by_p, x, u, low_x, inverse_x, mass_x, low_grad_ptr, weight, D, BLOCK,
                             DISTRIBUTION, SCALE)  # fmt: skip
        by_q = _feature_grad(by_q, y, v, low_y, inverse_y, mass_y, low_grad_ptr + 1, weight, D,
                             BLOCK, DISTRIBUTION, SCALE)  # fmt: skip
    column = tl.arange(0, BLOCK)
    tl.store(grad_p_ptr + row * D + column, by_p.to(grad_p_ptr.dtype.element_ty), mask=column < D)
    tl.store(grad_q_ptr + row * D + column, by_q.to(grad_q_ptr.dtype.element_ty), mask=column < D)


def distillation_rows(
    p: Tensor, q: Tensor, divergence: str, distribution: str, temperature: float
) -> Tensor:
    """p, q (B, D) -> (B,) divergences in the dtype of the computation."""
    p, q = _rowwise(p), _rowwise(q)
    dtype = compute_dtype(p, q)
    loss = torch.empty(p.shape[0], dtype=dtype, device=p.device)
    if p.shape[0] == 0:
        return loss
    low_p, low_q = _lowest(p, q, distribution, dtype)
    with torch.cuda.device_of(p):
        distillation_fwd_kernel[(p.shape[0],)](
            p, q, low_p, low_q, loss, p.stride(0), q.stride(0),
            **_options(p, dtype, divergence, distribution, temperature),
        )  # fmt: skip
    return loss


def distillation_rows_grad(
    grad: Tensor, p: Tensor, q: Tensor, divergence: str, distribution: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """grad (B,), p, q (B, D) -> gradients by p and q in their dtypes."""
    p, q = _rowwise(p), _rowwise(q)
    dtype = compute_dtype(p, q)
    shared = distribution == "batch_shift"  # then more is added to the gradients below
    by_p, by_q = (
        torch.empty(x.shape, dtype=dtype if shared else x.dtype, device=x.device) for x in (p, q)
    )
    if p.shape[0] == 0:
        return by_p.to(p.dtype), by_q.to(q.dtype)
    low_p, low_q = _lowest(p, q, distribution, dtype)
    low_grad = torch.empty(p.shape[0], 2, dtype=dtype, device=p.device)
    with torch.cuda.device_of(p):
        distillation_bwd_kernel[(p.shape[0],)](
            grad, p, q, low_p, low_q, by_p, by_q, low_grad, grad.stride(0), p.stride(0),
            q.stride(0), **_options(p, dtype, divergence, distribution, temperature),
        )  # fmt: skip
    if low_p is not None and low_q is not None:
        by_p = _with_low_grad(by_p, p, low_p, low_grad[:, 0])
        by_q = _with_low_grad(by_q, q, low_q, low_grad[:, 1])
    return by_p.to(p.dtype), by_q.to(q.dtype)


def _with_low_grad(grad: Tensor, z: Tensor, low: Tensor, others: Tensor) -> Tensor:
    """The last step of `_feature_grad`, for the minimum of the whole batch."""
    lowest = z == low
    ties = lowest.sum().clamp_min(1)
    mean = torch.where(lowest, grad, 0.0).sum() / ties
    share = others.sum() / ties
    moved = torch.where(low > 0, grad + mean + share, grad)
    moved = torch.where(low < 0, (grad - mean) - share, moved)
    return torch.where(lowest, moved, grad)


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _lowest(
    p: Tensor, q: Tensor, distribution: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if distribution != "batch_shift":
        return None, None
    return p.amin().to(dtype), q.amin().to(dtype)


def _options(
    p: Tensor, dtype: torch.dtype, divergence: str, distribution: str, temperature: float
) -> dict[str, int | float | bool]:
    block = triton.next_power_of_2(p.shape[1])
    return {
        "D": p.shape[1], "BLOCK": block, "WIDE": dtype == torch.float64,
        "DIVERGENCE": _DIVERGENCES.index(divergence),
        "DISTRIBUTION": _DISTRIBUTIONS.index(distribution), "SCALE": 1 / temperature,
        "num_warps": min(16, max(1, block // 256)),
    }  # fmt: skip
