"""The reconstruction loss in Triton, for given predictions; README.md has the maths.

One program per patch holds it in registers for all views that lack it: pixels and predictions are
read once. Its statistics are those of the patch minus its first value, centred before they are
squared, in float32 (float64 for float64). No atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype
from ..tokens.kernel import geometry, narrow, patch_offset, patch_start, scale_and_shift
from ..tokens.patches import patch_layout
from .reference import EPS

_EPS = tl.constexpr(EPS)


@triton.jit
def pixel_values(source, c, offset, mask, scale_ptr, shift_ptr, BYTES: tl.constexpr,
                 T: tl.constexpr):  # fmt: skip
    """Pixels at source + offset in type T, bytes of channel c normalised; 0 where masked out."""
    values = tl.load(source + offset, mask=mask, other=0).to(T)
    if BYTES:
        scale = tl.load(scale_ptr + c, mask=mask, other=0)
        values = values * scale - tl.load(shift_ptr + c, mask=mask, other=0)
    return values


@triton.jit
def first_value(source, scale_ptr, shift_ptr, BYTES: tl.constexpr, T: tl.constexpr):
    """The first value of the patch (or patches) that begin at `source`."""
    values = tl.load(source).to(T)
    if BYTES:
        values = values * tl.load(scale_ptr) - tl.load(shift_ptr)
    return values


@triton.jit
def standardised(values, v, P: tl.constexpr):
    """Mean and 1 / deviation of P values, given less their first, and the values centred."""
    values = tl.where(v < P, values, 0.0)
    mean = tl.sum(values, axis=0) / P
    values = tl.where(v < P, values - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / (P - 1) + _EPS), values


@triton.jit
def _target(pixels_ptr, scale_ptr, shift_ptr, b, token, v, BYTES: tl.constexpr, NORM: tl.constexpr,
            T: tl.constexpr, AUDIO: tl.constexpr, C: tl.constexpr, PT: tl.constexpr,
            PH: tl.constexpr, PW: tl.constexpr, GT: tl.constexpr, GH: tl.constexpr,
            GW: tl.constexpr):  # fmt: skip
    """Values v of the target of one patch, 0 past the last."""
    P: tl.constexpr = C * PT * PH * PW
    if AUDIO:
        c, z, y, x = v * 0, v * 0, v % PH, v // PH
    else:
        c, z, y, x = v % C, v // (C * PW * PH), v // (C * PW) % PH, v // C % PW
    offset = patch_offset(c, z, y, x, PT, PH, PW, GT, GH, GW)
    source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
    values = pixel_values(source, c, offset, v < P, scale_ptr, shift_ptr, BYTES, T)
    if NORM:
        values -= first_value(source, scale_ptr, shift_ptr, BYTES, T)
        _, rstd, values = standardised(values, v, P)
        values *= rstd
    return values


@triton.jit(do_not_specialize=["batch"])
def reconstruction_loss_fwd_kernel(
    pred_ptr, pixels_ptr, scale_ptr, shift_ptr, rank_ptr, error_ptr, batch,
    L: tl.constexpr, KEEP: tl.constexpr, VIEWS: tl.constexpr, ONLY_MASKED: tl.constexpr,
    BYTES: tl.constexpr, NORM: tl.constexpr, T: tl.constexpr, AUDIO: tl.constexpr,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """error[row, token] = sum of squares, 0 for visible tokens. Grid: batch * L."""
    P: tl.constexpr = C * PT * PH * PW
    program = tl.program_id(0).to(tl.int64)
    b, token = program // L, (program % L).to(tl.int32)
    v = tl.arange(0, BLOCK_P)
    target = _target(pixels_ptr, scale_ptr, shift_ptr, b, token, v, BYTES, NORM, T, AUDIO,
                     C, PT, PH, PW, GT, GH, GW)  # fmt: skip
    rank = tl.load(rank_ptr + program).to(tl.int32)
    for view in tl.static_range(VIEWS):
        row = view * batch + b
        index = (rank - (view + 1) * KEEP + L) % L
        masked = index < L - KEEP
        if ONLY_MASKED:
            own = pred_ptr + (row * (L - KEEP) + index) * P
        else:
            own = pred_ptr + (row * L + token) * P
        pred = tl.load(own + v, mask=(v < P) & masked, other=0).to(T)
        error = tl.where((v < P) & masked, pred - target, 0.0)
        tl.store(error_ptr + row * L + token, tl.sum(error * error, axis=0))


@triton.jit(do_not_specialize=["batch"])
def reconstruction_loss_bwd_kernel(
    weight_ptr, pred_ptr, pixels_ptr, scale_ptr, shift_ptr, rank_ptr, dpred_ptr, batch,
    L: tl.constexpr, KEEP: tl.constexpr, VIEWS: tl.constexpr, ONLY_MASKED: tl.constexpr,
    BYTES: tl.constexpr, NORM: tl.constexpr, T: tl.constexpr, AUDIO: tl.constexpr,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dpred = weight[row] * (pred - target), 0 for visible tokens. Grid: batch * L."""
    P: tl.constexpr = C * PT * PH * PW
    program = tl.program_id(0).to(tl.int64)
    b, token = program // L, (program % L).to(tl.int32)
    v = tl.arange(0, BLOCK_P)
    target = _target(pixels_ptr, scale_ptr, shift_ptr, b, token, v, BYTES, NORM, T, AUDIO,
                     C, PT, PH, PW, GT, GH, GW)  # fmt: skip
    rank = tl.load(rank_ptr + program).to(tl.int32)
    for view in tl.static_range(VIEWS):
        row = view * batch + b
        index = (rank - (view + 1) * KEEP + L) % L
        masked = index < L - KEEP
        if ONLY_MASKED:
            place = (row * (L - KEEP) + index) * P
            write = (v < P) & masked
        else:
            place = (row * L + token) * P
            write = v < P
        pred = tl.load(pred_ptr + place + v, mask=(v < P) & masked, other=0).to(T)
        grad = tl.where(masked, (pred - target) * tl.load(weight_ptr + row), 0.0)
        tl.store(dpred_ptr + place + v, narrow(grad, dpred_ptr.dtype.element_ty), mask=write)


def _arguments(
    pred: Tensor,
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rank_of_token: Tensor,
    static: tuple[int, int, list[int], bool, bool],
) -> tuple[tuple, tuple, dict[str, int]]:
    """Tensors, compile-time arguments and launch options that both kernels take."""
    len_keep, num_views, patch, norm_pix, masked_only = static
    layout = patch_layout(pixels, tuple(patch))
    dtype = compute_dtype(pred, pixels)
    tensors = (pred.contiguous(), pixels.contiguous(), *scale_and_shift(mean, std, dtype),
               rank_of_token.contiguous())  # fmt: skip
    block = triton.next_power_of_2(layout.num_values)
    constants = (
        layout.num_tokens, len_keep, num_views, masked_only, pixels.dtype == torch.uint8, norm_pix,
        tl.float64 if dtype == torch.float64 else tl.float32, *geometry(layout), block,
    )  # fmt: skip
    return tensors, constants, {"num_warps": min(max(block // 256, 1), 8)}


def reconstruction_loss(
    pred: Tensor,
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rank_of_token: Tensor,
    *static: Any,
) -> Tensor:
    """pred (K*B, L or masked, P) -> (K*B,). static: keep, views, patch, norm_pix, masked_only."""
    tensors, constants, options = _arguments(pred, pixels, mean, std, rank_of_token, static)
    batch, num_tokens = rank_of_token.shape
    errors = pred.new_empty(pred.shape[0], num_tokens, dtype=compute_dtype(pred, pixels))
    if errors.numel():
        with torch.cuda.device_of(pred):
            reconstruction_loss_fwd_kernel[(batch * num_tokens,)](
                *tensors, errors, batch, *constants, **options
            )
    return errors.sum(1) / ((num_tokens - static[0]) * pred.shape[2])


def reconstruction_loss_backward(
    grad: Tensor,
    pred: Tensor,
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rank_of_token: Tensor,
    *static: Any,
) -> Tensor:
    """grad (K*B,) -> dpred, as pred."""
    tensors, constants, options = _arguments(pred, pixels, mean, std, rank_of_token, static)
    batch, num_tokens = rank_of_token.shape
    dpred = pred.new_empty(pred.shape)
    weight = grad.to(compute_dtype(pred, pixels)) * (2 / ((num_tokens - static[0]) * pred.shape[2]))
    if dpred.numel():
        with torch.cuda.device_of(pred):
            reconstruction_loss_bwd_kernel[(batch * num_tokens,)](
                weight, *tensors, dpred, batch, *constants, **options
            )
    return dpred
