"""Mean of the standardised tokens of each sample in Triton.

A program takes some tokens of one sample, a few at a time in registers, and adds them up. The
width is a few chunks of a power of two, 3 x 256 for 768, so that no lane idles; other widths are
masked. The README has the formulas.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype

_TOKENS = 32  # of a program: more would leave a GPU idle at small batches


@triton.jit
def _tile(x_ptr, place, columns, mask, WIDE: tl.constexpr):
    """Some values of some tokens (ROWS, CHUNK) in float32 (float64 if WIDE), zeros where masked."""
    x = tl.load(x_ptr + place[:, None] + columns[None, :], mask=mask, other=0)
    return x.to(tl.float64) if WIDE else x.to(tl.float32)


@triton.jit
def pooled_tokens_fwd_kernel(
    x_ptr, partial_ptr, mean_ptr, rstd_ptr, stride_xb, stride_xl, length, parts, eps: tl.float64,
    D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Statistics of TOKENS tokens, and the sum of the standardised tokens / length. Grid:
    (B, parts)."""
    b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    epsilon = tl.full((1,), eps, dtype)
    sums = ()  # type: tuple
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros((ROWS, CHUNK), dtype),)
    for step in range(0, TOKENS, ROWS):
        tokens = (tl.program_id(1) * TOKENS + step + tl.arange(0, ROWS)).to(tl.int64)
        inside = tokens < length
        place = b * stride_xb + tokens * stride_xl
        tiles = ()  # type: tuple
        total = tl.zeros((ROWS, CHUNK), dtype)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = inside[:, None] & (columns < D)[None, :]
            x = _tile(x_ptr, place, columns, mask, WIDE)
            tiles, total = tiles + (x,), total + x
        mean = tl.sum(total, axis=1) / D
        squares = tl.zeros((ROWS, CHUNK), dtype)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            centred = tl.where((columns < D)[None, :], tiles[chunk] - mean[:, None], 0.0)
            squares += centred * centred
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + epsilon)
        tl.store(mean_ptr + b * length + tokens, mean, mask=inside)
        tl.store(rstd_ptr + b * length + tokens, rstd, mask=inside)
        # A token past the end is all zeros, and so is what it adds.
        added = ()  # type: tuple
        for chunk in tl.static_range(CHUNKS):
            added = added + (sums[chunk] + (tiles[chunk] - mean[:, None]) * rstd[:, None],)
        sums = added
    partial_ptr += (b * parts + tl.program_id(1)) * D
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(partial_ptr + columns, tl.sum(sums[chunk], axis=0) / length, mask=columns < D)


@triton.jit
def pooled_tokens_bwd_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, dx_ptr, stride_grad, stride_xb, stride_xl, length,
    D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient by TOKENS tokens, dx (B, L, D) contiguous. Grid: (B, parts)."""
    b = tl.program_id(0).to(tl.int64)
    grads = ()  # type: tuple
    level = tl.zeros((1,), tl.float64 if WIDE else tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        grad = tl.load(grad_ptr + b * stride_grad + columns, mask=columns < D, other=0) / length
        level += tl.sum(grad, axis=0, keep_dims=True)
        grads = grads + (grad,)
    centred = ()  # type: tuple
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        centred = centred + (tl.where(columns < D, grads[chunk] - level / D, 0.0)[None, :],)
    for step in range(0, TOKENS, ROWS):
        tokens = (tl.program_id(1) * TOKENS + step + tl.arange(0, ROWS)).to(tl.int64)
        inside = tokens < length
        place = b * stride_xb + tokens * stride_xl
        mean = tl.load(mean_ptr + b * length + tokens, mask=inside, other=0)[:, None]
        rstd = tl.load(rstd_ptr + b * length + tokens, mask=inside, other=0)[:, None]
        tiles = ()  # type: tuple
        products = tl.zeros((ROWS, CHUNK), mean.dtype)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = inside[:, None] & (columns < D)[None, :]
            standardised = (_tile(x_ptr, place, columns, mask, WIDE) - mean) * rstd
            products += centred[chunk] * standardised
            tiles = tiles + (standardised,)
        along = (tl.sum(products, axis=1) / D)[:, None]
        into = (b * length + tokens) * D
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            dx = rstd * (centred[chunk] - tiles[chunk] * along)
            tl.store(dx_ptr + into[:, None] + columns[None, :], dx.to(dx_ptr.dtype.element_ty),
                     mask=inside[:, None] & (columns < D)[None, :])  # fmt: skip


class _Layout(NamedTuple):
    """How a tile of tokens is cut up."""

    chunk: int
    chunks: int
    rows: int
    warps: int


def _layout(width: int, itemsize: int) -> _Layout:
    """Four warps with a token each up to 1024 values, more warps for a wider one.

    A chunk is one 16-byte load of each thread that has the token: where that is a single warp, its
    sums need no barrier.
    """
    rounded = triton.next_power_of_2(width)
    rows = max(1, 4096 // rounded)
    warps = min(16, max(4, rounded // 1024))
    widest = 512 // itemsize * max(1, warps // rows)
    chunk = min(width & -width, widest)  # the largest power of two that divides the width
    if width // chunk > 8:
        chunk = min(max(widest, rounded // 8), rounded)
    return _Layout(chunk, triton.cdiv(width, chunk), rows, warps)


def _constants(x: Tensor) -> dict[str, int | bool]:
    layout = _layout(x.shape[2], x.element_size())
    return {"D": x.shape[2], "CHUNK": layout.chunk, "CHUNKS": layout.chunks, "ROWS": layout.rows,
            "TOKENS": max(_TOKENS, layout.rows), "WIDE": x.dtype == torch.float64,
            "num_warps": layout.warps}  # fmt: skip


def _tokenwise(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def pooled_tokens(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, L, D) -> mean of the standardised tokens (B, D), statistics (2, B, L)."""
    x, dtype = _tokenwise(x), compute_dtype(x)
    batch, length, width = x.shape
    constants = _constants(x)
    parts = triton.cdiv(length, constants["TOKENS"])
    partial = torch.empty(batch, parts, width, dtype=dtype, device=x.device)
    statistics = torch.empty(2, batch, length, dtype=dtype, device=x.device)
    if batch:
        with torch.cuda.device_of(x):
            pooled_tokens_fwd_kernel[(batch, parts)](
                x, partial, *statistics, x.stride(0), x.stride(1), length, parts, eps, **constants
            )
    return partial.squeeze(1) if parts == 1 else partial.sum(dim=1), statistics


def pooled_tokens_grad(grad: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """grad (B, D), x (B, L, D) -> gradient by x, in its dtype."""
    x, grad = _tokenwise(x), grad if grad.stride(1) == 1 else grad.contiguous()
    batch, length, _ = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch:
        constants = _constants(x)
        with torch.cuda.device_of(x):
            pooled_tokens_bwd_kernel[(batch, triton.cdiv(length, constants["TOKENS"]))](
                grad, x, *statistics.contiguous(), dx, grad.stride(0), x.stride(0), x.stride(1),
                length, **constants,
            )  # fmt: skip
    return dx
