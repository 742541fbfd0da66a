"""Patch embedding in Triton as one product whose rows are gathered from the pixels.

The patches of visible tokens are read where they lie and go to the tensor cores without a copy of
them in memory, in the forward pass and, once more, for the gradient of the weight.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import geometry, narrow, patch_offset, patch_start, scale_and_shift
from .patches import patch_layout

PROGRAMS = 264  # of the weight's gradient, about: two for each processor of an H100 or H200

# Sizes that happen to be 1 or divisible by 16 must not compile another variant.
_SIZES = ["batch", "rows", "rows_per_split"]


@triton.jit
def _visible_rows(order_ptr, i, inside, batch, L: tl.constexpr, KEEP: tl.constexpr):
    """Sample and token of the i-th visible token."""
    b, view = i // KEEP % batch, i // KEEP // batch
    token = tl.load(order_ptr + b * L + view * KEEP + i % KEEP, mask=inside, other=0)
    return b, token.to(tl.int32)


@triton.jit
def _patch_tile(
    source, inside, v, scale_ptr, shift_ptr, BYTES: tl.constexpr, TYPE: tl.constexpr,
    UPCAST: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Values v, in memory order, of the patches that begin at `source`, rounded to TYPE."""
    P: tl.constexpr = C * PT * PH * PW
    mask = inside[:, None]
    if P % BLOCK_V != 0:
        mask = mask & (v[None, :] < P)
    c, z, y, x = v // (PT * PH * PW), v // (PH * PW) % PT, v // PW % PH, v % PW
    offset = patch_offset(c, z, y, x, PT, PH, PW, GT, GH, GW)
    values = tl.load(source[:, None] + offset[None, :], mask=mask, other=0)
    if BYTES:
        scale = tl.load(scale_ptr + c, mask=v < P, other=0)
        shift = tl.load(shift_ptr + c, mask=v < P, other=0)
        values = values.to(tl.float32) * scale[None, :] - shift[None, :]
    values = narrow(values, TYPE)
    return values.to(tl.float32) if UPCAST else values


@triton.jit(do_not_specialize=_SIZES)
def embed_patches_fwd_kernel(
    pixels_ptr, scale_ptr, shift_ptr, order_ptr, weight_ptr, bias_ptr, pos_ptr, y_ptr, batch, rows,
    L: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
    AUDIO: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of y (rows, D). Grid: row tiles x column tiles, those of one row of tiles together:
    the first brings the pixels into the cache."""
    P: tl.constexpr = C * PT * PH * PW
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    i = (program // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = program % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = i < rows
    b, token = _visible_rows(order_ptr, i, inside, batch, L, KEEP)
    source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        a = _patch_tile(source, inside, v, scale_ptr, shift_ptr, BYTES, weight_ptr.dtype.element_ty,
                        UPCAST, C, PT, PH, PW, GT, GH, GW, BLOCK_V)  # fmt: skip
        mask = d[None, :] < D
        if P % BLOCK_V != 0:
            mask = mask & (v[:, None] < P)
        w = tl.load(weight_ptr + d[None, :] * P + v[:, None], mask=mask, other=0)
        if UPCAST:
            w = w.to(tl.float32)
        total = tl.dot(a, w, total, input_precision="ieee")
    known = inside[:, None] & (d[None, :] < D)
    total += tl.load(pos_ptr + token[:, None] * D + d[None, :], mask=known, other=0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + d, mask=d < D, other=0).to(tl.float32)[None, :]
    place = y_ptr + i[:, None] * D + d[None, :]
    tl.store(place, total.to(y_ptr.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def embed_patches_bwd_kernel(
    grad_ptr, pixels_ptr, scale_ptr, shift_ptr, order_ptr, dweight_ptr, batch, rows, rows_per_split,
    L: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
    AUDIO: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of dweight (splits, D, P) from a part of the rows. Grid: (D, P tiles, splits)."""
    P: tl.constexpr = C * PT * PH * PW
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(2).to(tl.int64)
    first = split * rows_per_split
    stop = tl.minimum(first + rows_per_split, rows)
    total = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    for begin in range(first, stop, BLOCK_M):
        i = begin + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = i < stop
        b, token = _visible_rows(order_ptr, i, inside, batch, L, KEEP)
        source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
        a = _patch_tile(source, inside, v, scale_ptr, shift_ptr, BYTES, grad_ptr.dtype.element_ty,
                        UPCAST, C, PT, PH, PW, GT, GH, GW, BLOCK_V)  # fmt: skip
        known = inside[:, None] & (d[None, :] < D)
        grad = tl.load(grad_ptr + i[:, None] * D + d[None, :], mask=known, other=0)
        if UPCAST:
            grad = grad.to(tl.float32)
        total = tl.dot(tl.trans(grad), a, total, input_precision="ieee")
    place = dweight_ptr + (split * D + d[:, None]) * P + v[None, :]
    tl.store(place, total, mask=(d[:, None] < D) & (v[None, :] < P))


def embed_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    token_of_rank: Tensor,
    len_keep: int,
    num_views: int,
    patch: list[int],
) -> Tensor:
    """weight (D, P) in memory order, bias (D,), pos (L, D) -> (K*B*keep, D) like the weight."""
    layout = patch_layout(pixels, tuple(patch))
    rows, dim = num_views * pixels.shape[0] * len_keep, weight.shape[0]
    y = weight.new_empty(rows, dim)
    if y.numel() == 0:
        return y
    tiles = _tiles(weight.dtype, {"BLOCK_M": 128, "BLOCK_D": 128, "BLOCK_V": 64})
    grid = triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(dim, tiles["BLOCK_D"])
    with torch.cuda.device_of(pixels):
        embed_patches_fwd_kernel[(grid,)](
            pixels.contiguous(), *scale_and_shift(mean, std, torch.float32),
            token_of_rank.contiguous(), weight.contiguous(), bias, pos.contiguous(), y,
            pixels.shape[0], rows, layout.num_tokens, len_keep, dim, pixels.dtype == torch.uint8,
            *geometry(layout), **tiles,
        )  # fmt: skip
    return y


def embed_patches_backward(
    grad: Tensor,
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    token_of_rank: Tensor,
    len_keep: int,
    num_views: int,
    patch: list[int],
) -> Tensor:
    """grad (K*B*keep, D) -> dweight (D, P) in memory order, float32."""
    layout = patch_layout(pixels, tuple(patch))
    (rows, dim), values = grad.shape, layout.num_values
    tiles = _tiles(grad.dtype, {"BLOCK_M": 64, "BLOCK_D": 128, "BLOCK_V": 128})
    columns = triton.cdiv(dim, tiles["BLOCK_D"]), triton.cdiv(values, tiles["BLOCK_V"])
    # Parts of the rows, so that the GPU is full; as many for every call of these shapes.
    steps = triton.cdiv(rows, tiles["BLOCK_M"])
    splits = max(1, min(steps, PROGRAMS // (columns[0] * columns[1])))
    grid = (*columns, splits)
    parts = grad.new_empty(splits, dim, values, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        embed_patches_bwd_kernel[grid](
            grad.contiguous(), pixels.contiguous(), *scale_and_shift(mean, std, torch.float32),
            token_of_rank.contiguous(), parts, pixels.shape[0], rows,
            triton.cdiv(steps, splits) * tiles["BLOCK_M"], layout.num_tokens, len_keep, dim,
            pixels.dtype == torch.uint8, *geometry(layout), **tiles,
        )  # fmt: skip
    return parts.sum(0)


def _tiles(dtype: torch.dtype, sizes: dict[str, int]) -> dict[str, Any]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    upcast = interpreted and dtype == torch.bfloat16
    return sizes | {"UPCAST": upcast, "num_warps": 8, "num_stages": 3}
