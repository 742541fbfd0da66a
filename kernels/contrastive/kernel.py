"""InfoNCE's logits in Triton: tiles that leave sums behind, and tiles that leave their gradient.

Neither pass holds all logits. The forward kernel writes each tile's row and column maxima and sums
of exponentials, which are merged in a fixed order; the backward kernel writes the gradient of some
rows of logits in the operand dtype, and PyTorch multiplies it with the features.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import TINY_NORM, blocks, product

# Unit rows: no logit exceeds 1 / temperature, and up to here exp(-2 / temperature) is normal.
MAX_STATIC_SCALE = 40.0

_MAX_STATIC_SCALE = tl.constexpr(MAX_STATIC_SCALE)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TINY_NORM = tl.constexpr(TINY_NORM)


@triton.jit
def normalise_rows_kernel(
    x_ptr, unit_ptr, inverse_ptr, stride, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Row over its L2 norm, and the inverse norm. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * stride + d, mask=d < D, other=0).to(tl.float32)
        squares += x * x
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares)), _TINY_NORM)
    tl.store(inverse_ptr + row, inverse)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * stride + d, mask=d < D, other=0).to(tl.float32)
        unit = (x * inverse).to(unit_ptr.dtype.element_ty)
        tl.store(unit_ptr + row * D + d, unit, mask=d < D)


@triton.jit
def _products(
    b_ptr, a_ptr, rows, columns, N, M, stride_b, stride_a,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """<b[row], a[column]> of one tile, accumulated in float32; zeros past the edges."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    b_rows = b_ptr + rows.to(tl.int64)[:, None] * stride_b
    a_rows = a_ptr + columns.to(tl.int64)[None, :] * stride_a
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_mask, y_mask = rows[:, None] < N, columns[None, :] < M
        if D % BLOCK_D != 0:
            x_mask, y_mask = x_mask & (d[None, :] < D), y_mask & (d[:, None] < D)
        x = tl.load(b_rows + d[None, :], mask=x_mask, other=0)
        y = tl.load(a_rows + d[:, None], mask=y_mask, other=0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit
def info_nce_fwd_kernel(
    b_ptr, a_ptr, scale_ptr, positive_ptr, row_max_ptr, row_sum_ptr, column_max_ptr,
    column_sum_ptr, N, M, stride_b, stride_a, offset,
    D: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of one tile, without the pairs' own logits. Grid: row x column tiles."""
    i, k = tl.program_id(0), tl.program_id(1)
    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = k * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr)
    z = scale * _products(b_ptr, a_ptr, rows, columns, N, M, stride_b, stride_a, D, BLOCK_N,
                          BLOCK_M, BLOCK_D, UPCAST)  # fmt: skip
    pair = rows + offset
    own = columns[None, :] == pair[:, None]
    here = (rows < N) & (pair >= k * BLOCK_M) & (pair < (k + 1) * BLOCK_M)
    tl.store(positive_ptr + rows, tl.sum(tl.where(own, z, 0.0), axis=1), mask=here)
    left_out = own | (rows[:, None] >= N) | (columns[None, :] >= M)
    z = tl.where(left_out, -float("inf"), z)
    row_max = tl.max(z, axis=1)
    column_max = tl.max(z, axis=0)
    if BOUNDED and scale <= _MAX_STATIC_SCALE:
        e = tl.exp(z - scale)  # one exponential for both directions
        row_sum, column_sum = tl.sum(e, axis=1), tl.sum(e, axis=0)
    else:
        row_sum = tl.sum(tl.exp(z - tl.maximum(row_max, _LOWEST)[:, None]), axis=1)
        column_sum = tl.sum(tl.exp(z - tl.maximum(column_max, _LOWEST)[None, :]), axis=0)
    at = k.to(tl.int64) * N + rows
    tl.store(row_max_ptr + at, row_max, mask=rows < N)
    tl.store(row_sum_ptr + at, row_sum, mask=rows < N)
    if COLUMNS:
        at = i.to(tl.int64) * M + columns
        tl.store(column_max_ptr + at, column_max, mask=columns < M)
        tl.store(column_sum_ptr + at, column_sum, mask=columns < M)


@triton.jit
def info_nce_bwd_kernel(
    b_ptr, a_ptr, scale_ptr, row_lse_ptr, row_weight_ptr, positive_grad_ptr, column_lse_ptr,
    column_weight_ptr, grad_ptr, dot_ptr, N, M, stride_b, stride_a, offset,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient by one tile of logits (N, M), and its rows' sums of gradient * logit."""
    i, k = tl.program_id(0), tl.program_id(1)
    rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = k * BLOCK_M + tl.arange(0, BLOCK_M)
    z = tl.load(scale_ptr) * _products(b_ptr, a_ptr, rows, columns, N, M, stride_b, stride_a, D,
                                       BLOCK_N, BLOCK_M, BLOCK_D, UPCAST)  # fmt: skip
    row_lse = tl.load(row_lse_ptr + rows, mask=rows < N, other=0)
    weight = tl.load(row_weight_ptr + rows, mask=rows < N, other=0)
    grad = weight[:, None] * tl.exp(z - row_lse[:, None])
    if COLUMNS:
        column_lse = tl.load(column_lse_ptr + columns, mask=columns < M, other=0)
        weight = tl.load(column_weight_ptr + columns, mask=columns < M, other=0)
        grad += weight[None, :] * tl.exp(z - column_lse[None, :])
    own = columns[None, :] == (rows + offset)[:, None]
    of_pair = tl.load(positive_grad_ptr + rows, mask=rows < N, other=0)
    inside = (rows[:, None] < N) & (columns[None, :] < M)
    grad = tl.where(inside, tl.where(own, of_pair[:, None], grad), 0.0)
    # A sum over both axes fails to compile for sm_100 in Triton 3.6.
    tl.store(dot_ptr + k.to(tl.int64) * N + rows, tl.sum(grad * z, axis=1), mask=rows < N)
    at = rows.to(tl.int64)[:, None] * M + columns[None, :]
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def normalise(x: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows of x (N, D) in the operand dtype, and the inverse norms (N, 1) in float32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    unit = torch.empty(rows, width, dtype=operand, device=x.device)
    inverse = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(max(1, width)))
    with torch.cuda.device_of(x):
        normalise_rows_kernel[(rows,)](x, unit, inverse, x.stride(0), D=width, BLOCK_D=block)
    return unit, inverse


def statistics(
    b: Tensor, a: Tensor, scale: Tensor, offset: int, columns: bool, bounded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """positive, row_lse, row_max (N,), column_lse, column_max (M,) or (0,) of b (N, D), a (M, D).

    bounded: the rows are unit vectors, so that exponentials may be shifted by `scale`.
    """
    (n, width), m = b.shape, a.shape[0]
    options = _options(b, width)
    row_tiles, column_tiles = _tiles(n, m, options)
    empty = torch.empty(0, dtype=torch.float32, device=b.device)
    positive = torch.empty(n, dtype=torch.float32, device=b.device)
    row = empty.new_empty(2, column_tiles, n)
    column = empty.new_empty(2, row_tiles if columns else 0, m if columns else 0)
    with torch.cuda.device_of(b):
        info_nce_fwd_kernel[(row_tiles, column_tiles)](
            b, a, scale, positive, row[0], row[1], column[0], column[1], n, m, b.stride(0),
            a.stride(0), offset, COLUMNS=columns, BOUNDED=bounded, **options,
        )  # fmt: skip
    row_lse, row_max = _merge(row, scale, bounded)
    column_lse, column_max = _merge(column, scale, bounded) if columns else (empty, empty.clone())
    return positive, row_lse, row_max, column_lse, column_max


def gradients(
    b: Tensor,
    a: Tensor,
    scale: Tensor,
    offset: int,
    row_lse: Tensor,
    row_weight: Tensor,
    positive_grad: Tensor,
    column_lse: Tensor,
    column_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by b (N, D), a (M, D) and scale, in float32; `reference.Targets` has the rest."""
    (n, width), m = b.shape, a.shape[0]
    options = _options(b, width)
    by_b = torch.empty(b.shape, dtype=torch.float32, device=b.device)
    by_a = torch.zeros(a.shape, dtype=torch.float32, device=b.device)
    by_scale = torch.zeros_like(scale)
    row_vectors = [x.contiguous() for x in (row_lse, row_weight, positive_grad)]
    by_column = [x.contiguous() for x in (column_lse, column_weight)]
    for start, stop in blocks(n, m):
        own = b[start:stop]
        grad = torch.empty(stop - start, m, dtype=b.dtype, device=b.device)
        tiles = _tiles(stop - start, m, options)
        dots = scale.new_empty(tiles[1], stop - start)
        with torch.cuda.device_of(b):
            info_nce_bwd_kernel[tiles](
                own, a, scale, *(x[start:stop] for x in row_vectors), *by_column, grad, dots,
                stop - start, m, b.stride(0), a.stride(0), offset + start,
                COLUMNS=column_lse.shape[0] > 0, **options,
            )  # fmt: skip
        by_scale = by_scale + dots.sum() / scale
        by_b[start:stop] = product(grad, a, b.dtype) * scale
        by_a += product(grad.t(), own, b.dtype) * scale
    return by_b, by_a, by_scale


def _merge(parts: Tensor, scale: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    """Maxima and sums of tiles (2, tiles, n) -> log-sum-exp and maximum (n,)."""
    tops, sums = parts
    shift = tops.clamp_min(torch.finfo(tops.dtype).min)
    if bounded:  # as the kernel chose
        shift = torch.where(scale <= MAX_STATIC_SCALE, scale, shift)
    largest = shift.amax(0)
    return largest + (sums * (shift - largest).exp()).sum(0).log(), tops.amax(0)


def _tiles(n: int, m: int, options: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(m, options["BLOCK_M"])


def _options(b: Tensor, width: int) -> dict[str, int]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    common = {"D": width, "UPCAST": interpreted and b.dtype == torch.bfloat16}
    if b.dtype == torch.float32:
        sizes = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    else:
        sizes = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return common | sizes
