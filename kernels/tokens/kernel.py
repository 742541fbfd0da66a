"""Moving tokens in Triton: rows, patches, decoder sequences; README.md has the designs.

Copies are done on integers of the width of the data, so every dtype passes unchanged. Rows and
batch are run-time arguments; widths, token counts and grids are compile-time. Row offsets are int64
from the program id on. Sums are float32 (float64 for float64) in an order fixed by the shapes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .patches import PatchLayout, patch_layout

BLOCK_ROWS = 8
BLOCK_D = 256
BLOCK_PLACES = 4
SPLITS = 8  # parts of the batch that are summed apart
NUM_WARPS = 4

# Sizes that happen to be 1 or divisible by 16 must not compile another variant.
_SIZES = ["batch", "rows", "rows_per_split"]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=_SIZES)
def gather_rows_fwd_kernel(
    x_ptr, order_ptr, y_ptr, stride_xb, stride_xl, batch, rows,
    L: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[row, slot] = x[b, order[b, view * KEEP + slot]]. Grid: cdiv(rows * KEEP, BLOCK_ROWS)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = i < rows * KEEP
    row, slot = i // KEEP, i % KEEP
    b, view = row % batch, row // batch
    token = tl.load(order_ptr + b * L + view * KEEP + slot, mask=inside, other=0).to(tl.int64)
    source = x_ptr + b * stride_xb + token * stride_xl
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d[None, :] < D)
        values = tl.load(source[:, None] + d[None, :], mask=mask)
        tl.store(y_ptr + i[:, None] * D + d[None, :], values, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def gather_rows_bwd_kernel(
    grad_ptr, order_ptr, dx_ptr, batch,
    L: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, VIEWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row order[b, rank] of dx: a row of grad, or zeros. Grid: cdiv(batch * L, BLOCK_ROWS)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = i < batch * L
    b, rank = i // L, i % L
    token = tl.load(order_ptr + i, mask=inside, other=0).to(tl.int64)
    kept = inside & (rank < VIEWS * KEEP)
    source = grad_ptr + ((rank // KEEP * batch + b) * KEEP + rank % KEEP) * D
    target = dx_ptr + (b * L + token) * D
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inner = d[None, :] < D
        values = tl.load(source[:, None] + d[None, :], mask=kept[:, None] & inner, other=0)
        tl.store(target[:, None] + d[None, :], values, mask=inside[:, None] & inner)


@triton.jit(do_not_specialize=_SIZES)
def assemble_fwd_kernel(
    x_ptr, pos_ptr, filler_ptr, rank_ptr, y_ptr, stride_xr, stride_xt, batch, rows,
    L: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, LENGTH: tl.constexpr,
    START: tl.constexpr, SLOT: tl.constexpr, RELEASED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One segment of L places from START on. Grid: cdiv(rows * L, BLOCK_ROWS)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = i < rows * L
    row, place = i // L, i % L
    view = 0 if RELEASED else row // batch
    rank = tl.load(rank_ptr + row % batch * L + place, mask=inside, other=0).to(tl.int64)
    rank = (rank - view * KEEP + L) % L
    visible = inside & (rank < KEEP)
    masked = inside & (rank >= KEEP)
    source = x_ptr + row * stride_xr + (SLOT + rank) * stride_xt
    table = (START + place) * D
    target = y_ptr + (row * LENGTH + START + place) * D
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inner = d[None, :] < D
        at = table[:, None] + d[None, :]
        x = tl.load(source[:, None] + d[None, :], mask=visible[:, None] & inner, other=0)
        pos = tl.load(pos_ptr + at, mask=visible[:, None] & inner, other=0)
        filler = tl.load(filler_ptr + at, mask=masked[:, None] & inner, other=0)
        y = tl.where(visible[:, None], (x.to(pos.dtype) + pos).to(filler.dtype), filler)
        tl.store(target[:, None] + d[None, :], y, mask=inside[:, None] & inner)


@triton.jit(do_not_specialize=_SIZES)
def assemble_bwd_kernel(
    grad_ptr, rank_ptr, dx_ptr, mask_ptr, pos_ptr, batch, rows, rows_per_split,
    L: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, LENGTH: tl.constexpr,
    VISIBLE: tl.constexpr, START: tl.constexpr, SLOT: tl.constexpr, RELEASED: tl.constexpr,
    SUM_POS: tl.constexpr, SUM: tl.constexpr,
    BLOCK_PLACES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx rows copied, mask tokens and positions summed over a part of the rows.

    Grid: (cdiv(L, BLOCK_PLACES), cdiv(D, BLOCK_D), splits). mask_ptr: (splits, blocks, D);
    pos_ptr: (splits, LENGTH, D).
    """
    place = tl.program_id(0) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    inner = d[None, :] < D
    known = place < L
    of_mask = tl.zeros((BLOCK_PLACES, BLOCK_D), SUM)
    of_pos = tl.zeros((BLOCK_PLACES, BLOCK_D), SUM)
    first = split * rows_per_split
    for row in range(first, tl.minimum(first + rows_per_split, rows)):
        view = 0 if RELEASED else row // batch
        rank = tl.load(rank_ptr + row % batch * L + place, mask=known, other=0).to(tl.int64)
        rank = (rank - view * KEEP + L) % L
        visible = (rank < KEEP) & known
        at = (row * LENGTH + START + place) * D
        grad = tl.load(grad_ptr + at[:, None] + d[None, :], mask=known[:, None] & inner, other=0)
        target = dx_ptr + (row * VISIBLE + SLOT + rank) * D
        tl.store(target[:, None] + d[None, :], grad, mask=visible[:, None] & inner)
        of_mask += tl.where(visible[:, None], 0.0, grad.to(SUM))
        if SUM_POS:
            of_pos += grad.to(SUM)
    blocks: tl.constexpr = (L + BLOCK_PLACES - 1) // BLOCK_PLACES
    partial = mask_ptr + (split * blocks + tl.program_id(0)) * D
    tl.store(partial + d, tl.sum(of_mask, axis=0), mask=d < D)
    if SUM_POS:
        at = (split * LENGTH + START + place) * D
        tl.store(pos_ptr + at[:, None] + d[None, :], of_pos, mask=known[:, None] & inner)


@triton.jit
def patch_start(b, token, AUDIO: tl.constexpr, C: tl.constexpr, PT: tl.constexpr,
                PH: tl.constexpr, PW: tl.constexpr, GT: tl.constexpr, GH: tl.constexpr,
                GW: tl.constexpr):  # fmt: skip
    """Offset of the first value of a patch; audio is (GT, GH, GW) = (1, time, frequency)."""
    if AUDIO:
        t, y, x = token * 0, token % GH, token // GH
    else:
        t, y, x = token // (GH * GW), token // GW % GH, token % GW
    line = (t * PT * GH + y) * PH
    return b * (C * GT * PT * GH * PH * GW * PW) + line * (GW * PW) + x * PW


@triton.jit
def patch_offset(c, z, y, x, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
                 GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr):  # fmt: skip
    """Offset of the value (c, z, y, x) of a patch from its first."""
    return ((c * (GT * PT) + z) * (GH * PH) + y) * (GW * PW) + x


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """values.to(DTYPE) by way of float32: not every back end goes from float64 to bfloat16."""
    if tl.float64 == DTYPE:
        return values.to(DTYPE)
    return values.to(tl.float32).to(DTYPE)


@triton.jit(do_not_specialize=_SIZES)
def visible_patches_fwd_kernel(
    pixels_ptr, scale_ptr, shift_ptr, order_ptr, out_ptr, batch, rows,
    L: tl.constexpr, KEEP: tl.constexpr, BYTES: tl.constexpr, AUDIO: tl.constexpr,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Patches in memory order. Grid: cdiv(rows * KEEP, BLOCK_ROWS)."""
    P: tl.constexpr = C * PT * PH * PW
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = i < rows * KEEP
    b, view = i // KEEP % batch, i // KEEP // batch
    token = tl.load(order_ptr + b * L + view * KEEP + i % KEEP, mask=inside, other=0).to(tl.int32)
    source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
    for start in tl.static_range(0, P, BLOCK_D):
        v = start + tl.arange(0, BLOCK_D)
        c, z, y, x = v // (PT * PH * PW), v // (PH * PW) % PT, v // PW % PH, v % PW
        offset = patch_offset(c, z, y, x, PT, PH, PW, GT, GH, GW)
        mask = inside[:, None] & (v[None, :] < P)
        values = tl.load(source[:, None] + offset[None, :], mask=mask)
        if BYTES:
            scale = tl.load(scale_ptr + c, mask=v < P, other=0)
            shift = tl.load(shift_ptr + c, mask=v < P, other=0)
            values = values.to(scale.dtype) * scale[None, :] - shift[None, :]
        values = narrow(values, out_ptr.dtype.element_ty)
        tl.store(out_ptr + i[:, None] * P + v[None, :], values, mask=mask)


def gather_rows(x: Tensor, token_of_rank: Tensor, len_keep: int, num_views: int) -> Tensor:
    """x (B, L, D), any strides between rows -> (K*B, keep, D)."""
    batch, num_tokens, dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = x.new_empty(num_views * batch, len_keep, dim)
    if y.numel() == 0:
        return y
    bits = _BITS[x.element_size()]
    with torch.cuda.device_of(x):
        gather_rows_fwd_kernel[(triton.cdiv(num_views * batch * len_keep, BLOCK_ROWS),)](
            x.view(bits), token_of_rank.contiguous(), y.view(bits), x.stride(0), x.stride(1),
            batch, num_views * batch, num_tokens, dim, len_keep, BLOCK_ROWS, BLOCK_D,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


def gather_rows_backward(
    grad: Tensor, token_of_rank: Tensor, len_keep: int, num_views: int
) -> Tensor:
    """grad (K*B, keep, D) -> (B, L, D)."""
    batch, num_tokens = token_of_rank.shape
    dx = grad.new_empty(batch, num_tokens, grad.shape[2])
    if grad.numel() == 0:
        return dx.zero_()
    bits = _BITS[grad.element_size()]
    with torch.cuda.device_of(grad):
        gather_rows_bwd_kernel[(triton.cdiv(batch * num_tokens, BLOCK_ROWS),)](
            grad.contiguous().view(bits), token_of_rank.contiguous(), dx.view(bits), batch,
            num_tokens, grad.shape[2], len_keep, num_views, BLOCK_ROWS, BLOCK_D,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx


def geometry(layout: PatchLayout) -> tuple[int, ...]:
    """AUDIO, C, PT, PH, PW, GT, GH, GW of the kernels, in memory order."""
    patch = layout.patch[::-1] if layout.audio else layout.patch
    grid = layout.grid[::-1] if layout.audio else layout.grid
    missing = (1,) * (3 - len(patch))
    return (int(layout.audio), layout.channels, *missing, *patch, *missing, *grid)


def scale_and_shift(
    mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(C,) each: normalised = byte * scale - shift."""
    if mean is None or std is None:
        return None, None
    return (1 / (255 * std.to(dtype))), (mean.to(dtype) / std.to(dtype))


def visible_patches(
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    token_of_rank: Tensor,
    len_keep: int,
    num_views: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """pixels -> (K*B*keep, P) in memory order."""
    layout = patch_layout(pixels, tuple(patch))
    rows = num_views * pixels.shape[0]
    out = pixels.new_empty(rows * len_keep, layout.num_values, dtype=dtype)
    if out.numel() == 0:
        return out
    scale, shift = scale_and_shift(mean, std, torch.promote_types(dtype, torch.float32))
    with torch.cuda.device_of(pixels):
        visible_patches_fwd_kernel[(triton.cdiv(rows * len_keep, BLOCK_ROWS),)](
            pixels.contiguous(), scale, shift, token_of_rank.contiguous(), out, pixels.shape[0],
            rows, layout.num_tokens, len_keep, pixels.dtype == torch.uint8, *geometry(layout),
            BLOCK_ROWS, BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def assemble(
    x: Tensor,
    pos: Tensor,
    filler: Tensor,
    rank_of_token: list[Tensor],
    len_keep: list[int],
    num_views: int,
    released: bool,
) -> Tensor:
    """x (K*B, sum of keeps, D), pos and filler (L, D) -> (K*B, L, D); one launch per segment."""
    rows, _, dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    pos, filler = pos.contiguous(), filler.contiguous()
    length = pos.shape[0]
    y = x.new_empty(rows, length, dim)
    if y.numel() == 0:
        return y
    start = slot = 0
    with torch.cuda.device_of(x):
        for plan, keep in zip(rank_of_token, len_keep, strict=True):
            tokens = plan.shape[1]
            assemble_fwd_kernel[(triton.cdiv(rows * tokens, BLOCK_ROWS),)](
                x, pos, filler, plan.contiguous(), y, x.stride(0), x.stride(1),
                rows // num_views, rows, tokens, dim, keep, length, start, slot, released,
                BLOCK_ROWS, BLOCK_D, num_warps=NUM_WARPS,
            )  # fmt: skip
            start, slot = start + tokens, slot + keep
    return y


def assemble_backward(
    grad: Tensor, rank_of_token: list[Tensor], len_keep: list[int], num_views: int, released: bool
) -> tuple[Tensor, Tensor]:
    """grad (K*B, L, D) -> dx (K*B, sum of keeps, D), dmask (D,)."""
    dx, dmask, _ = _split(grad, rank_of_token, len_keep, num_views, released, False)
    return dx, dmask


def assemble_backward_pos(
    grad: Tensor, rank_of_token: list[Tensor], len_keep: list[int], num_views: int, released: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """And dpos (L, D)."""
    dx, dmask, dpos = _split(grad, rank_of_token, len_keep, num_views, released, True)
    return dx, dmask, dpos.sum(0)


def _split(
    grad: Tensor,
    rank_of_token: list[Tensor],
    len_keep: list[int],
    num_views: int,
    released: bool,
    sum_pos: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dmask and the parts of dpos, (splits, L, D)."""
    rows, length, dim = grad.shape
    grad = grad.contiguous()
    visible = sum(len_keep)
    double = grad.dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    dx = grad.new_empty(rows, visible, dim)
    blocks = [triton.cdiv(plan.shape[1], BLOCK_PLACES) for plan in rank_of_token]
    masks = [grad.new_empty(SPLITS * count, dim, dtype=wide) for count in blocks]
    dpos = grad.new_empty(SPLITS if sum_pos else 0, length, dim, dtype=wide)
    start = slot = 0
    with torch.cuda.device_of(grad):
        for plan, keep, mask, count in zip(rank_of_token, len_keep, masks, blocks, strict=True):
            tokens = plan.shape[1]
            if dim:
                assemble_bwd_kernel[(count, triton.cdiv(dim, BLOCK_D), SPLITS)](
                    grad, plan.contiguous(), dx, mask, dpos, rows // num_views, rows,
                    triton.cdiv(rows, SPLITS), tokens, dim, keep, length, visible, start, slot,
                    released, sum_pos, tl.float64 if double else tl.float32, BLOCK_PLACES, BLOCK_D,
                    num_warps=NUM_WARPS,
                )  # fmt: skip
            start, slot = start + tokens, slot + keep
    return dx, torch.cat(masks).sum(0), dpos
