"""The public residual + LayerNorm: argument checks and the choice of implementation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import check_dtype, check_ndim, check_shape, register_op, resolve
from .fused import FusedAddLayerNorm, FusedLayerNorm, Runs
from .reference import layer_norm

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

MAX_TRITON_WIDTH = 8192  # a program holds whole rows in registers

register_op("add_layer_norm", impls=("cpp", "triton", "torch"))


class NormedSum(NamedTuple):
    """normed (..., D): LayerNorm of `summed` (..., D), which is the stream after the addition."""

    normed: Tensor
    summed: Tensor


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    segments: Sequence[tuple[int, int]] | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> NormedSum:
    """summed = x + residual, normed = LayerNorm(summed) (Ba et al., arXiv 1607.06450), in one pass.

    x: (..., D), what a branch adds; float64, float32, bfloat16 or float16.
    residual: (..., D), the stream it is added to, of any of these dtypes; None: nothing is added,
        and `summed` is x itself.
    weight, bias: (D,); or (S, D), one norm per row, with `segments`.
    segments: (norm, rows) runs that cover the rows of x, all axes but the last flattened, in order:
        the first `rows` of them go through norm number `norm`, and so on. None: one norm for all.
    eps: added to the variance (biased, as in torch.nn.LayerNorm); positive.
    out_dtype: dtype of `normed`; by default that of x.
    impl: "auto", "torch", "cpp" or "triton" (D up to 8192); the last two are differentiable once.

    `summed` has the dtype that x + residual has in PyTorch; `normed` is taken of the rounded sum,
    with statistics in float32 (float64 for a float64 sum). Deterministic, gradients included.
    Errors are ValueErrors that name the argument.
    """
    runs = _check(x, residual, weight, bias, segments, eps, out_dtype)
    impl = _resolve(x, impl)
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    weight, bias = weight.reshape(-1, width), bias.reshape(-1, width)
    dtype = out_dtype or x.dtype
    if residual is None:
        if impl == "torch":
            normed = layer_norm(rows, weight, bias, runs, eps, dtype)
        else:
            normed = FusedLayerNorm.apply(rows, weight, bias, runs, eps, dtype, impl)
        return NormedSum(normed.view(x.shape), x)
    stream = residual.reshape(-1, width)
    if impl == "torch":
        summed = rows + stream
        normed = layer_norm(summed, weight, bias, runs, eps, dtype)
    else:
        normed, summed = FusedAddLayerNorm.apply(rows, stream, weight, bias, runs, eps, dtype, impl)
    return NormedSum(normed.view(x.shape), summed.view(x.shape))


def _resolve(x: Tensor, impl: str) -> str:
    found = resolve("add_layer_norm", impl, x.device.type)
    if found != "triton" or x.shape[-1] <= MAX_TRITON_WIDTH:
        return found
    if impl == "triton":
        raise ValueError(
            f"impl='triton' takes rows of at most {MAX_TRITON_WIDTH} values, x has {x.shape[-1]}; "
            "use impl='auto' or 'torch'"
        )
    return "torch"


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    segments: Sequence[tuple[int, int]] | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> Runs:
    """The checked runs, as (norms, rows)."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (..., D) with D at least 1, got {got}")
    width = x.shape[-1]
    check_ndim("weight", weight, (1, 2), "(D,) or (S, D)")
    check_shape("weight", weight, (*weight.shape[:-1], width), "(D,) or (S, D)")
    check_shape("bias", bias, tuple(weight.shape), "as weight")
    named = {"x": x, "weight": weight, "bias": bias}
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), "as x")
        named["residual"] = residual
    for name, tensor in named.items():
        check_dtype(name, tensor, FLOATS)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must share it")
    if out_dtype not in (None, *FLOATS):
        raise ValueError(f"out_dtype={out_dtype} is not a floating-point dtype this op has")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return _runs(x.numel() // width, 1 if weight.dim() == 1 else weight.shape[0], segments)


def _runs(num_rows: int, num_norms: int, segments: Sequence[tuple[int, int]] | None) -> Runs:
    if segments is None:
        if num_norms != 1:
            raise ValueError(
                f"weight holds {num_norms} norms; segments must say which rows use which"
            )
        return [0], [num_rows]
    norms, rows = [norm for norm, _ in segments], [count for _, count in segments]
    if not all(0 <= norm < num_norms for norm in norms):
        raise ValueError(f"segments={tuple(segments)} name a norm outside 0..{num_norms - 1}")
    if any(count < 0 for count in rows) or sum(rows) != num_rows:
        raise ValueError(f"segments={tuple(segments)} do not cover the {num_rows} rows of x")
    return norms, rows
