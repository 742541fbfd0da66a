"""Max-pooled logits in Triton: tiles of whole maps, of which only the best cells are written.

The forward kernel multiplies a block of vectors with every cell of one or several maps and keeps
each map's largest product and its cell. Both backward kernels build the sparse matrix of the
logits' gradient (one cell per pair) tile by tile in registers and multiply it on tensor cores.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .max_pooled_reference import INDEX

PROGRAMS = 256  # enough for a GPU: the sum over maps is split that far


@triton.jit
def max_pooled_fwd_kernel(
    maps_ptr, vectors_ptr, scale_ptr, logits_ptr, cells_ptr, N, M, tiles_m,
    P: tl.constexpr, D: tl.constexpr, IMAGES: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Largest product and its cell for IMAGES maps x BLOCK_M vectors. Grid: tiles, vectors first.

    The columns of the tile are BLOCK_P cells of each map; a map of more cells is walked.
    """
    pid = tl.program_id(0)
    first = (pid // tiles_m) * IMAGES
    rows = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, IMAGES * BLOCK_P)
    image = first + column // BLOCK_P
    vectors = vectors_ptr + rows.to(tl.int64)[:, None] * D
    best = tl.full((BLOCK_M, IMAGES), -float("inf"), tl.float32)
    cell = tl.zeros((BLOCK_M, IMAGES), tl.int32)
    for start in range(0, P, BLOCK_P):
        p = start + column % BLOCK_P
        inside = (image < N) & (p < P)
        maps = maps_ptr + (image.to(tl.int64) * P + p)[None, :] * D
        total = tl.zeros((BLOCK_M, IMAGES * BLOCK_P), tl.float32)
        for left in range(0, D, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            x_mask, y_mask = rows[:, None] < M, inside[None, :]
            if D % BLOCK_D != 0:
                x_mask, y_mask = x_mask & (d[None, :] < D), y_mask & (d[:, None] < D)
            x = tl.load(vectors + d[None, :], mask=x_mask, other=0)
            y = tl.load(maps + d[:, None], mask=y_mask, other=0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(x, y, total, input_precision="ieee")
        total = tl.where(total != total, float("inf"), total)  # no maximum passes over a NaN then
        total = tl.where(inside[None, :], total, -float("inf"))
        total = tl.reshape(total, (BLOCK_M, IMAGES, BLOCK_P))
        top = tl.max(total, axis=2)
        p = start + tl.arange(0, BLOCK_P)
        at = tl.min(tl.where(total == top[:, :, None], p[None, None, :], P), axis=2)
        cell = tl.where(top > best, at, cell)
        best = tl.maximum(top, best)
    best = tl.where(best == float("inf"), float("nan"), best) * tl.load(scale_ptr)
    image = first + tl.arange(0, IMAGES)
    at = image.to(tl.int64)[None, :] * M + rows[:, None]
    inside = (image[None, :] < N) & (rows[:, None] < M)
    tl.store(logits_ptr + at, best, mask=inside)
    tl.store(cells_ptr + at, cell.to(cells_ptr.dtype.element_ty), mask=inside)


@triton.jit
def max_pooled_maps_bwd_kernel(
    maps_ptr, inverse_ptr, vectors_ptr, scale_ptr, unit_ptr, grad_ptr, logits_ptr, cells_ptr,
    by_maps_ptr, M, tiles_p, tiles_d,
    P: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_P cells of one map, BLOCK_D wide. Grid: maps x cell tiles x width tiles."""
    pid = tl.program_id(0)
    image = (pid // (tiles_p * tiles_d)).to(tl.int64)
    p = pid // tiles_d % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    d = pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        at = image * M + m
        grad = tl.load(grad_ptr + at, mask=m < M, other=0)
        cell = tl.load(cells_ptr + at, mask=m < M, other=0).to(tl.int32)
        spread = tl.where(cell[None, :] == p[:, None], grad[None, :], 0.0)
        spread = spread.to(vectors_ptr.dtype.element_ty)
        if NORMALIZE:
            logit = tl.load(logits_ptr + at, mask=m < M, other=0)
            along += spread.to(tl.float32) * logit[None, :]
        mask = m[:, None] < M
        if D % BLOCK_D != 0:
            mask = mask & (d[None, :] < D)
        y = tl.load(vectors_ptr + m.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0)
        if UPCAST:
            spread, y = spread.to(tl.float32), y.to(tl.float32)
        total = tl.dot(spread, y, total, input_precision="ieee")
    unit = tl.load(unit_ptr)
    total = total * (tl.load(scale_ptr) * unit)
    row = image * P + p
    at = row[:, None] * D + d[None, :]
    mask = p[:, None] < P
    if D % BLOCK_D != 0:
        mask = mask & (d[None, :] < D)
    if NORMALIZE:
        # <cell, gradient> is the sum of gradient * logit over the vectors that chose the cell.
        x = tl.load(maps_ptr + at, mask=mask, other=0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=p < P, other=0)
        total = (total - x * (tl.sum(along, axis=1) * unit)[:, None]) * inverse[:, None]
    tl.store(by_maps_ptr + at, total.to(by_maps_ptr.dtype.element_ty), mask=mask)


@triton.jit
def max_pooled_vectors_bwd_kernel(
    maps_ptr, scale_ptr, unit_ptr, grad_ptr, cells_ptr, parts_ptr, N, M, tiles_m, tiles_d, share,
    P: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M vectors, BLOCK_D wide, over `share` maps.

    Grid: shares x vector tiles x width tiles; parts is (shares, M, D).
    """
    pid = tl.program_id(0)
    part = (pid // (tiles_m * tiles_d)).to(tl.int64)
    rows = pid // tiles_d % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for image in range(part * share, tl.minimum((part + 1) * share, N)):
        at = tl.cast(image, tl.int64) * M + rows
        grad = tl.load(grad_ptr + at, mask=rows < M, other=0)
        cell = tl.load(cells_ptr + at, mask=rows < M, other=0).to(tl.int32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            spread = tl.where(cell[:, None] == p[None, :], grad[:, None], 0.0)
            spread = spread.to(maps_ptr.dtype.element_ty)
            row = tl.cast(image, tl.int64) * P + p
            mask = p[:, None] < P
            if D % BLOCK_D != 0:
                mask = mask & (d[None, :] < D)
            y = tl.load(maps_ptr + row[:, None] * D + d[None, :], mask=mask, other=0)
            if UPCAST:
                spread, y = spread.to(tl.float32), y.to(tl.float32)
            total = tl.dot(spread, y, total, input_precision="ieee")
    total = total * (tl.load(scale_ptr) * tl.load(unit_ptr))
    mask = rows[:, None] < M
    if D % BLOCK_D != 0:
        mask = mask & (d[None, :] < D)
    at = (part * M + rows)[:, None] * D + d[None, :]
    tl.store(parts_ptr + at, total, mask=mask)


def scores(maps: Tensor, inverse: Tensor, vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and cells (N, M) of unit maps (N, P, D), which `inverse` is not needed for."""
    maps, vectors = maps.contiguous(), vectors.contiguous()
    (n, cells, width), m = maps.shape, vectors.shape[0]
    logits = torch.empty(n, m, dtype=torch.float32, device=maps.device)
    index = torch.empty(n, m, dtype=INDEX, device=maps.device)
    half = maps.dtype != torch.float32
    block_p = min(256 if half else 64, max(16, triton.next_power_of_2(cells)))
    images = max(1, (128 if half else 64) // block_p)
    options = {"BLOCK_M": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    if not half:
        options = {"BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    tiles_m = triton.cdiv(m, options["BLOCK_M"])
    with torch.cuda.device_of(maps):
        max_pooled_fwd_kernel[(tiles_m * triton.cdiv(n, images),)](
            maps, vectors, scale, logits, index, n, m, tiles_m, P=cells, D=width, IMAGES=images,
            BLOCK_P=block_p, UPCAST=_upcast(maps), **options,
        )  # fmt: skip
    return logits, index


def gradient_by_maps(
    maps: Tensor,
    inverse: Tensor,
    vectors: Tensor,
    scale: Tensor,
    unit: Tensor,
    grad: Tensor,
    logits: Tensor,
    cells: Tensor,
    normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient (N, P, D), in `dtype`, by the rows that `maps` are the unit rows of."""
    maps, vectors = maps.contiguous(), vectors.contiguous()
    (n, count, width), m = maps.shape, vectors.shape[0]
    by_maps = torch.empty(maps.shape, dtype=dtype, device=maps.device)
    options = _gradient_options(maps, count)
    tiles_p, tiles_d = (
        triton.cdiv(size, options[block])
        for size, block in ((count, "BLOCK_P"), (width, "BLOCK_D"))
    )
    pairs = (x.contiguous() for x in (grad, logits, cells))
    with torch.cuda.device_of(maps):
        max_pooled_maps_bwd_kernel[(n * tiles_p * tiles_d,)](
            maps, inverse.contiguous(), vectors, scale, unit, *pairs, by_maps, m, tiles_p, tiles_d,
            P=count, D=width, NORMALIZE=normalize, UPCAST=_upcast(maps), **options,
        )  # fmt: skip
    return by_maps


def gradient_by_vectors(
    maps: Tensor,
    inverse: Tensor,
    vectors: Tensor,
    scale: Tensor,
    unit: Tensor,
    grad: Tensor,
    cells: Tensor,
) -> Tensor:
    """Gradient by the vectors (M, D) in float32, of which `inverse` holds nothing."""
    maps = maps.contiguous()
    (n, count, width), m = maps.shape, vectors.shape[0]
    options = _gradient_options(maps, count)
    tiles_m, tiles_d = triton.cdiv(m, options["BLOCK_M"]), triton.cdiv(width, options["BLOCK_D"])
    share = max(8, triton.cdiv(n, max(1, PROGRAMS // (tiles_m * tiles_d))))
    shares = triton.cdiv(n, share)
    parts = torch.empty(shares, m, width, dtype=torch.float32, device=maps.device)
    with torch.cuda.device_of(maps):
        max_pooled_vectors_bwd_kernel[(shares * tiles_m * tiles_d,)](
            maps, scale, unit, grad.contiguous(), cells.contiguous(), parts, n, m, tiles_m,
            tiles_d, share, P=count, D=width, UPCAST=_upcast(maps), **options,
        )  # fmt: skip
    return parts.sum(0)


def _gradient_options(maps: Tensor, cells: int) -> dict[str, int]:
    if maps.dtype == torch.float32:
        sizes = {"BLOCK_P": 32, "BLOCK_M": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}
    else:
        sizes = {"BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3}
    return sizes | {"BLOCK_P": min(sizes["BLOCK_P"], max(16, triton.next_power_of_2(cells)))}


def _upcast(maps: Tensor) -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and maps.dtype == torch.bfloat16
