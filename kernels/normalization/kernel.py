"""Residual addition + LayerNorm in Triton: a tile of whole rows in registers, cut into chunks.

The width is a few chunks of a power of two, 3 x 256 for 768, so that no lane idles; other widths
are masked. A launch takes up to four runs of rows, each under one norm, and tells them apart by
program: run-time integers, nothing is compiled anew for another number of rows. Weight gradients
are summed per program in registers, then over the programs in order.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype

_RUNS = 4  # of a launch
_PARTS = 1056  # programs of a backward pass at most, 8 for each multiprocessor of an H100
_LEAST = 4  # rows of each, or their partial sums would outweigh them
_BOUNDS = [f"{side}{index}" for side in ("begin", "end") for index in range(_RUNS)]


@triton.jit
def _place(begins, ends, step, NORMS: tl.constexpr):
    """(first row, end of its run, norm) of this program; a program takes `step` rows of a run."""
    program = tl.program_id(0)
    row, end, norm = begins[0], ends[0], 0
    passed = 0
    for run in tl.static_range(len(NORMS)):
        inside = program >= passed
        row = tl.where(inside, begins[run] + (program - passed) * step, row)
        end = tl.where(inside, ends[run], end)
        norm = tl.where(inside, NORMS[run], norm)
        passed += tl.cdiv(ends[run] - begins[run], step)
    return row, end, norm


@triton.jit
def _load(x_ptr, rows, stride, columns, mask, WIDE: tl.constexpr):
    """A tile (ROWS, CHUNK) in float32 (float64 if WIDE), zeros where masked."""
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0)
    return x.to(tl.float64) if WIDE else x.to(tl.float32)


@triton.jit
def _parameter(weight_ptr, norm, columns, D: tl.constexpr, WIDE: tl.constexpr):
    """A chunk (1, CHUNK) of a norm's weight or bias."""
    w = tl.load(weight_ptr + norm * D + columns, mask=columns < D, other=0)
    return (w.to(tl.float64) if WIDE else w.to(tl.float32))[None, :]


@triton.jit(do_not_specialize=_BOUNDS)
def add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, summed_ptr, mean_ptr, rstd_ptr,
    stride_x, stride_residual, begin0, begin1, begin2, begin3, end0, end1, end2, end3,
    NORMS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """normed, summed and statistics of ROWS rows per program. Grid: tiles of the runs."""
    begins, ends = (begin0, begin1, begin2, begin3), (end0, end1, end2, end3)
    row, end, norm = _place(begins, ends, ROWS, NORMS)
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    tiles = ()  # type: tuple
    total = tl.zeros((ROWS,), tl.float64 if WIDE else tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = inside[:, None] & (columns < D)[None, :]
        x = _load(x_ptr, rows, stride_x, columns, mask, WIDE)
        if HAS_RESIDUAL:
            x += _load(residual_ptr, rows, stride_residual, columns, mask, WIDE)
            rounded = x.to(summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + rows[:, None] * D + columns[None, :], rounded, mask=mask)
            x = rounded.to(x.dtype)
        total += tl.sum(x, axis=1)
        tiles = tiles + (x,)
    mean = total / D
    squares = tl.zeros_like(total)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        centred = tl.where((columns < D)[None, :], tiles[chunk] - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    rstd = 1.0 / tl.sqrt(squares / D + EPS)
    tl.store(mean_ptr + rows, mean, mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=inside)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        y = (tiles[chunk] - mean[:, None]) * rstd[:, None]
        y = y * _parameter(weight_ptr, norm, columns, D, WIDE)
        y += _parameter(bias_ptr, norm, columns, D, WIDE)
        tl.store(normed_ptr + rows[:, None] * D + columns[None, :],
                 y.to(normed_ptr.dtype.element_ty),
                 mask=inside[:, None] & (columns < D)[None, :])  # fmt: skip


@triton.jit
def _row_grad(
    grad_ptr, grad_summed_ptr, summed_ptr, mean_ptr, rstd_ptr, dsummed_ptr, dbranch_ptr,
    stride_grad, stride_grad_summed, stride_summed, row, end, weights, dweights, dbiases,
    D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    HAS_SUM_GRAD: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of ROWS rows; returns dweights and dbiases with theirs added."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    mean = tl.load(mean_ptr + rows, mask=inside, other=0)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=inside, other=0)[:, None]
    normed, grads = (), ()  # type: tuple, tuple
    into_weights, into_biases = (), ()  # type: tuple, tuple
    along = tl.zeros((ROWS,), mean.dtype)
    level = tl.zeros((ROWS,), mean.dtype)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = inside[:, None] & (columns < D)[None, :]
        dy = _load(grad_ptr, rows, stride_grad, columns, mask, WIDE)
        xhat = (_load(summed_ptr, rows, stride_summed, columns, mask, WIDE) - mean) * rstd
        into_weights = into_weights + (dweights[chunk] + dy * xhat,)
        into_biases = into_biases + (dbiases[chunk] + dy,)
        dy *= weights[chunk]
        along += tl.sum(dy * xhat, axis=1)
        level += tl.sum(dy, axis=1)
        normed, grads = normed + (xhat,), grads + (dy,)
    along, level = (along / D)[:, None], (level / D)[:, None]
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = inside[:, None] & (columns < D)[None, :]
        dx = (grads[chunk] - level - normed[chunk] * along) * rstd
        if HAS_SUM_GRAD:
            dx += _load(grad_summed_ptr, rows, stride_grad_summed, columns, mask, WIDE)
        place = rows[:, None] * D + columns[None, :]
        tl.store(dsummed_ptr + place, dx.to(dsummed_ptr.dtype.element_ty), mask=mask)
        if CAST:
            tl.store(dbranch_ptr + place, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    return into_weights, into_biases


@triton.jit(do_not_specialize=[*_BOUNDS, "rows_per_part", "part"])
def layer_norm_bwd_kernel(
    grad_ptr, grad_summed_ptr, summed_ptr, mean_ptr, rstd_ptr, weight_ptr, dsummed_ptr,
    dbranch_ptr, partial_ptr, stride_grad, stride_grad_summed, stride_summed,
    begin0, begin1, begin2, begin3, end0, end1, end2, end3, rows_per_part, part,
    NORMS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, HAS_SUM_GRAD: tl.constexpr, CAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of rows_per_part rows per program, and into partial[part + program] (2, D) their
    sums into weight and bias. Grid: parts of the runs."""
    begins, ends = (begin0, begin1, begin2, begin3), (end0, end1, end2, end3)
    first, end, norm = _place(begins, ends, rows_per_part, NORMS)
    end = tl.minimum(end, first + rows_per_part)
    weights, dweights, dbiases = (), (), ()  # type: tuple, tuple, tuple
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        weights = weights + (_parameter(weight_ptr, norm, columns, D, WIDE),)
        zeros = tl.zeros((ROWS, CHUNK), tl.float64 if WIDE else tl.float32)
        dweights, dbiases = dweights + (zeros,), dbiases + (zeros,)
    for row in range(first, end, ROWS):
        dweights, dbiases = _row_grad(
            grad_ptr, grad_summed_ptr, summed_ptr, mean_ptr, rstd_ptr, dsummed_ptr, dbranch_ptr,
            stride_grad, stride_grad_summed, stride_summed, row, end, weights, dweights, dbiases,
            D, CHUNK, CHUNKS, ROWS, HAS_SUM_GRAD, CAST, WIDE,
        )  # fmt: skip
    partial_ptr += (part + tl.program_id(0)).to(tl.int64) * 2 * D
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(partial_ptr + columns, tl.sum(dweights[chunk], axis=0), mask=columns < D)
        tl.store(partial_ptr + D + columns, tl.sum(dbiases[chunk], axis=0), mask=columns < D)


@triton.jit(do_not_specialize=_BOUNDS)
def parameter_grad_kernel(
    partial_ptr, out_ptr, begin0, begin1, begin2, begin3, end0, end1, end2, end3,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (norms, WIDTH): sums of the rows of partial (parts, WIDTH) from begin to end of each of
    up to four norms. Grid: (norms, blocks of WIDTH)."""
    norm = tl.program_id(0)
    begin = tl.where(norm == 0, begin0, tl.where(norm == 1, begin1,
                     tl.where(norm == 2, begin2, begin3)))  # fmt: skip
    end = tl.where(norm == 0, end0, tl.where(norm == 1, end1, tl.where(norm == 2, end2, end3)))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, BLOCK), out_ptr.dtype.element_ty)
    for first in range(begin, end, PARTS):
        parts = first + tl.arange(0, PARTS)
        mask = (parts < end)[:, None] & (columns < WIDTH)[None, :]
        place = parts.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        total += tl.load(partial_ptr + place, mask=mask, other=0)
    tl.store(out_ptr + norm * WIDTH + columns, tl.sum(total, axis=0), mask=columns < WIDTH)


class _Launch(NamedTuple):
    """Up to _RUNS runs: their norms, first rows and ends."""

    norms: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def programs(self, step: int) -> int:
        return sum(triton.cdiv(e - b, step) for b, e in zip(self.begins, self.ends, strict=True))

    def bounds(self) -> list[int]:
        return _padded(self.begins) + _padded(self.ends)


def _padded(values: tuple[int, ...]) -> list[int]:
    return [*values, *[0] * (_RUNS - len(values))]


def _launches(norms: Sequence[int], rows: Sequence[int]) -> Iterator[_Launch]:
    """The runs that have rows, by norm, so that the parts of each norm lie together."""
    ends = list(itertools.accumulate(rows))
    runs = sorted(
        (norm, end - count, end)
        for norm, count, end in zip(norms, rows, ends, strict=True)
        if count
    )
    for first in range(0, len(runs), _RUNS):
        yield _Launch(*zip(*runs[first : first + _RUNS], strict=True))


class _Layout(NamedTuple):
    """How a tile of rows is cut up."""

    chunk: int
    chunks: int
    rows: int
    warps: int


def _layout(width: int) -> _Layout:
    """Up to 24 values of a row per thread, in chunks of up to 8: one 16-byte load of bfloat16.

    A single warp has no barriers to wait at; it takes several rows where they are short.
    """
    warps = min(16, triton.next_power_of_2(triton.cdiv(width, 768)))
    widest = 256 * warps
    chunk = min(width & -width, widest)  # the largest power of two that divides the width
    if width // chunk > 8:
        chunk = min(widest, triton.next_power_of_2(width))
    chunks = triton.cdiv(width, chunk)
    rows = triton.next_power_of_2(768 // (chunk * chunks) + 1) // 2
    return _Layout(chunk, chunks, max(1, rows), warps)


def _constants(width: int, layout: _Layout, dtype: torch.dtype) -> dict[str, int | bool]:
    return {"D": width, "CHUNK": layout.chunk, "CHUNKS": layout.chunks, "ROWS": layout.rows,
            "WIDE": dtype == torch.float64, "num_warps": layout.warps}  # fmt: skip


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(
    x: Tensor, residual: Tensor | None, summed: Tensor, weight: Tensor, bias: Tensor,
    norms: Sequence[int], rows: Sequence[int], eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, dtype = _rowwise(x), compute_dtype(summed)
    residual = x if residual is None else _rowwise(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=dtype, device=x.device) for _ in range(2))
    layout = _layout(x.shape[1])
    for launch in _launches(norms, rows):
        with torch.cuda.device_of(x):
            add_layer_norm_fwd_kernel[(launch.programs(layout.rows),)](
                x, residual, weight, bias, normed, summed, mean, rstd,
                x.stride(0), residual.stride(0), *launch.bounds(), NORMS=launch.norms, EPS=eps,
                HAS_RESIDUAL=summed is not x, **_constants(x.shape[1], layout, dtype),
            )  # fmt: skip
    return normed, mean, rstd


def layer_norm(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, D) -> normed, mean, rstd."""
    x = _rowwise(x)
    return _forward(x, None, x, *args)


def add_layer_norm(
    x: Tensor, residual: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (R, D) -> normed, summed, mean, rstd."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    summed = torch.empty(x.shape, dtype=dtype, device=x.device)
    normed, mean, rstd = _forward(x, residual, summed, *args)
    return normed, summed, mean, rstd


def _backward(
    dbranch: Tensor | None, grad: Tensor, grad_summed: Tensor | None, summed: Tensor,
    mean: Tensor, rstd: Tensor, weight: Tensor, norms: Sequence[int], rows: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_norms, width = weight.shape
    grad, summed, weight = _rowwise(grad), _rowwise(summed), weight.contiguous()
    onto = grad if grad_summed is None else _rowwise(grad_summed)
    dsummed = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    layout = _layout(width)
    least = max(_LEAST, triton.cdiv(summed.shape[0], _PARTS))
    step = layout.rows * triton.cdiv(least, layout.rows)
    launches = list(_launches(norms, rows))
    partial = torch.empty(
        sum(launch.programs(step) for launch in launches), 2, width,
        dtype=mean.dtype, device=mean.device,
    )  # fmt: skip
    part = 0
    for launch in launches:
        with torch.cuda.device_of(summed):
            layer_norm_bwd_kernel[(launch.programs(step),)](
                grad, onto, summed, mean, rstd, weight, dsummed,
                dsummed if dbranch is None else dbranch, partial, grad.stride(0), onto.stride(0),
                summed.stride(0), *launch.bounds(), step, part, NORMS=launch.norms,
                HAS_SUM_GRAD=grad_summed is not None, CAST=dbranch is not None,
                **_constants(width, layout, mean.dtype),
            )  # fmt: skip
        part += launch.programs(step)
    sums = _parameter_grads(partial, _parts_of_norms(launches, step, num_norms))
    return dsummed, sums[:, 0].contiguous(), sums[:, 1].contiguous()


def _parts_of_norms(launches: list[_Launch], step: int, num_norms: int) -> list[int]:
    """Where the parts of each norm end; they begin where those of the one before it end."""
    counts = [0] * num_norms
    for launch in launches:
        for norm, begin, end in zip(*launch, strict=True):
            counts[norm] += triton.cdiv(end - begin, step)
    return list(itertools.accumulate(counts))


def _parameter_grads(partial: Tensor, ends: list[int]) -> Tensor:
    """partial (parts, 2, D) -> (S, 2, D), summed over the parts of each norm in order."""
    sums = torch.empty(len(ends), *partial.shape[1:], dtype=partial.dtype, device=partial.device)
    width, block = 2 * partial.shape[2], 64
    begins = [0, *ends[:-1]]
    for first in range(0, len(ends), _RUNS):
        some = slice(first, first + _RUNS)
        out = sums[some]
        with torch.cuda.device_of(partial):
            parameter_grad_kernel[(len(out), triton.cdiv(width, block))](
                partial, out, *_padded(tuple(begins[some])), *_padded(tuple(ends[some])),
                WIDTH=width, PARTS=32, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return sums


def layer_norm_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """-> dsummed (R, D), dweight, dbias (S, D)."""
    return _backward(None, *args)


def layer_norm_backward_cast(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dsummed, the same in another dtype, dweight, dbias."""
    summed, dtype = args[2], args[-1]
    dbranch = torch.empty(summed.shape, dtype=dtype, device=summed.device)
    dsummed, dweight, dbias = _backward(dbranch, *args[:-1])
    return dsummed, dbranch, dweight, dbias
