"""The DINO loss in Triton: statistics of the rows of logits, then blocks of them.

Rows of logits are wide (8192 to 65536) and samples few, so a program of the second and of the
backward kernel takes one block of the logits of one sample: the teachers' probabilities there in
registers, every student crop weighed against their sum. The README has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype
from .reference import pair_count

_ROW_BLOCK = 4096  # of the statistics
_BLOCK = 1024  # of the loss and the gradient


@triton.jit
def _logits(z_ptr, place, columns, D: tl.constexpr, WIDE: tl.constexpr):
    """A block in float32 (float64 if WIDE), zeros past D."""
    z = tl.load(z_ptr + place + columns, mask=columns < D, other=0)
    return z.to(tl.float64) if WIDE else z.to(tl.float32)


@triton.jit
def _wide(crop):
    """A crop's number as int64; a stride of 1 is a constant to Triton and has no `.to`."""
    return tl.full((), crop, tl.int64)


@triton.jit
def dino_statistics_kernel(
    z_ptr, center_ptr, top_ptr, total_ptr, stride_crop, stride_b, batch, scale: tl.float64,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Of each row z = scale * (logits - center): the maximum and the sum of exp(z - maximum).
    Grid: crops * batch."""
    row = tl.program_id(0).to(tl.int64)
    place = row // batch * stride_crop + row % batch * stride_b
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    factor = tl.full((1,), scale, dtype)
    top = tl.full((1,), -float("inf"), dtype)
    total = tl.zeros((1,), dtype)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(z_ptr, place, columns, D, WIDE)
        if CENTRED:
            z -= _logits(center_ptr, 0, columns, D, WIDE)
        z = tl.where(columns < D, z * factor, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=0, keep_dims=True))
        here = tl.sum(tl.exp(z - higher), axis=0, keep_dims=True)
        total = total * tl.exp(top - higher) + here
        top = higher
    one = tl.arange(0, 1)
    tl.store(top_ptr + row + one, top)
    tl.store(total_ptr + row + one, total)


@triton.jit
def _targets(
    teacher_ptr, center_ptr, top_ptr, total_ptr, b, columns, stride_tc, stride_tb, batch, factor,
    D: tl.constexpr, WIDE: tl.constexpr, TEACHERS: tl.constexpr,
):  # fmt: skip
    """(each teacher's probabilities, their sum) of a block; zeros past D."""
    center = _logits(center_ptr, 0, columns, D, WIDE)
    each = ()  # type: tuple
    summed = tl.zeros_like(center)
    for t in tl.static_range(TEACHERS):
        z = _logits(teacher_ptr, _wide(t) * stride_tc + b * stride_tb, columns, D, WIDE)
        top = tl.load(top_ptr + t * batch + b)
        total = tl.load(total_ptr + t * batch + b)
        q = tl.where(columns < D, tl.exp((z - center) * factor - top) / total, 0.0)
        each, summed = each + (q,), summed + q
    return each, summed


@triton.jit
def dino_fwd_kernel(
    teacher_ptr, student_ptr, center_ptr, top_ptr, total_ptr, partial_ptr, stride_tc, stride_tb,
    stride_sc, stride_sb, batch, parts, teacher_scale: tl.float64, student_scale: tl.float64,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, TEACHERS: tl.constexpr,
    STUDENTS: tl.constexpr, MATCHED: tl.constexpr,
):  # fmt: skip
    """What one block of logits adds to the sum of -q log p over the pairs. Grid: (B, parts)."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    each, summed = _targets(
        teacher_ptr, center_ptr, top_ptr, total_ptr, b, columns, stride_tc, stride_tb, batch,
        tl.full((1,), teacher_scale, dtype), D, WIDE, TEACHERS,
    )  # fmt: skip
    factor = tl.full((1,), student_scale, dtype)
    terms = tl.zeros_like(summed)
    for s in tl.static_range(MATCHED):
        z = _logits(student_ptr, _wide(s) * stride_sc + b * stride_sb, columns, D, WIDE)
        row = (TEACHERS + s) * batch + b
        log_p = z * factor - tl.load(top_ptr + row) - tl.log(tl.load(total_ptr + row))
        terms += (summed - each[s]) * log_p
    for s in range(MATCHED, STUDENTS):
        z = _logits(student_ptr, _wide(s) * stride_sc + b * stride_sb, columns, D, WIDE)
        row = (TEACHERS + s) * batch + b
        log_p = z * factor - tl.load(top_ptr + row) - tl.log(tl.load(total_ptr + row))
        terms += summed * log_p
    tl.store(partial_ptr + b * parts + tl.program_id(1), -tl.sum(terms))


@triton.jit
def _student_grad(
    grad_student_ptr, student_ptr, top_ptr, total_ptr, targets, s, b, columns, count, stride_sc,
    stride_sb, batch, factor, weight, D: tl.constexpr, WIDE: tl.constexpr, TEACHERS: tl.constexpr,
):  # fmt: skip
    """Writes weight * (count * p - targets) of one student crop's block."""
    z = _logits(student_ptr, _wide(s) * stride_sc + b * stride_sb, columns, D, WIDE)
    row = (TEACHERS + s) * batch + b
    p = tl.exp(z * factor - tl.load(top_ptr + row)) / tl.load(total_ptr + row)
    grad = weight * (count * p - targets)
    place = (_wide(s) * batch + b) * D + columns
    tl.store(grad_student_ptr + place, grad.to(grad_student_ptr.dtype.element_ty),
             mask=columns < D)  # fmt: skip


@triton.jit
def dino_bwd_kernel(
    grad_ptr, teacher_ptr, student_ptr, center_ptr, top_ptr, total_ptr, grad_student_ptr,
    stride_grad, stride_tc, stride_tb, stride_sc, stride_sb, batch,
    teacher_scale: tl.float64, student_scale: tl.float64, PAIRS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, TEACHERS: tl.constexpr,
    STUDENTS: tl.constexpr, MATCHED: tl.constexpr,
):  # fmt: skip
    """Gradient by the students' logits, (S, B, D) contiguous. Grid: (B, parts)."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    each, summed = _targets(
        teacher_ptr, center_ptr, top_ptr, total_ptr, b, columns, stride_tc, stride_tb, batch,
        tl.full((1,), teacher_scale, dtype), D, WIDE, TEACHERS,
    )  # fmt: skip
    factor = tl.full((1,), student_scale, dtype)
    weight = tl.load(grad_ptr + b * stride_grad) * factor / PAIRS
    for s in tl.static_range(MATCHED):
        _student_grad(
            grad_student_ptr, student_ptr, top_ptr, total_ptr, summed - each[s], s, b, columns,
            TEACHERS - 1, stride_sc, stride_sb, batch, factor, weight, D, WIDE, TEACHERS,
        )  # fmt: skip
    for s in range(MATCHED, STUDENTS):
        _student_grad(
            grad_student_ptr, student_ptr, top_ptr, total_ptr, summed, s, b, columns, TEACHERS,
            stride_sc, stride_sb, batch, factor, weight, D, WIDE, TEACHERS,
        )  # fmt: skip


def dino_rows(
    teacher: Tensor, student: Tensor, center: Tensor, teacher_temperature: float,
    student_temperature: float, exclude_matched: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """teacher (T, B, D), student (S, B, D), center (D,) -> (B,) and statistics (2, T + S, B)."""
    teacher, student, center = _rowwise(teacher), _rowwise(student), center.contiguous()
    (teachers, batch, width), students = teacher.shape, student.shape[0]
    dtype = compute_dtype(teacher, student, center)
    statistics = torch.empty(2, teachers + students, batch, dtype=dtype, device=student.device)
    if batch == 0:
        return torch.empty(0, dtype=dtype, device=student.device), statistics
    block = min(_ROW_BLOCK, triton.next_power_of_2(width))
    parts = triton.cdiv(width, _block(width))
    partial = torch.empty(batch, parts, dtype=dtype, device=student.device)
    tops, totals = statistics
    with torch.cuda.device_of(student):
        for z, first, temperature in (
            (teacher, 0, teacher_temperature), (student, teachers, student_temperature)
        ):  # fmt: skip
            dino_statistics_kernel[(len(z) * batch,)](
                z, center, tops[first:], totals[first:], z.stride(0), z.stride(1), batch,
                1 / temperature, D=width, BLOCK=block, WIDE=dtype == torch.float64,
                CENTRED=z is teacher, num_warps=min(8, max(1, block // 256)),
            )  # fmt: skip
        dino_fwd_kernel[(batch, parts)](
            teacher, student, center, tops, totals, partial, *_strides(teacher, student), batch,
            parts, 1 / teacher_temperature, 1 / student_temperature,
            **_constants(teacher, student, dtype, exclude_matched),
        )  # fmt: skip
    total = partial.sum(dim=1, dtype=torch.float64)
    return (total / pair_count(teachers, students, exclude_matched)).to(dtype), statistics


def dino_rows_grad(
    grad: Tensor, teacher: Tensor, student: Tensor, center: Tensor, statistics: Tensor,
    teacher_temperature: float, student_temperature: float, exclude_matched: bool,
) -> Tensor:  # fmt: skip
    """grad (B,) -> gradient by the student's logits (S, B, D), in their dtype."""
    teacher, student, center = _rowwise(teacher), _rowwise(student), center.contiguous()
    (teachers, batch, width), students = teacher.shape, student.shape[0]
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if batch == 0:
        return out
    tops, totals = statistics.contiguous()
    with torch.cuda.device_of(student):
        dino_bwd_kernel[(batch, triton.cdiv(width, _block(width)))](
            grad, teacher, student, center, tops, totals, out, grad.stride(0),
            *_strides(teacher, student), batch, 1 / teacher_temperature, 1 / student_temperature,
            PAIRS=pair_count(teachers, students, exclude_matched),
            **_constants(teacher, student, statistics.dtype, exclude_matched),
        )  # fmt: skip
    return out


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(teacher: Tensor, student: Tensor) -> tuple[int, ...]:
    return *teacher.stride()[:2], *student.stride()[:2]


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


def _constants(
    teacher: Tensor, student: Tensor, dtype: torch.dtype, exclude_matched: bool
) -> dict[str, int | bool]:
    teachers, width, students = teacher.shape[0], teacher.shape[2], student.shape[0]
    block = _block(width)
    return {
        "D": width, "BLOCK": block, "WIDE": dtype == torch.float64, "TEACHERS": teachers,
        "STUDENTS": students, "MATCHED": min(teachers, students) if exclude_matched else 0,
        "num_warps": max(1, block // 256),
    }  # fmt: skip
