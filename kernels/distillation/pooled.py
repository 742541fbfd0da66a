"""The public pooled LayerNorm: argument checks, autograd, registration."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import (
    check_dtype,
    check_ndim,
    check_number,
    check_shape,
    compute_dtype,
    register_op,
    resolve,
)
from .library import FLOATS, define_fused
from .reference import layer_norm_mean

MAX_TRITON_WIDTH = 16384  # a program holds whole tokens in registers

register_op("pooled_layer_norm", impls=("cpp", "triton", "torch"))


def pooled_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean over the tokens of LayerNorm(x), without the normalised tokens in memory.

    x: (B, L, D) float64, float32, bfloat16 or float16, any strides: x[:, 1:] leaves out a CLS
        token without a copy. weight, bias: (D,), any of these dtypes.
    eps: added to the variance of a token; positive.
    normalize: divide each result by its L2 norm (at least 1e-12).
    impl: "auto", "torch", "cpp" or "triton" (D up to 16384); the last two are differentiable once.

    Returns (B, D), float32 (float64 if an input is float64), in which everything is computed.
    Deterministic. Errors are ValueErrors that name the argument.
    """
    _check(x, weight, bias, eps)
    impl = _resolve(x, impl)
    if impl == "torch":
        pooled = _plain(x, weight, bias, eps)
    else:
        dtype = compute_dtype(x, weight, bias)
        x = x.to(dtype) if dtype == torch.float64 else x
        mean = _FusedMean.apply(x, float(eps), impl)
        pooled = torch.addcmul(bias.to(dtype), mean, weight.to(dtype))
    return F.normalize(pooled, dim=1) if normalize else pooled


def _resolve(x: Tensor, impl: str) -> str:
    found = resolve("pooled_layer_norm", impl, x.device.type)
    if found != "triton" or x.shape[2] <= MAX_TRITON_WIDTH:
        return found
    if impl == "triton":
        raise ValueError(
            f"impl='triton' takes tokens of at most {MAX_TRITON_WIDTH} values, x has {x.shape[2]}; "
            "use impl='auto' or 'torch'"
        )
    return "torch"


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_ndim("x", x, 3, "(B, L, D)")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x has no tokens or no values: shape {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_ndim(name, tensor, 1, "(D,)")
        check_shape(name, tensor, (x.shape[2],), "(D,) of x")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_dtype(name, tensor, FLOATS)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must share it")
    check_number("eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")


class _FusedMean(torch.autograd.Function):
    """Mean of the standardised tokens, by one of the fused implementations.

    Weight and bias come after the mean, in plain PyTorch: their gradients need (B, D) tensors only.
    Keeps x, and mean and 1 / deviation of each token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, impl: str) -> Tensor:
        pooled, statistics = _FORWARD[impl](x, eps)
        ctx.save_for_backward(x, statistics)
        ctx.impl = impl
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return _BACKWARD[ctx.impl](grad, *ctx.saved_tensors), None, None


def _plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(x, weight, bias)
    return layer_norm_mean(x.to(dtype), weight.to(dtype), bias.to(dtype), eps)


def _mean_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    dtype = compute_dtype(x)
    return x.new_empty(batch, width, dtype=dtype), x.new_empty(2, batch, length, dtype=dtype)


def _mean_grad_fake(grad: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_KERNELS = f"{__package__}.kernel_pooled"

torch.library.define(
    "kdcmae_fast::pooled_layer_norm", "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor"
)
torch.library.impl("kdcmae_fast::pooled_layer_norm", "CompositeImplicitAutograd", _plain)

# x (B, L, D), any strides -> (B, D); statistics (2, B, L): mean and 1 / deviation of each token.
_FORWARD = define_fused(
    "pooled_tokens", "(Tensor x, float eps) -> (Tensor, Tensor)", _mean_fake, _KERNELS
)
_BACKWARD = define_fused(
    "pooled_tokens_grad",
    "(Tensor grad, Tensor x, Tensor statistics) -> Tensor",
    _mean_grad_fake,
    _KERNELS,
)
