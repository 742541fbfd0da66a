"""The head fused with its reconstruction loss in Triton; README.md has the maths.

Rows are masked patches, (K*B*masked); the columns of the head are permuted to the order in which
pixels lie in memory, so that pixels are read as they lie. Products accumulate in float32. Sums over
tiles of columns are merged in their order: no atomics.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tokens.kernel import geometry, patch_offset, patch_start, scale_and_shift
from ..tokens.patches import PatchLayout, patch_layout
from ..tokens.rows import masked_tokens
from .head_lean import wide_product
from .kernel import first_value, pixel_values, standardised
from .reference import EPS

BLOCK_ELEMENTS = 2**24  # gradients by predictions alive at once: 32 MiB in 16 bits, within L2

_EPS = tl.constexpr(EPS)
# Sizes that happen to be 1 or divisible by 16 must not compile another variant.
_SIZES = ["batch", "rows", "begin", "end"]


@triton.jit
def _patch_rows(order_ptr, m, batch, inside, L: tl.constexpr, KEEP: tl.constexpr):
    """Row of x, rank among the masked tokens, sample and token of the m-th masked patch."""
    row, index = m // (L - KEEP), m % (L - KEEP)
    b, view = row % batch, row // batch
    rank = (index + (view + 1) * KEEP) % L
    token = tl.load(order_ptr + b * L + rank, mask=inside, other=0).to(tl.int32)
    return row, index, b, token


@triton.jit
def _predictions(
    x_rows, weight_ptr, bias_ptr, inside, v, P: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x @ weight.T + bias for the columns v; zeros past the last column."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_mask, w_mask = inside[:, None], v[None, :] < P
        if D % BLOCK_D != 0:
            x_mask, w_mask = x_mask & (d[None, :] < D), w_mask & (d[:, None] < D)
        x = tl.load(x_rows[:, None] + d[None, :], mask=x_mask, other=0)
        w = tl.load(weight_ptr + v[None, :] * D + d[:, None], mask=w_mask, other=0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + v, mask=v < P, other=0).to(tl.float32)[None, :]
    return total


@triton.jit
def _tile_pixels(
    source, pixels_mask, v, scale_ptr, shift_ptr, BYTES: tl.constexpr, C: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, GT: tl.constexpr, GH: tl.constexpr,
    GW: tl.constexpr,
):  # fmt: skip
    """Values v, in memory order, of the patches that begin at `source`."""
    c, z, y, x = v // (PT * PH * PW), v // (PH * PW) % PT, v // PW % PH, v % PW
    offset = patch_offset(c, z, y, x, PT, PH, PW, GT, GH, GW)
    return pixel_values(source[:, None], c[None, :], offset[None, :], pixels_mask, scale_ptr,
                        shift_ptr, BYTES, tl.float32)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def head_loss_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, pixels_ptr, scale_ptr, shift_ptr, order_ptr, error_ptr, mean_ptr,
    rstd_ptr, stride_xb, stride_xl, batch, rows,
    L: tl.constexpr, KEEP: tl.constexpr, ONLY_MASKED: tl.constexpr, BYTES: tl.constexpr,
    NORM: tl.constexpr, AUDIO: tl.constexpr, C: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """error[m], the sum of squares, and the statistics of patch m. Grid: cdiv(rows, BLOCK_M)."""
    P: tl.constexpr = C * PT * PH * PW
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    row, index, b, token = _patch_rows(order_ptr, m, batch, inside, L, KEEP)
    x_rows = x_ptr + row * stride_xb + (index if ONLY_MASKED else token.to(tl.int64)) * stride_xl
    source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
    first = first_value(source, scale_ptr, shift_ptr, BYTES, tl.float32)
    # Of the columns so far: mean and squares of the pixels about it, products with the
    # predictions about it, sum and squares of the predictions (without NORM: squared errors).
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    products = tl.zeros((BLOCK_M,), tl.float32)
    predicted = tl.zeros((BLOCK_M,), tl.float32)
    errors = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, P, BLOCK_N):
        v = n + tl.arange(0, BLOCK_N)
        known = inside[:, None] & (v[None, :] < P)
        p = _predictions(x_rows, weight_ptr, bias_ptr, inside, v, P, D, BLOCK_M, BLOCK_N, BLOCK_D,
                         UPCAST)  # fmt: skip
        pixels = _tile_pixels(source, known, v, scale_ptr, shift_ptr, BYTES, C, PT, PH, PW, GT, GH,
                              GW)  # fmt: skip
        if NORM:
            count = tl.minimum(P - n, BLOCK_N).to(tl.float32)
            pixels = tl.where(known, pixels - first[:, None], 0.0)
            own_mean = tl.sum(pixels, axis=1) / count
            pixels = tl.where(known, pixels - own_mean[:, None], 0.0)
            own_predicted = tl.sum(p, axis=1)
            step = own_mean - mean
            merged = mean + step * (count / (n + count))
            squares += tl.sum(pixels * pixels, axis=1) + step * step * (n * count / (n + count))
            products += (mean - merged) * predicted + (own_mean - merged) * own_predicted
            products += tl.sum(p * pixels, axis=1)
            predicted += own_predicted
            mean = merged
            errors += tl.sum(p * p, axis=1)
        else:
            error = p - pixels
            errors += tl.sum(error * error, axis=1)
    if NORM:
        rstd = 1.0 / tl.sqrt(squares / (P - 1) + _EPS)
        errors += rstd * (rstd * squares - 2.0 * products)
        tl.store(mean_ptr + m, mean, mask=inside)
        tl.store(rstd_ptr + m, rstd, mask=inside)
    tl.store(error_ptr + m, errors, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def head_loss_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, pixels_ptr, scale_ptr, shift_ptr, order_ptr, row_weight_ptr,
    mean_ptr, rstd_ptr, dpred_ptr, error_ptr, stride_xb, stride_xl, batch, begin, end,
    L: tl.constexpr, KEEP: tl.constexpr, ONLY_MASKED: tl.constexpr, BYTES: tl.constexpr,
    NORM: tl.constexpr, AUDIO: tl.constexpr, C: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dpred[m - begin] of the patches [begin, end), and the squared errors of one tile of columns.

    Grid: (cdiv(end - begin, BLOCK_M), cdiv(P, BLOCK_N)). error_ptr: (column tiles, end - begin).
    """
    P: tl.constexpr = C * PT * PH * PW
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = begin + i
    inside = m < end
    row, index, b, token = _patch_rows(order_ptr, m, batch, inside, L, KEEP)
    x_rows = x_ptr + row * stride_xb + (index if ONLY_MASKED else token.to(tl.int64)) * stride_xl
    source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
    v = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = inside[:, None] & (v[None, :] < P)
    p = _predictions(x_rows, weight_ptr, bias_ptr, inside, v, P, D, BLOCK_M, BLOCK_N, BLOCK_D,
                     UPCAST)  # fmt: skip
    target = _tile_pixels(source, known, v, scale_ptr, shift_ptr, BYTES, C, PT, PH, PW, GT, GH,
                          GW)  # fmt: skip
    if NORM:
        first = first_value(source, scale_ptr, shift_ptr, BYTES, tl.float32)
        mean = tl.load(mean_ptr + m, mask=inside, other=0)
        rstd = tl.load(rstd_ptr + m, mask=inside, other=0)
        target = (target - first[:, None] - mean[:, None]) * rstd[:, None]
    error = tl.where(known, p - target, 0.0)
    if error_ptr is not None:
        at = tl.program_id(1).to(tl.int64) * (end - begin) + i
        tl.store(error_ptr + at, tl.sum(error * error, axis=1), mask=inside)
    if row_weight_ptr is not None:
        error *= tl.load(row_weight_ptr + row, mask=inside, other=0)[:, None]
    place = dpred_ptr + i[:, None] * P + v[None, :]
    tl.store(place, error.to(dpred_ptr.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def patch_statistics_kernel(
    pixels_ptr, scale_ptr, shift_ptr, order_ptr, mean_ptr, rstd_ptr, batch,
    L: tl.constexpr, KEEP: tl.constexpr, BYTES: tl.constexpr, AUDIO: tl.constexpr,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, GT: tl.constexpr,
    GH: tl.constexpr, GW: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean less first value, and 1 / deviation, of one masked patch. Grid: rows."""
    P: tl.constexpr = C * PT * PH * PW
    m = tl.program_id(0).to(tl.int64)
    _, _, b, token = _patch_rows(order_ptr, m, batch, m >= 0, L, KEEP)
    source = pixels_ptr + patch_start(b, token, AUDIO, C, PT, PH, PW, GT, GH, GW)
    v = tl.arange(0, BLOCK_P)
    c, z, y, x = v // (PT * PH * PW), v // (PH * PW) % PT, v // PW % PH, v % PW
    offset = patch_offset(c, z, y, x, PT, PH, PW, GT, GH, GW)
    values = pixel_values(source, c, offset, v < P, scale_ptr, shift_ptr, BYTES, tl.float32)
    values -= first_value(source, scale_ptr, shift_ptr, BYTES, tl.float32)
    mean, rstd, _ = standardised(values, v, P)
    tl.store(mean_ptr + m, mean)
    tl.store(rstd_ptr + m, rstd)


class _Launch(NamedTuple):
    """Operands as the kernels take them."""

    x: Tensor
    head: tuple[Tensor, Tensor | None]  # weight (P, D') and bias, rows in memory order
    pixels: tuple[Tensor, Tensor | None, Tensor | None, Tensor]  # scale, shift, token_of_rank
    layout: PatchLayout
    len_keep: int
    num_views: int
    norm_pix: bool
    masked_only: bool

    @property
    def patches(self) -> int:
        """Masked patches of all rows."""
        return self.x.shape[0] * (self.layout.num_tokens - self.len_keep)

    @property
    def batch(self) -> int:
        return self.x.shape[0] // self.num_views

    def constants(self) -> tuple[Any, ...]:
        """Compile-time arguments from L to GW."""
        return (
            self.layout.num_tokens, self.len_keep, self.masked_only,
            self.pixels[0].dtype == torch.uint8, self.norm_pix, *geometry(self.layout),
        )  # fmt: skip

    def tiles(self) -> dict[str, int]:
        """Compile-time arguments from D on, and launch options."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        common = {"D": self.x.shape[2], "UPCAST": interpreted and self.x.dtype == torch.bfloat16}
        # 64 columns: with 128 the pixels and predictions of a tile spill.
        if self.x.dtype == torch.float32:
            # 32 rows: Triton 3.6 takes sm_100's tensor cores, in TF32, for 64 of float32.
            sizes = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
        else:
            sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
        return common | sizes


def _to_memory(values: Tensor, layout: PatchLayout) -> Tensor:
    """(P, ...) in target order -> memory order."""
    target_shape = [layout.memory_shape[axis] for axis in layout.memory_to_target]
    order = sorted(range(len(target_shape)), key=layout.memory_to_target.__getitem__)
    rest = range(len(order), len(order) + values.dim() - 1)
    return values.unflatten(0, target_shape).permute(*order, *rest).reshape(values.shape)


def _to_target(values: Tensor, layout: PatchLayout) -> Tensor:
    """(P, ...) in memory order -> target order."""
    order = layout.memory_to_target
    rest = range(len(order), len(order) + values.dim() - 1)
    return values.unflatten(0, layout.memory_shape).permute(*order, *rest).reshape(values.shape)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixels: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    token_of_rank: Tensor,
    rank_of_token: Tensor,
    len_keep: int,
    num_views: int,
    patch: list[int],
    norm_pix: bool,
    masked_only: bool,
) -> _Launch:
    layout = patch_layout(pixels, tuple(patch))
    x = x if x.stride(2) == 1 else x.contiguous()
    head = _to_memory(weight, layout), None if bias is None else _to_memory(bias, layout)
    constants = scale_and_shift(mean, std, torch.float32)
    inputs = (pixels.contiguous(), *constants, token_of_rank.contiguous())
    return _Launch(x, head, inputs, layout, len_keep, num_views, norm_pix, masked_only)


def head_reconstruction_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (K*B,); mean less first value and 1 / deviation of masked patches, (patches, 0 or 1)."""
    own = _launch(*args)
    x, patches, tiles = own.x, own.patches, own.tiles()
    errors = x.new_empty(patches, dtype=torch.float32)
    mean, rstd = (errors.new_empty(patches, int(own.norm_pix)) for _ in range(2))
    if patches:
        with torch.cuda.device_of(x):
            head_loss_fwd_kernel[(triton.cdiv(patches, tiles["BLOCK_M"]),)](
                x, *own.head, *own.pixels, errors, mean, rstd, x.stride(0), x.stride(1), own.batch,
                patches, *own.constants(), **tiles,
            )  # fmt: skip
    return _row_losses(errors, own), mean, rstd


def head_reconstruction_loss_backward(
    row_weight: Tensor, mean: Tensor, rstd: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """row_weight (K*B,) -> dx as x; dweight (P, D') and dbias (P,) in float32."""
    own = _launch(*args)
    return _gradients(own, row_weight.contiguous(), mean.contiguous(), rstd.contiguous(), None)


def head_reconstruction_loss_and_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (K*B,), and the gradients for a row_weight of 1; predictions are formed once."""
    own = _launch(*args)
    errors = own.x.new_empty(own.patches, dtype=torch.float32)
    mean, rstd = (errors.new_empty(own.patches, int(own.norm_pix)) for _ in range(2))
    if own.norm_pix and own.patches:
        length, keep, _, is_bytes, _, *shape = own.constants()
        block = triton.next_power_of_2(own.layout.num_values)
        with torch.cuda.device_of(errors):
            patch_statistics_kernel[(own.patches,)](
                *own.pixels, mean, rstd, own.batch, length, keep, is_bytes, *shape, block,
                num_warps=min(max(block // 256, 1), 8),
            )  # fmt: skip
    gradients = _gradients(own, None, mean, rstd, errors)
    return _row_losses(errors, own), *gradients


def _row_losses(errors: Tensor, own: _Launch) -> Tensor:
    """Squared errors of patches -> (K*B,)."""
    masked = own.layout.num_tokens - own.len_keep
    return errors.view(-1, masked).sum(1) / (masked * own.layout.num_values)


def _gradients(
    own: _Launch, row_weight: Tensor | None, mean: Tensor, rstd: Tensor, errors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Block by block: dpred by the kernel, its products by cuBLAS. Fills `errors` (patches,)."""
    x, (weight, _), tiles = own.x, own.head, own.tiles()
    values, dim = weight.shape
    dweight = weight.new_zeros(values, dim, dtype=torch.float32)
    dbias = dweight.new_zeros(values)
    rows = _Rows(own)
    step = max(1, BLOCK_ELEMENTS // (values * tiles["BLOCK_M"])) * tiles["BLOCK_M"]
    columns = triton.cdiv(values, tiles["BLOCK_N"])
    for begin in range(0, own.patches, step):
        end = min(begin + step, own.patches)
        dpred = x.new_empty(end - begin, values)
        parts = None if errors is None else errors.new_empty(columns, end - begin)
        with torch.cuda.device_of(x):
            head_loss_bwd_kernel[(triton.cdiv(end - begin, tiles["BLOCK_M"]), columns)](
                x, *own.head, *own.pixels, row_weight, mean, rstd, dpred, parts, x.stride(0),
                x.stride(1), own.batch, begin, end, *own.constants(), **tiles,
            )  # fmt: skip
        if errors is not None and parts is not None:
            errors[begin:end] = parts.sum(0)
        dweight += wide_product(dpred.t(), rows.inputs(begin, end))
        dbias += dpred.sum(0, dtype=torch.float32)
        rows.store(dpred, weight, begin, end)
    return rows.dx, _to_target(dweight, own.layout), _to_target(dbias, own.layout)


class _Rows:
    """The rows of x that predict masked patches, some at a time, and where their gradient goes."""

    def __init__(self, own: _Launch) -> None:
        self.x, self.index = own.x, None
        if own.masked_only and own.x.is_contiguous():
            self.dx = torch.empty_like(own.x)
            return
        # Rows of visible tokens get no other gradient than this.
        self.dx = torch.zeros(own.x.shape, dtype=own.x.dtype, device=own.x.device)
        order = own.pixels[3]
        tokens = masked_tokens(order, own.len_keep, own.num_views).flatten(0, 1)
        rows = torch.arange(tokens.shape[0], device=order.device).unsqueeze(1).expand_as(tokens)
        if own.masked_only:
            tokens = torch.arange(tokens.shape[1], device=order.device).expand_as(tokens)
        self.index = rows.flatten(), tokens.flatten()

    def inputs(self, begin: int, end: int) -> Tensor:
        """(end - begin, D')."""
        if self.index is None:
            return self.x.view(-1, self.x.shape[2])[begin:end]
        row, place = self.index
        return self.x[row[begin:end], place[begin:end]]

    def store(self, dpred: Tensor, weight: Tensor, begin: int, end: int) -> None:
        """dx of these rows: dpred (end - begin, P) @ weight (P, D')."""
        if self.index is None:
            torch.mm(dpred, weight, out=self.dx.view(-1, self.dx.shape[2])[begin:end])
            return
        row, place = self.index
        self.dx[row[begin:end], place[begin:end]] = dpred @ weight
