"""The public MMD loss: argument checks, autograd, registration."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import (
    check_dtype,
    check_ndim,
    compute_dtype,
    distinct,
    register_op,
    resolve,
    without_autocast,
)
from . import reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_BANDWIDTHS = 32

register_op("mmd_loss", impls=("cpp", "triton", "torch"))


class _Options(NamedTuple):
    """The last arguments of the fused ops."""

    variant: str
    gammas: list[float]
    powers: list[int]


def mmd_loss(
    x: Tensor,
    y: Tensor,
    *,
    bandwidths: Sequence[float] | None = None,
    variant: str = "xkd",
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Squared maximum mean discrepancy of two sets of features, with Gaussian kernels.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), where k is a sum of Gaussian kernels of the
    squared distance d2 of two rows (Gretton et al., JMLR 13, 2012, equations 3 and 5).

    x, y: (N, D) and (M, D), float64, float32, bfloat16 or float16, also of two dtypes.
    variant: "xkd" (XKD, arXiv 2211.13929): k = sum over g in bandwidths of exp(-g d2), means over
            all pairs, a row with itself included.
        "unbiased": the same kernels; a row with itself is left out, which can make the result
            negative. Needs N and M of at least 2.
        "kdc_rbf": k = sum over s in bandwidths of exp(-d2 / (s b)), with b the mean of d2 over all
            pairs of different rows of x and y together, through which no gradient flows.
        "kdc_tiled": k = exp(-d2 / D^2), and 2 mean k(x, y) is added, not subtracted: it pushes
            the two sets apart. As in published code; no discrepancy.
    bandwidths: positive numbers, the g or s above, at most 32. None: seven decades 1e-3 ... 1e3,
        or for "kdc_rbf" 1/4, 1/2, 1, 2, 4. Must be None for "kdc_tiled", which has one kernel.
    reduction: "mean" only, which is what the definition does.
    impl: "auto", "torch", "cpp" or "triton" (no float64); the last two are differentiable once.

    Returns a float32 (float64 if x or y is float64) scalar. 0 if x or y has no rows. Rows of one
    rank only: nothing is gathered. Deterministic; autocast does not change it. Errors are
    ValueErrors that name the argument.
    """
    _check(x, y, bandwidths, variant, reduction)
    impl = _resolve(x, y, impl)
    dtype = compute_dtype(x, y)
    if x.shape[0] == 0 or y.shape[0] == 0:
        return x[:0].sum().to(dtype) + y[:0].sum().to(dtype)
    widths = None if bandwidths is None else tuple(bandwidths)
    gammas, powers = reference.family(widths, variant)
    if impl == "torch":
        return _plain(x, y, variant, gammas)
    options = _Options(variant, gammas, powers)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _FusedLoss.apply(*distinct(x, y), options, impl)
    return _LOSS[impl](x, y, *options)


def _resolve(x: Tensor, y: Tensor, impl: str) -> str:
    found = resolve("mmd_loss", impl, x.device.type)
    if found != "triton" or compute_dtype(x, y) != torch.float64:
        return found
    if impl == "triton":
        raise ValueError("impl='triton' of mmd_loss takes no float64; use impl='auto' or 'torch'")
    return "torch"


def _plain(x: Tensor, y: Tensor, variant: str, gammas: list[float]) -> Tensor:
    dtype = compute_dtype(x, y)
    with without_autocast(x.device):
        return reference.mmd(x.to(dtype), y.to(dtype), variant, gammas)


class _FusedLoss(torch.autograd.Function):
    """The loss by one of the fused implementations.

    It is a scalar, so its gradients are known up to a factor when it is: they are computed in the
    same pass over the distances and kept, nothing else is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, options: _Options, impl: str) -> Tensor:
        need_x, need_y, _, _ = ctx.needs_input_grad
        loss, by_x, by_y = _LOSS_AND_GRADS[impl](x, y, *options, need_x, need_y)
        ctx.save_for_backward(by_x, by_y)
        ctx.dtypes = x.dtype, y.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        found = [
            (grad * kept).to(dtype) if needed else None
            for kept, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return found[0], found[1], None, None


def _check(
    x: Tensor, y: Tensor, bandwidths: Sequence[float] | None, variant: str, reduction: str
) -> None:
    check_ndim("x", x, 2, "(N, D)")
    check_ndim("y", y, 2, "(M, D)")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"y must have the D = {x.shape[1]} features of x, got {tuple(y.shape)}")
    check_dtype("x", x, FLOATS)
    check_dtype("y", y, FLOATS)
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}, x on {x.device}; they must share a device")
    if x.shape[1] == 0:
        raise ValueError(f"x has no features: shape {tuple(x.shape)}; D must be at least 1")
    if variant not in reference.VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(reference.VARIANTS)}")
    if variant == "unbiased" and (x.shape[0] == 1 or y.shape[0] == 1):
        raise ValueError(
            "variant='unbiased' needs at least 2 rows in x and in y, got "
            f"{x.shape[0]} and {y.shape[0]}"
        )
    if bandwidths is not None:
        _check_bandwidths(bandwidths, variant)
    if reduction != "mean":
        raise ValueError(f"reduction must be 'mean', got {reduction!r}")


def _check_bandwidths(bandwidths: Sequence[float], variant: str) -> None:
    if variant == "kdc_tiled":
        raise ValueError(f"bandwidths={bandwidths} mean nothing to variant='kdc_tiled'; leave None")
    if not 0 < len(bandwidths) <= MAX_BANDWIDTHS:
        raise ValueError(f"bandwidths must be 1 to {MAX_BANDWIDTHS} numbers, got {len(bandwidths)}")
    if not all(0 < bandwidth < math.inf for bandwidth in bandwidths):
        raise ValueError(f"bandwidths must be positive and finite, got {bandwidths}")


def _loss_fake(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    return x.new_empty((), dtype=compute_dtype(x, y))


def _loss_and_grads_fake(
    x: Tensor,
    y: Tensor,
    variant: str,
    gammas: list[float],
    powers: list[int],
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, y)
    by_x = x.new_empty(x.shape if need_x else (0, x.shape[1]), dtype=dtype)
    by_y = y.new_empty(y.shape if need_y else (0, y.shape[1]), dtype=dtype)
    return x.new_empty((), dtype=dtype), by_x, by_y


def _loss_triton(*args: Any) -> Tensor:
    from .kernel import loss

    return loss(*args)


def _loss_and_grads_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .kernel import loss_and_grads

    return loss_and_grads(*args)


def _register(name: str, schema: str, triton_impl: Any, fake: Any) -> dict[str, Any]:
    """Define one op per fused implementation (csrc/cpu/alignment.cpp fills in `_cpp`)."""
    for suffix in ("cpp", "triton"):
        torch.library.define(f"kdcmae_fast::{name}_{suffix}", schema)
        torch.library.register_fake(f"kdcmae_fast::{name}_{suffix}", fake)
    torch.library.impl(f"kdcmae_fast::{name}_triton", ("cuda", "cpu"), triton_impl)
    namespace = torch.ops.kdcmae_fast
    return {impl: getattr(namespace, f"{name}_{impl}").default for impl in ("cpp", "triton")}


torch.library.define(
    "kdcmae_fast::mmd_loss", "(Tensor x, Tensor y, str variant, float[] gammas) -> Tensor"
)
torch.library.impl("kdcmae_fast::mmd_loss", "CompositeImplicitAutograd", _plain)

_ARGUMENTS = "Tensor x, Tensor y, str variant, float[] gammas, int[] powers"

_LOSS = _register("mmd", f"({_ARGUMENTS}) -> Tensor", _loss_triton, _loss_fake)
_LOSS_AND_GRADS = _register(
    "mmd_grads",
    f"({_ARGUMENTS}, bool need_x, bool need_y) -> (Tensor, Tensor, Tensor)",
    _loss_and_grads_triton,
    _loss_and_grads_fake,
)
