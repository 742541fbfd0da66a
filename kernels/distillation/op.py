"""The public distillation loss: argument checks, autograd, registration."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import (
    check_dtype,
    check_ndim,
    check_number,
    check_shape,
    compute_dtype,
    distinct,
    register_op,
    resolve,
)
from .library import FLOATS, define_fused
from .reference import divergence_rows

DIVERGENCES = ("kl", "kl_12", "js")
DISTRIBUTIONS = ("softmax", "shift", "batch_shift")
MAX_TRITON_WIDTH = 8192  # a program holds a row of both views in registers

register_op("distillation_loss", impls=("cpp", "triton", "torch"))


def distillation_loss(
    p: Tensor,
    q: Tensor,
    *,
    divergence: str = "kl",
    distribution: str = "softmax",
    temperature: float = 1.0,
    stop_gradient: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Divergence between two views' features, row by row (KDC-MAE, arXiv 2411.12270).

    p, q: (B, D) features of view 1 and view 2, float64, float32, bfloat16 or float16.
    divergence: "kl", the mean of KL(p || q) and KL(q || p); "kl_12", KL(p || q) with view 1 as
        teacher; "js", Jensen-Shannon as in the released code (1e-12 inside each logarithm).
    distribution: how a row becomes probabilities. "softmax" of row / temperature; "shift",
        (row + |min of the row|) / sum; "batch_shift", the same with the min of the whole batch
        (released code: one sample's value then depends on the others and, over several
        processes, on how the batch is split). The shifted forms put 1e-12 inside "kl" too,
        because their smallest entry is 0.
    temperature: positive; must be 1.0 for the shifted distributions, which have none. The loss is
        not multiplied by temperature^2.
    stop_gradient: "kl_12" only: no gradient into p.
    reduction: "mean" over the batch, or "none" for (B,). The released code adds up the batch, so
        its term is B times the mean.
    impl: "auto", "torch", "cpp" or "triton" (D up to 8192); the last two are differentiable once.

    Returns a float32 (float64 for float64 inputs) scalar or (B,), in nats. An empty batch gives
    0. Deterministic. Errors are ValueErrors that name the argument.
    """
    _check(p, q, divergence, distribution, temperature, stop_gradient, reduction)
    impl = _resolve(p, impl)
    if stop_gradient:
        p = p.detach()
    if impl == "torch":
        rows = _rows(p, q, divergence, distribution, temperature)
    else:
        rows = _FusedRows.apply(*distinct(p, q), (divergence, distribution, temperature), impl)
    return rows.sum() / max(1, p.shape[0]) if reduction == "mean" else rows


def _resolve(p: Tensor, impl: str) -> str:
    found = resolve("distillation_loss", impl, p.device.type)
    if found != "triton" or p.shape[1] <= MAX_TRITON_WIDTH:
        return found
    if impl == "triton":
        raise ValueError(
            f"impl='triton' takes rows of at most {MAX_TRITON_WIDTH} features, p has {p.shape[1]}; "
            "use impl='auto' or 'torch'"
        )
    return "torch"


def _rows(p: Tensor, q: Tensor, divergence: str, distribution: str, temperature: float) -> Tensor:
    dtype = compute_dtype(p, q)
    p, q = p.to(dtype), q.to(dtype)
    if p.shape[0] == 0:
        return p.sum(dim=1) + q.sum(dim=1)
    return divergence_rows(p, q, divergence, distribution, temperature)


class _FusedRows(torch.autograd.Function):
    """Divergence rows by one of the fused implementations; keeps the inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, q: Tensor, options: tuple[str, str, float], impl: str
    ) -> Tensor:
        ctx.save_for_backward(p, q)
        ctx.options, ctx.impl = options, impl
        return _FORWARD[impl](p, q, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        by_p, by_q = _BACKWARD[ctx.impl](grad, *ctx.saved_tensors, *ctx.options)
        need_p, need_q, _, _ = ctx.needs_input_grad
        return by_p if need_p else None, by_q if need_q else None, None, None


def _check(
    p: Tensor,
    q: Tensor,
    divergence: str,
    distribution: str,
    temperature: float,
    stop_gradient: bool,
    reduction: str,
) -> None:
    check_ndim("p", p, 2, "(B, D)")
    check_shape("q", q, tuple(p.shape), "(B, D) as p")
    check_dtype("p", p, FLOATS)
    check_dtype("q", q, FLOATS)
    if q.device != p.device:
        raise ValueError(f"q is on {q.device}, p on {p.device}; they must share a device")
    if p.shape[1] == 0:
        raise ValueError(f"p has no features: shape {tuple(p.shape)}; D must be at least 1")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is not one of {', '.join(DIVERGENCES)}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if distribution != "softmax" and temperature != 1.0:
        raise ValueError(
            f"temperature={temperature} has no meaning for distribution={distribution!r}; "
            "leave it at 1.0 or use distribution='softmax'"
        )
    if stop_gradient and divergence != "kl_12":
        raise ValueError(
            f"stop_gradient needs a teacher: use divergence='kl_12', got {divergence!r}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def _rows_fake(
    p: Tensor, q: Tensor, divergence: str, distribution: str, temperature: float
) -> Tensor:
    return p.new_empty(p.shape[:1], dtype=compute_dtype(p, q))


def _rows_grad_fake(
    grad: Tensor, p: Tensor, q: Tensor, divergence: str, distribution: str, temperature: float
) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), q.new_empty(q.shape)


_OPTIONS = "str divergence, str distribution, float temperature"

torch.library.define(
    "kdcmae_fast::distillation_loss", f"(Tensor p, Tensor q, {_OPTIONS}) -> Tensor"
)
torch.library.impl("kdcmae_fast::distillation_loss", "CompositeImplicitAutograd", _rows)

_KERNELS = f"{__package__}.kernel"
_FORWARD = define_fused(
    "distillation_rows", f"(Tensor p, Tensor q, {_OPTIONS}) -> Tensor", _rows_fake, _KERNELS
)
_BACKWARD = define_fused(
    "distillation_rows_grad",
    f"(Tensor grad, Tensor p, Tensor q, {_OPTIONS}) -> (Tensor, Tensor)",
    _rows_grad_fake,
    _KERNELS,
)
