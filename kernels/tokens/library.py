"""The compiled forms of the token ops, C++ and Triton, as ops of the torch library.

One op per direction and implementation: csrc/cpu/tokens.cpp fills in `<name>_cpp`, kernel.py
`<name>_triton`. All have a fixed number of outputs, none of which is an input; none knows autograd,
which is `fused.py`.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPILED = ("cpp", "triton")


def define_compiled(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    module: str,
    impls: tuple[str, ...] = COMPILED,
) -> dict[str, Callable[..., Any]]:
    """Define `<name>_cpp` and `<name>_triton`, or those of `impls`; returns implementation -> op.

    fake: outputs from the shapes of the arguments. module: where the Triton launcher `name` is,
    imported when it is first called.
    """

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    for impl in impls:
        torch.library.define(f"kdcmae_fast::{name}_{impl}", schema)
        torch.library.register_fake(f"kdcmae_fast::{name}_{impl}", fake)
    torch.library.impl(f"kdcmae_fast::{name}_triton", ("cuda", "cpu"), launch)
    return {impl: getattr(torch.ops.kdcmae_fast, f"{name}_{impl}").default for impl in impls}


def _gather_rows(x: Tensor, plan: Tensor, len_keep: int, num_views: int) -> Tensor:
    return x.new_empty(num_views * x.shape[0], len_keep, x.shape[2])


def _gather_rows_backward(grad: Tensor, plan: Tensor, len_keep: int, num_views: int) -> Tensor:
    return grad.new_empty(*plan.shape, grad.shape[2])


def _visible_patches(
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    plan: Tensor,
    len_keep: int,
    num_views: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    channels = 1 if pixels.dim() == 3 else pixels.shape[1]
    rows = num_views * pixels.shape[0] * len_keep
    return pixels.new_empty(rows, channels * math.prod(patch), dtype=dtype)


def _embed_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    plan: Tensor,
    len_keep: int,
    num_views: int,
    patch: list[int],
) -> Tensor:
    return weight.new_empty(num_views * pixels.shape[0] * len_keep, weight.shape[0])


def _embed_patches_backward(grad: Tensor, pixels: Tensor, *args: Any) -> Tensor:
    values = (1 if pixels.dim() == 3 else pixels.shape[1]) * math.prod(args[-1])
    return grad.new_empty(grad.shape[1], values, dtype=torch.float32)


def _assemble(x: Tensor, pos: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], pos.shape[0], x.shape[2])


def _sums(grad: Tensor, *shape: int) -> Tensor:
    return grad.new_empty(shape, dtype=torch.promote_types(grad.dtype, torch.float32))


def _assemble_backward(
    grad: Tensor, plans: list[Tensor], len_keep: list[int], *args: Any
) -> tuple[Tensor, Tensor]:
    dx = grad.new_empty(grad.shape[0], sum(len_keep), grad.shape[2])
    return dx, _sums(grad, grad.shape[2])


def _assemble_backward_pos(
    grad: Tensor, plans: list[Tensor], len_keep: list[int], *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *_assemble_backward(grad, plans, len_keep), _sums(grad, *grad.shape[1:])


_KERNELS = f"{__package__}.kernel"
_PLAN = "Tensor token_of_rank, SymInt len_keep, SymInt num_views"
_PLANS = "Tensor[] rank_of_token, SymInt[] len_keep, SymInt num_views, bool released"

# x (B, L, D), any strides -> (K*B, keep, D); grad (K*B, keep, D) -> (B, L, D).
GATHER_ROWS = define_compiled(
    "gather_rows", f"(Tensor x, {_PLAN}) -> Tensor", _gather_rows, _KERNELS
)
GATHER_ROWS_BACKWARD = define_compiled(
    "gather_rows_backward", f"(Tensor grad, {_PLAN}) -> Tensor", _gather_rows_backward, _KERNELS
)
# pixels -> (K*B*keep, P) in memory order and in `dtype`, uint8 normalised.
VISIBLE_PATCHES = define_compiled(
    "visible_patches",
    f"(Tensor pixels, Tensor? mean, Tensor? std, {_PLAN}, int[] patch, ScalarType dtype) -> Tensor",
    _visible_patches,
    _KERNELS,
)
# Gathered patches @ weight.T + bias (D,) + pos (L, D) -> (K*B*keep, D), the weight (D, P) in memory
# order; and its gradient, in float32.
EMBED_PATCHES = define_compiled(
    "embed_patches",
    "(Tensor pixels, Tensor weight, Tensor? bias, Tensor pos, Tensor? mean, Tensor? std,"
    f" {_PLAN}, int[] patch) -> Tensor",
    _embed_patches,
    f"{__package__}.kernel_embed",
    ("triton",),
)
EMBED_PATCHES_BACKWARD = define_compiled(
    "embed_patches_backward",
    f"(Tensor grad, Tensor pixels, Tensor? mean, Tensor? std, {_PLAN}, int[] patch) -> Tensor",
    _embed_patches_backward,
    f"{__package__}.kernel_embed",
    ("triton",),
)
# x (K*B, sum of keeps, D), pos (L, D) in the dtype to add in, filler (L, D) like x -> (K*B, L, D).
ASSEMBLE = define_compiled(
    "assemble", f"(Tensor x, Tensor pos, Tensor filler, {_PLANS}) -> Tensor", _assemble, _KERNELS
)
# grad (K*B, L, D) -> dx (K*B, sum of keeps, D), dmask (D,) and, by the second, dpos (L, D).
ASSEMBLE_BACKWARD = define_compiled(
    "assemble_backward",
    f"(Tensor grad, {_PLANS}) -> (Tensor, Tensor)",
    _assemble_backward,
    _KERNELS,
)
ASSEMBLE_BACKWARD_POS = define_compiled(
    "assemble_backward_pos",
    f"(Tensor grad, {_PLANS}) -> (Tensor, Tensor, Tensor)",
    _assemble_backward_pos,
    _KERNELS,
)
