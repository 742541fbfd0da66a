"""The compiled forms, C++ and Triton, as ops of the torch library, and their autograd.

csrc/cpu/normalization.cpp fills in the ops that end in `_cpp`, kernel.py those in `_triton`. Rows
are flattened here: x (R, D), weight and bias (S, D), and rows[i] rows in order have norm norms[i].
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import compute_dtype

Runs = tuple[Sequence[int], Sequence[int]]  # norms, rows


def _define(name: str, schema: str, fake: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Define `<name>_cpp` and `<name>_triton`; returns implementation -> op."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.kernel"), name)(*args)

    for impl in ("cpp", "triton"):
        torch.library.define(f"kdcmae_fast::{name}_{impl}", schema)
        torch.library.register_fake(f"kdcmae_fast::{name}_{impl}", fake)
    torch.library.impl(f"kdcmae_fast::{name}_triton", ("cuda", "cpu"), launch)
    namespace = torch.ops.kdcmae_fast
    return {impl: getattr(namespace, f"{name}_{impl}").default for impl in ("cpp", "triton")}


def _layer_norm(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=compute_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape, dtype=args[-1]), mean, rstd


def _add_layer_norm(
    x: Tensor, residual: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    normed, mean, rstd = _layer_norm(summed, *args)
    return normed, summed, mean, rstd


def _backward(
    grad: Tensor, grad_summed: Tensor | None, summed: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor, *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dweight, dbias = (weight.new_empty(weight.shape, dtype=mean.dtype) for _ in range(2))
    return summed.new_empty(summed.shape), dweight, dbias


def _backward_cast(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsummed, dweight, dbias = _backward(*args)
    return dsummed, dsummed.new_empty(dsummed.shape, dtype=args[-1]), dweight, dbias


_PARAMETERS = "Tensor weight, Tensor bias"
_RUNS = "SymInt[] norms, SymInt[] rows"
_GRADS = "Tensor grad, Tensor? grad_summed, Tensor summed, Tensor mean, Tensor rstd, Tensor weight"

# -> normed, mean (R,), rstd (R,).
LAYER_NORM = _define(
    "layer_norm",
    f"(Tensor x, {_PARAMETERS}, {_RUNS}, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_norm,
)
# -> normed, summed, mean, rstd.
ADD_LAYER_NORM = _define(
    "add_layer_norm",
    f"(Tensor x, Tensor residual, {_PARAMETERS}, {_RUNS}, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_layer_norm,
)
# -> dsummed (R, D), dweight (S, D), dbias (S, D); by the second, dsummed once more in `dtype`.
LAYER_NORM_BACKWARD = _define(
    "layer_norm_backward", f"({_GRADS}, {_RUNS}) -> (Tensor, Tensor, Tensor)", _backward
)
LAYER_NORM_BACKWARD_CAST = _define(
    "layer_norm_backward_cast",
    f"({_GRADS}, {_RUNS}, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_cast,
)


class FusedLayerNorm(torch.autograd.Function):
    """x (R, D) -> normed (R, D); keeps x and its statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, runs: Runs, eps: float,
        out_dtype: torch.dtype, impl: str,
    ) -> Tensor:  # fmt: skip
        normed, mean, rstd = LAYER_NORM[impl](x, weight, bias, *runs, eps, out_dtype)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.runs, ctx.impl, ctx.bias_dtype = runs, impl, bias.dtype
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no more
        weight = saved[-1]
        dx, dweight, dbias = LAYER_NORM_BACKWARD[ctx.impl](grad, None, *saved, *ctx.runs)
        return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None, None, None


class FusedAddLayerNorm(torch.autograd.Function):
    """x, residual (R, D) -> normed, summed (R, D); keeps `summed`, which is an output anyway, and
    its statistics. One gradient serves x and residual, in two dtypes where theirs differ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, runs: Runs,
        eps: float, out_dtype: torch.dtype, impl: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        normed, summed, mean, rstd = ADD_LAYER_NORM[impl](
            x, residual, weight, bias, *runs, eps, out_dtype
        )
        ctx.save_for_backward(summed, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        ctx.runs, ctx.impl = runs, impl
        ctx.dtypes = x.dtype, residual.dtype, bias.dtype
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_summed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_dtype, residual_dtype, bias_dtype = ctx.dtypes
        if grad is None:  # only the sum was used
            if grad_summed is None:
                return (None,) * 8
            return grad_summed.to(x_dtype), grad_summed.to(residual_dtype), *(None,) * 6
        saved = ctx.saved_tensors  # once: activation checkpointing allows no more
        summed, _, _, weight = saved
        args = (grad, grad_summed, *saved, *ctx.runs)
        narrow = [t for t in (x_dtype, residual_dtype) if t != summed.dtype]
        if len(narrow) == 1 and all(ctx.needs_input_grad[:2]):
            dsummed, cast, dweight, dbias = LAYER_NORM_BACKWARD_CAST[ctx.impl](*args, narrow[0])
        else:
            dsummed, dweight, dbias = LAYER_NORM_BACKWARD[ctx.impl](*args)
            cast = dsummed
        dx = (cast if x_dtype != summed.dtype else dsummed).to(x_dtype)
        dresidual = (cast if residual_dtype != summed.dtype else dsummed).to(residual_dtype)
        into_parameters = dweight.to(weight.dtype), dbias.to(bias_dtype)
        return dx, dresidual, *into_parameters, None, None, None, None
