"""Clip similarities in Triton: tiles of frame products, folded to clips before they are stored.

One helper makes a tile of scores; one kernel stores it, another compares it with the true pairs'
scores and keeps counts only. Frames are read as they are, and their inverse norms applied to the
products. Float64 sums (WIDE) for float64 inputs and for ranks, else float32.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import TINY_NORM

_CHUNK = 2**24  # elements converted to the type of the computation at once
_STRATEGIES = ("diagonal_mean", "diagonal_max", "max")
_DIAGONAL_MEAN = tl.constexpr(0)
_MAX = tl.constexpr(2)
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _add_products(
    total, a_rows, b_rows, a_mask, b_mask, start,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total + <a frame, b frame> of BLOCK_D features, from pointers to the frames."""
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    d = start + tl.arange(0, BLOCK_D)
    x_mask, y_mask = a_mask[:, None], b_mask[None, :]
    if D % BLOCK_D != 0:
        x_mask, y_mask = x_mask & (d[None, :] < D), y_mask & (d[:, None] < D)
    x = tl.load(a_rows[:, None] + d[None, :], mask=x_mask, other=0)
    y = tl.load(b_rows[None, :] + d[:, None], mask=y_mask, other=0)
    if UPCAST:
        x, y = x.to(kind), y.to(kind)
    return tl.dot(x, y, total, input_precision="ieee", out_dtype=kind)


@triton.jit
def _all_pairs(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, i, j, N, M, stride_an, stride_at, stride_bn,
    stride_bt,
    D: tl.constexpr, T: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Largest of the T x T products of BLOCK x BLOCK clips, and the first k T + l it is at."""
    r = tl.arange(0, BLOCK * FRAMES)
    n, m, frame = i * BLOCK + r // FRAMES, j * BLOCK + r // FRAMES, r % FRAMES
    real = frame < T  # the others fill up a power of two
    a_mask, b_mask = real & (n < N), real & (m < M)
    n64, m64 = n.to(tl.int64), m.to(tl.int64)
    a_rows = a_ptr + n64 * stride_an + frame * stride_at
    b_rows = b_ptr + m64 * stride_bn + frame * stride_bt
    z = tl.zeros((BLOCK * FRAMES, BLOCK * FRAMES), tl.float64 if WIDE else tl.float32)
    for start in range(0, D, BLOCK_D):
        z = _add_products(z, a_rows, b_rows, a_mask, b_mask, start, D, BLOCK_D, WIDE, UPCAST)
    x_inverse = tl.load(a_inverse_ptr + n64 * T + frame, mask=a_mask, other=0)
    z *= x_inverse[:, None]
    y_inverse = tl.load(b_inverse_ptr + m64 * T + frame, mask=b_mask, other=0)
    z *= y_inverse[None, :]
    z = tl.where(real[:, None] & real[None, :], z, -float("inf"))
    # Maxima pass over NaN, which is to show.
    bad = tl.reshape((z != z).to(tl.int32), (BLOCK * FRAMES, BLOCK, FRAMES))
    bad = tl.max(tl.reshape(tl.max(bad, axis=2), (BLOCK, FRAMES, BLOCK)), axis=1)
    z = tl.reshape(z, (BLOCK, FRAMES, BLOCK, FRAMES))
    best = tl.max(tl.max(z, axis=3), axis=1)
    index = tl.zeros((BLOCK, BLOCK), tl.int32)
    if INDEX:
        at = tl.arange(0, FRAMES)[:, None, None] * T + tl.arange(0, FRAMES)[None, None, :]
        at = tl.where(z == best[:, None, :, None], at[None, :, :, :], _NONE)
        index = tl.min(tl.min(at, axis=3), axis=1)
        index = tl.where(bad > 0, 0, index)
    return tl.where(bad > 0, float("nan"), best), index


@triton.jit
def _same_frames(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, i, j, N, M, stride_an, stride_at, stride_bn,
    stride_bt,
    D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    STRATEGY: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mean or largest product of frame k with frame k, of BLOCK x BLOCK clips, and the first k."""
    n, m = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    a_mask, b_mask = n < N, m < M
    n, m = n.to(tl.int64), m.to(tl.int64)
    lowest = 0.0 if STRATEGY == _DIAGONAL_MEAN else -float("inf")
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    score = tl.full((BLOCK, BLOCK), lowest, kind)
    index = tl.zeros((BLOCK, BLOCK), tl.int32)
    # One loop over frames and features: of two, the inner one is unrolled and registers run out.
    steps: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    z = tl.zeros((BLOCK, BLOCK), kind)
    for step in range(T * steps):
        k, start = step // steps, step % steps * BLOCK_D
        a_rows, b_rows = (
            a_ptr + n * stride_an + k * stride_at,
            b_ptr + m * stride_bn + k * stride_bt,
        )
        z = _add_products(z, a_rows, b_rows, a_mask, b_mask, start, D, BLOCK_D, WIDE, UPCAST)
        if step % steps == steps - 1:
            z *= tl.load(a_inverse_ptr + n * T + k, mask=a_mask, other=0)[:, None]
            z *= tl.load(b_inverse_ptr + m * T + k, mask=b_mask, other=0)[None, :]
            if STRATEGY == _DIAGONAL_MEAN:
                score += z
            else:
                better = (z > score) | (z != z)
                score = tl.where(better, z, score)
                index = tl.where(better, k, index)
            z = tl.zeros((BLOCK, BLOCK), kind)
    if STRATEGY == _DIAGONAL_MEAN:
        score = score / T
    return score, index


@triton.jit
def frame_similarity_fwd_kernel(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, score_ptr, index_ptr, N, M, stride_an, stride_at,
    stride_bn, stride_bt, tiles,
    D: tl.constexpr, T: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, STRATEGY: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of scores (N, M) and of the places of their maxima. Grid: row x column tiles."""
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if STRATEGY == _MAX:
        score, index = _all_pairs(
            a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, i, j, N, M, stride_an, stride_at, stride_bn,
            stride_bt, D, T, FRAMES, BLOCK, BLOCK_D, WIDE, UPCAST, True,
        )  # fmt: skip
    else:
        score, index = _same_frames(
            a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, i, j, N, M, stride_an, stride_at, stride_bn,
            stride_bt, D, T, BLOCK, BLOCK_D, STRATEGY, WIDE, UPCAST,
        )  # fmt: skip
    n, m = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    at = n.to(tl.int64)[:, None] * M + m[None, :]
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(score_ptr + at, score, mask=inside)
    if STRATEGY != _DIAGONAL_MEAN:
        tl.store(index_ptr + at, index, mask=inside)


@triton.jit(do_not_specialize=["first"])
def retrieval_counts_kernel(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, own_ptr, count_ptr, tolerance_ptr, N, stride_an,
    stride_at, stride_bn, stride_bt, tiles, first,
    D: tl.constexpr, T: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, STRATEGY: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    RELATIVE: tl.constexpr,
):  # fmt: skip
    """Counts of one tile of scores, which is not stored. Grid: tiles of a x as many tiles of b.

    The tiles on the diagonal (first = 0) hold the pairs' own scores, so they go before the others
    (first = 1) and by the same code. counts (4, N): above and from, by row, then by column.
    """
    i = tl.program_id(0) % tiles
    j = (i + tl.program_id(0) // tiles + first) % tiles
    if STRATEGY == _MAX:
        score, _ = _all_pairs(
            a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, i, j, N, N, stride_an, stride_at, stride_bn,
            stride_bt, D, T, FRAMES, BLOCK, BLOCK_D, WIDE, UPCAST, False,
        )  # fmt: skip
    else:
        score, _ = _same_frames(
            a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, i, j, N, N, stride_an, stride_at, stride_bn,
            stride_bt, D, T, BLOCK, BLOCK_D, STRATEGY, WIDE, UPCAST,
        )  # fmt: skip
    n, m = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    pairs = (n[:, None] == m[None, :]).to(tl.int32) != 0
    known = (n < N) & (i != j)
    row_own = tl.load(own_ptr + n, mask=known, other=0)
    row_own += tl.sum(tl.where(pairs, score, 0.0), axis=1)
    column_own = tl.load(own_ptr + m, mask=(m < N) & (i != j), other=0)
    column_own += tl.sum(tl.where(pairs, score, 0.0), axis=0)
    tl.store(own_ptr + n, row_own, mask=(n < N) & (i == j))
    tolerance = tl.load(tolerance_ptr)
    row_slack, column_slack = row_own * 0 + tolerance, column_own * 0 + tolerance
    if RELATIVE:
        row_slack, column_slack = tl.abs(row_own) * tolerance, tl.abs(column_own) * tolerance
        infinite = float("inf")
        row_slack = tl.where(tl.abs(row_own) == infinite, 0.0, row_slack)
        column_slack = tl.where(tl.abs(column_own) == infinite, 0.0, column_slack)
    inside = (n[:, None] < N) & (m[None, :] < N)
    above = (inside & (score > (row_own + row_slack)[:, None])).to(tl.int32)
    from_ = (inside & (score >= (row_own - row_slack)[:, None])).to(tl.int32)
    tl.atomic_add(count_ptr + n, tl.sum(above, axis=1), mask=n < N)
    tl.atomic_add(count_ptr + N + n, tl.sum(from_, axis=1), mask=n < N)
    above = (inside & (score > (column_own + column_slack)[None, :])).to(tl.int32)
    from_ = (inside & (score >= (column_own - column_slack)[None, :])).to(tl.int32)
    counts = count_ptr + 2 * N.to(tl.int64)
    tl.atomic_add(counts + m, tl.sum(above, axis=0), mask=m < N)
    tl.atomic_add(counts + N + m, tl.sum(from_, axis=0), mask=m < N)


@triton.jit
def frame_similarity_bwd_kernel(
    grad_ptr, index_ptr, y_ptr, y_inverse_ptr, sum_ptr, M, stride_gn, stride_gm, stride_in,
    stride_im, stride_yn, stride_yt, chunks,
    D: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    STRATEGY: tl.constexpr, OF_B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the maxima's gradients give one scaled frame: those of the scores that it is in, each
    times the other frame in it. Grid: clips x frames x chunks of features."""
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    frame = tl.program_id(0) // chunks
    n, k = (frame // T).to(tl.int64), frame % T
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), kind)
    start = 0
    while start < M:
        m = start + tl.arange(0, BLOCK_M)
        m64 = m.to(tl.int64)
        at = tl.load(index_ptr + n * stride_in + m64 * stride_im, mask=m < M, other=0)
        own, other = at, at
        if STRATEGY == _MAX:
            own, other = (at % T, at // T) if OF_B else (at // T, at % T)
        here = (m < M) & (own == k)
        weight = tl.load(grad_ptr + n * stride_gn + m64 * stride_gm, mask=here, other=0).to(kind)
        weight *= tl.load(y_inverse_ptr + m64 * T + other, mask=here, other=0)
        rows = y_ptr + m64 * stride_yn + other * stride_yt
        mask = here[:, None] & (d[None, :] < D)
        y = tl.load(rows[:, None] + d[None, :], mask=mask, other=0).to(kind)
        total += tl.sum(weight[:, None] * y, axis=0)
        start += BLOCK_M
    at = (n * T + k) * D + d
    tl.store(sum_ptr + at, total, mask=d < D)


def scores(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, strategy: str
) -> tuple[Tensor, Tensor]:
    """Scores (N, M), and where the maxima are, as k T + l (diagonal: k), else (0, 0)."""
    n, m = a.shape[0], b.shape[0]
    indexed = strategy in ("diagonal_max", "max")
    index = torch.empty((n, m) if indexed else (0, 0), dtype=torch.int32, device=a.device)
    if strategy == "mean":
        return _pooled(a, a_inverse) @ _pooled(b, b_inverse).t(), index
    a, b = _operands(a, b, a_inverse.dtype == torch.float64)
    out = torch.empty(n, m, dtype=a_inverse.dtype, device=a.device)
    if n == 0 or m == 0:
        return out, index
    options = _options(a, a_inverse, strategy)
    tiles = [triton.cdiv(clips, options["BLOCK"]) for clips in (n, m)]
    with torch.cuda.device_of(a):
        frame_similarity_fwd_kernel[(tiles[0] * tiles[1],)](
            a, b, a_inverse, b_inverse, out, index, n, m, *_strides(a), *_strides(b), tiles[1],
            **options,
        )  # fmt: skip
    return out, index


def scores_grad(
    grad: Tensor,
    index: Tensor,
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    strategy: str,
    normalize: bool,
    of_b: bool,
) -> Tensor:
    """Gradient by a (of_b: by b) in its dtype, from the one by the scores (N, M)."""
    if of_b:
        a, b, a_inverse, b_inverse, grad, index = b, a, b_inverse, a_inverse, grad.t(), index.t()
    (frames, width), kind = a.shape[1:], a_inverse.dtype
    if strategy == "mean":
        by_mean = grad.to(kind) @ _pooled(b, b_inverse) / frames
        by_unit = by_mean.unsqueeze(1).expand(-1, frames, -1)
    elif strategy == "diagonal_mean":
        unit = b.to(kind) * b_inverse.unsqueeze(2)
        by_unit = (grad.to(kind) @ unit.flatten(1) / frames).unflatten(1, (frames, width))
    else:
        by_unit = _scattered(grad, index, _framewise(b), b_inverse, strategy, of_b)
    if not normalize:
        return by_unit.to(a.dtype, copy=True, memory_format=torch.contiguous_format)
    unit = a.to(kind) * a_inverse.unsqueeze(2)
    along = (unit * by_unit).sum(2, keepdim=True)
    along = along.masked_fill(a_inverse.unsqueeze(2) >= 0.999 / TINY_NORM, 0)
    return ((by_unit - unit * along) * a_inverse.unsqueeze(2)).to(a.dtype)


def pair_counts(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    strategy: str,
    tolerance: float,
    relative: bool,
    tile_size: int,
) -> Tensor:
    """`reference.pair_counts`, in tiles of this kernel's own size."""
    clips = a.shape[0]
    if strategy == "mean":  # the mean frames as clips of one frame
        a, b = (_pooled(x, y).unsqueeze(1) for x, y in ((a, a_inverse), (b, b_inverse)))
        a_inverse, b_inverse = (torch.ones_like(x[:, :1]) for x in (a_inverse, b_inverse))
        strategy = "diagonal_mean"
    a, b = _operands(a, b, wide=True)
    counts = torch.zeros(4, clips, dtype=torch.int32, device=a.device)
    if clips == 0:
        return counts.long()
    own = torch.empty(clips, dtype=torch.float64, device=a.device)
    slack = torch.full((), tolerance, dtype=torch.float64, device=a.device)
    options = _options(a, a_inverse, strategy)
    tiles = triton.cdiv(clips, options["BLOCK"])
    with torch.cuda.device_of(a):
        for first, programs in ((0, tiles), (1, tiles * (tiles - 1))):
            if programs:
                retrieval_counts_kernel[(programs,)](
                    a, b, a_inverse, b_inverse, own, counts, slack, clips, *_strides(a),
                    *_strides(b), tiles, first, RELATIVE=relative, **options,
                )  # fmt: skip
    counts[1::2] -= counts[::2]
    return counts.long()


def _scattered(
    grad: Tensor, index: Tensor, y: Tensor, y_inverse: Tensor, strategy: str, of_b: bool
) -> Tensor:
    """Gradient by the scaled frames of one side (N, T, D); grad and index (N, M), y the other."""
    clips, (others, frames, width) = grad.shape[0], y.shape
    out = torch.empty(clips, frames, width, dtype=y_inverse.dtype, device=y.device)
    if clips == 0:
        return out
    block = min(256, triton.next_power_of_2(width))
    chunks = triton.cdiv(width, block)
    with torch.cuda.device_of(y):
        frame_similarity_bwd_kernel[(clips * frames * chunks,)](
            grad, index, y, y_inverse, out, others, *grad.stride(), *index.stride(), *_strides(y),
            chunks, D=width, T=frames, BLOCK_M=16, BLOCK_D=block,
            STRATEGY=_STRATEGIES.index(strategy), OF_B=of_b,
            WIDE=y_inverse.dtype == torch.float64, num_warps=4,
        )  # fmt: skip
    return out


def _pooled(x: Tensor, inverse: Tensor) -> Tensor:
    """Means of the scaled frames: (N, D)."""
    means = torch.empty(x.shape[0], x.shape[2], dtype=inverse.dtype, device=x.device)
    step = max(1, _CHUNK // x[:1].numel()) if x.shape[0] else 1
    for part, weight, out in zip(*(y.split(step) for y in (x, inverse, means)), strict=True):
        out.copy_(torch.bmm(weight.unsqueeze(1), part.to(inverse.dtype)).squeeze(1) / x.shape[1])
    return means


def _operands(a: Tensor, b: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Both in one dtype, features side by side. Sums in float64 take no 16-bit operands."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if a.dtype != b.dtype or (wide and dtype.itemsize == 2):
        dtype = torch.promote_types(dtype, torch.float32)
    return _framewise(a.to(dtype)), _framewise(b.to(dtype))


def _framewise(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _options(a: Tensor, inverse: Tensor, strategy: str) -> dict[str, Any]:
    frames, width = a.shape[1:]
    wide = inverse.dtype == torch.float64
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    upcast = (wide and a.dtype != torch.float64) or (interpreted and a.dtype == torch.bfloat16)
    half = not wide and not upcast and a.dtype.itemsize == 2
    padded = triton.next_power_of_2(frames) if strategy == "max" else 1
    return {
        "D": width, "T": frames, "FRAMES": padded, "BLOCK": max(1, 64 // padded),
        "BLOCK_D": 64 if half else 16 if wide else 32, "STRATEGY": _STRATEGIES.index(strategy),
        "WIDE": wide, "UPCAST": upcast, "num_warps": 8 if wide and padded == 1 else 4,
        "num_stages": 3 if half else 2,
    }  # fmt: skip
