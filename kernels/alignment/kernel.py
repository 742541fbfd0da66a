"""MMD in Triton: tiles of pairs that leave their sums behind, or their weights for the gradient.

The rows of both sets lie in one matrix Z (n, WIDTH), padded with zero columns so that every load is
16 bytes wide. A tile holds pairs of one kind, (x, x), (y, y) or (x, y). The README has the maths.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Coefficients, coefficients

NEAR = 1 / 128  # as kNear of csrc/cpu/alignment.cpp
WORKSPACE_ELEMENTS = 2**24  # weights of pairs alive at once

_NEAR = tl.constexpr(NEAR)


@triton.jit
def mmd_rows_kernel(
    x_ptr, y_ptr, mean_ptr, z_ptr, norm_ptr, spread_ptr, N, stride_x, stride_y,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """A row of x or y into Z, its squared norm, and that of the centred row. Grid: n."""
    row = tl.program_id(0).to(tl.int64)
    of_x = row < N
    norm = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_x + d, mask=(d < D) & of_x, other=0).to(tl.float32)
        y = tl.load(y_ptr + (row - N) * stride_y + d, mask=(d < D) & (row >= N), other=0)
        z = x + y.to(tl.float32)
        centred = z - tl.load(mean_ptr + d, mask=d < D, other=0)
        spread += centred * centred
        stored = (centred if CENTRE else z).to(z_ptr.dtype.element_ty)
        norm += stored.to(tl.float32) * stored.to(tl.float32)
        tl.store(z_ptr + row * WIDTH + d, stored, mask=d < WIDTH)
    tl.store(norm_ptr + row, tl.sum(norm))
    tl.store(spread_ptr + row, tl.sum(spread))


@triton.jit
def _distances(
    z_ptr, norm_ptr, scratch_ptr, rows, columns, inside, n, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Squared distances of a tile's pairs (BLOCK, BLOCK); 0 of a row and itself.

    scratch_ptr: BLOCK floats of this program's own.
    """
    rows, columns = tl.minimum(rows, n - 1), tl.minimum(columns, n - 1)
    row_z = z_ptr + rows.to(tl.int64) * WIDTH
    column_z = z_ptr + columns.to(tl.int64) * WIDTH
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x, y = tl.load(row_z[:, None] + d[None, :]), tl.load(column_z[None, :] + d[:, None])
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        products = tl.dot(x, y, products, input_precision="ieee")
    size = tl.load(norm_ptr + rows)[:, None] + tl.load(norm_ptr + columns)[None, :]
    distance = size - 2.0 * products
    distance = tl.where(distance < 0.0, 0.0, distance)  # a maximum would drop NaN
    distance = tl.where(rows[:, None] == columns[None, :], 0.0, distance)
    near = inside & (rows[:, None] != columns[None, :]) & (distance < _NEAR * size)
    # A reduction to a scalar behind a product fails to compile for sm_100 in Triton 3.6, but not
    # with memory in between.
    scratch = scratch_ptr + tl.arange(0, BLOCK)
    tl.store(scratch, tl.sum(near.to(tl.float32), axis=1))
    tl.debug_barrier()
    steps = tl.where(tl.max(tl.load(scratch), axis=0) > 0.0, WIDTH, 0)
    tl.debug_barrier()
    exact = tl.zeros((BLOCK, BLOCK), tl.float32)
    d = 0
    while d < steps:  # a range up to a run-time value fails in the interpreter of Triton 3.6
        x, y = tl.load(row_z + d).to(tl.float32), tl.load(column_z + d).to(tl.float32)
        difference = x[:, None] - y[None, :]
        exact += difference * difference
        d += 1
    return tl.where(near, exact, distance)


@triton.jit
def _miss(t):
    """1 - exp(-t) of t >= 0; by its series where it is small."""
    series = 1.0 - t * (1.0 / 8.0)
    series = 1.0 - t * (1.0 / 7.0) * series
    series = 1.0 - t * (1.0 / 6.0) * series
    series = 1.0 - t * (1.0 / 5.0) * series
    series = 1.0 - t * (1.0 / 4.0) * series
    series = 1.0 - t * (1.0 / 3.0) * series
    series = 1.0 - t * (1.0 / 2.0) * series
    return tl.where(t < 0.35, t * series, 1.0 - tl.exp(-t))


@triton.jit
def _raise(miss, POWER: tl.constexpr):
    """The miss of a kernel's power, at most the 16th, from that of the kernel.

    1 - (1-p)(1-q) = p + q (1-p) adds up positive numbers: relative precision is kept.
    """
    result = miss if POWER % 2 == 1 else miss * 0.0
    base = miss
    for bit in tl.static_range(1, 5):
        if POWER // 2**bit > 0:
            base += base * (1.0 - base)
            if (POWER // 2**bit) % 2 == 1:
                result += base * (1.0 - result)
    return result


@triton.jit
def _family(distance, GAMMAS: tl.constexpr, POWERS: tl.constexpr, COUNT: tl.constexpr):
    """Sums over the kernels of misses and of gamma * kernel."""
    total = tl.zeros_like(distance)
    weight = tl.zeros_like(distance)
    miss = total
    for k in tl.static_range(COUNT):
        miss = _miss(GAMMAS[k] * distance) if POWERS[k] == 0 else _raise(miss, POWERS[k])
        total += miss
        weight += GAMMAS[k] * (1.0 - miss)
    return total, weight


@triton.jit
def _block(index, N, n, BLOCK: tl.constexpr):
    """(first row, end, whether it is of y) of a block of rows; blocks of x come first."""
    of_x = tl.cdiv(N, BLOCK)
    of_y = index >= of_x
    first = tl.where(of_y, N + (index - of_x) * BLOCK, index * BLOCK)
    return first, tl.where(of_y, n, N), of_y


@triton.jit
def mmd_fwd_kernel(
    z_ptr, norm_ptr, scale_ptr, sum_ptr, N, n, weight_xx, weight_yy, weight_xy,
    WIDTH: tl.constexpr, GAMMAS: tl.constexpr, POWERS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Weighted sums of the misses of a tile's rows. Grid: T blocks x (T // 2 + 1) distances.

    Block i with block i + k modulo T: every unordered pair of blocks once, but for those half-way
    round an even T, which come twice.
    """
    i, k, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    j = (i + k) % blocks
    row_start, row_end, rows_of_y = _block(i, N, n, BLOCK)
    column_start, column_end, columns_of_y = _block(j, N, n, BLOCK)
    rows, columns = row_start + tl.arange(0, BLOCK), column_start + tl.arange(0, BLOCK)
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    own_sums = sum_ptr + (i * tl.num_programs(1) + k).to(tl.int64) * BLOCK
    distance = _distances(z_ptr, norm_ptr, own_sums, rows, columns, inside, n, WIDTH, BLOCK,
                          BLOCK_D, UPCAST)  # fmt: skip
    miss, _ = _family(distance * tl.load(scale_ptr), GAMMAS, POWERS, COUNT)
    weight = tl.where(rows_of_y, weight_yy, weight_xx)
    weight = tl.where(rows_of_y == columns_of_y, weight, weight_xy)
    weight = tl.where((k == 0) | (2 * k == blocks), weight, 2.0 * weight)
    sums = tl.sum(tl.where(inside, miss, 0.0), axis=1) * weight
    tl.store(own_sums + tl.arange(0, BLOCK), sums)


@triton.jit
def mmd_bwd_kernel(
    z_ptr, norm_ptr, scale_ptr, weight_ptr, total_ptr, row_start, row_end, N, n,
    weight_x, weight_y,
    WIDTH: tl.constexpr, GAMMAS: tl.constexpr, POWERS: tl.constexpr, COUNT: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Weights of pairs, rows row_start ... row_end of one set with all n, and their sums per row.

    weight_x, weight_y: of a pair with a row of x, of y. Grid: blocks of rows x blocks of columns.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    local = i * BLOCK + tl.arange(0, BLOCK)
    rows = row_start + local
    column_start, column_end, columns_of_y = _block(j, N, n, BLOCK)
    columns = column_start + tl.arange(0, BLOCK)
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    own_totals = total_ptr + (j.to(tl.int64) * tl.num_programs(0) + i) * BLOCK
    distance = _distances(z_ptr, norm_ptr, own_totals, rows, columns, inside, n, WIDTH, BLOCK,
                          BLOCK_D, UPCAST)  # fmt: skip
    _, weight = _family(distance * tl.load(scale_ptr), GAMMAS, POWERS, COUNT)
    weight *= tl.where(columns_of_y, weight_y, weight_x) * UNIT
    # Equal rows do not move each other; their large weights would cancel, but for rounding.
    weight = tl.where(inside & (distance != 0.0), weight, 0.0).to(weight_ptr.dtype.element_ty)
    at = local.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(own_totals + tl.arange(0, BLOCK), tl.sum(weight.to(tl.float32), axis=1))


class _Rows(NamedTuple):
    """Rows of both sets, ready for the tiles."""

    z: Tensor  # (n, WIDTH)
    norms: Tensor  # (n,)
    scale: Tensor  # ()
    first: int  # N, the rows of x

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.z, self.norms, self.scale


def loss(x: Tensor, y: Tensor, variant: str, gammas: list[float], powers: list[int]) -> Tensor:
    """x (N, D), y (M, D) -> () in float32."""
    rows = _prepare(x, y, variant)
    weights = coefficients(variant, x.shape[0], y.shape[0])
    return _loss(rows, weights, _options(rows, gammas, powers))


def loss_and_grads(
    x: Tensor,
    y: Tensor,
    variant: str,
    gammas: list[float],
    powers: list[int],
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and the gradients by x and y in float32; (0, D) where not needed."""
    rows = _prepare(x, y, variant)
    options = _options(rows, gammas, powers)
    (n, width), m = x.shape, y.shape[0]
    weights = coefficients(variant, n, m)
    value = _loss(rows, weights, options)
    # Weights are stored as shares of the largest: as they are, they would leave bfloat16's range.
    unit = max(abs(weights.xx), abs(weights.yy), abs(weights.xy))
    options["UNIT"] = 1 / sum(gammas)
    factor = rows.scale * (4 * unit * sum(gammas))
    by_x = by_y = torch.empty(0, width, dtype=torch.float32, device=x.device)
    by_y = by_y.clone()
    if need_x:
        pair = weights.xx / unit, weights.xy / unit
        by_x = _gradient(rows, 0, n, pair, options)[:, :width] * factor
    if need_y:
        pair = weights.xy / unit, weights.yy / unit
        by_y = _gradient(rows, n, n + m, pair, options)[:, :width] * factor
    return value, by_x, by_y


def _loss(rows: _Rows, weights: Coefficients, options: dict[str, Any]) -> Tensor:
    n = rows.z.shape[0]
    tiles = _blocks(rows, options["BLOCK"])
    grid = (tiles, tiles // 2 + 1)
    sums = torch.empty(*grid, options["BLOCK"], dtype=torch.float32, device=rows.z.device)
    with torch.cuda.device_of(rows.z):
        mmd_fwd_kernel[grid](
            *rows.args, sums, rows.first, n, weights.xx, weights.yy, weights.xy, **options
        )
    return (sums.sum(dtype=torch.float64) + weights.constant).to(torch.float32)


def _gradient(
    rows: _Rows, start: int, stop: int, weights: tuple[float, float], options: dict[str, Any]
) -> Tensor:
    """Row sums * Z - weights @ Z of the rows start ... stop (all of one set), in float32."""
    z, n = rows.z, rows.z.shape[0]
    block = options["BLOCK"]
    grad = torch.empty(stop - start, z.shape[1], dtype=torch.float32, device=z.device)
    # float16 has too small a range for the weights; bfloat16 has float32's.
    operand = torch.bfloat16 if z.dtype == torch.bfloat16 else torch.float32
    others = z.to(operand)
    step = max(block, WORKSPACE_ELEMENTS // n // block * block)
    for first in range(start, stop, step):
        height = min(step, stop - first)
        tiles = (triton.cdiv(height, block), _blocks(rows, block))
        workspace = torch.empty(height, n, dtype=operand, device=z.device)
        totals = torch.empty(tiles[1], tiles[0] * block, dtype=torch.float32, device=z.device)
        with torch.cuda.device_of(z):
            mmd_bwd_kernel[tiles](
                *rows.args, workspace, totals, first, first + height, rows.first, n, *weights,
                **options,
            )  # fmt: skip
        own = z[first : first + height] * totals.sum(0)[:height].unsqueeze(1)
        torch.sub(own, _product(workspace, others), out=grad[first - start :][:height])
    return grad


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, accumulated and returned in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def _prepare(x: Tensor, y: Tensor, variant: str) -> _Rows:
    x, y = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x, y))
    (first, width), n = x.shape, x.shape[0] + y.shape[0]
    dtype = x.dtype if x.dtype == y.dtype else torch.float32
    step = _depth(dtype)
    padded = triton.cdiv(width, step) * step
    mean = (x.sum(0, dtype=torch.float32) + y.sum(0, dtype=torch.float32)) / n
    z = torch.empty(n, padded, dtype=dtype, device=x.device)
    norms, spread = torch.empty(2, n, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        mmd_rows_kernel[(n,)](
            x, y, mean, z, norms, spread, first, x.stride(0), y.stride(0), D=width, WIDTH=padded,
            BLOCK=min(1024, triton.next_power_of_2(padded)),
            # The products of 16-bit rows are exact as they are; centring would round them.
            CENTRE=dtype == torch.float32,
        )  # fmt: skip
    return _Rows(z, norms, _scale(variant, spread, width), first)


def _scale(variant: str, spread: Tensor, width: int) -> Tensor:
    """`reference.scale_of`, from the squared norms of the centred rows."""
    if variant == "kdc_rbf":
        twice = spread.sum() * (2 / (spread.shape[0] - 1))
        return torch.where(twice == 0, twice, 1 / twice)
    return spread.new_full((), 1 / width**2 if variant == "kdc_tiled" else 1.0)


def _blocks(rows: _Rows, block: int) -> int:
    """Blocks of rows, none of which holds rows of both sets."""
    of_y = rows.z.shape[0] - rows.first
    return triton.cdiv(rows.first, block) + triton.cdiv(of_y, block)


def _depth(dtype: torch.dtype) -> int:
    """Features a tile takes in one step."""
    return 32 if dtype == torch.float32 else 64


def _options(rows: _Rows, gammas: list[float], powers: list[int]) -> dict[str, Any]:
    z = rows.z
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    options = {
        "WIDTH": z.shape[1], "GAMMAS": tuple(gammas), "POWERS": tuple(powers),
        "COUNT": len(gammas), "BLOCK_D": _depth(z.dtype),
        "UPCAST": interpreted and z.dtype == torch.bfloat16,
        # Half a dozen tiles of float32 are alive at once: larger ones do not fit the registers.
        "BLOCK": 64, "num_warps": 8,
    }  # fmt: skip
    if z.dtype == torch.float32:
        # Left alone, the assembler aims at 128 registers, and spills.
        return options | {"num_stages": 2, "maxnreg": 168}
    return options | {"num_stages": 3}
