"""The public DINO loss and the update of its centre: argument checks, autograd, registration."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import (
    check_dtype,
    check_ndim,
    check_number,
    check_shape,
    compute_dtype,
    register_op,
    resolve,
)
from .library import FLOATS, define_fused
from .reference import dino_rows, pair_count

register_op("dino_loss", impls=("cpp", "triton", "torch"))
register_op("update_center", impls=("torch",))


def dino_loss(
    teacher: Tensor,
    student: Tensor,
    center: Tensor,
    *,
    teacher_temperature: float,
    student_temperature: float = 0.1,
    exclude_matched: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of every student crop against every teacher crop (DINO, arXiv 2104.14294).

    With q_t = softmax((teacher_t - center) / teacher_temperature) and p_s = softmax(student_s /
    student_temperature), the mean of -sum_k q_t log p_s over the crop pairs (t, s). XKD
    (arXiv 2211.13929) takes it across modalities: one teacher crop, all student crops.

    teacher: (T, B, D), or (B, D) for one crop; student: (S, B, D) or (B, D). Logits of the same B
        samples; float64, float32, bfloat16 or float16, and any D.
    center: (D,) or (1, D), see `update_center`.
    teacher_temperature, student_temperature: positive. XKD: 0.1 for a video and 0.07 for an audio
        teacher; DINO: 0.04 to 0.07; both 0.1 for the student.
    exclude_matched: leave out the pairs of equal index, crops that both networks saw (DINO); XKD
        counts every pair.
    reduction: "mean" over the batch, or "none" for (B,); both are means over the pairs.
    impl: "auto", "torch", "cpp" or "triton"; the last two are differentiable once.

    Returns a float32 (float64 if an input is float64) scalar or (B,), in nats; 0 for an empty
    batch. Gradients go to the student only. Deterministic. Errors are ValueErrors that name the
    argument.
    """
    _check_logits(teacher, student, center)
    teacher = teacher.unsqueeze(0) if teacher.dim() == 2 else teacher
    student = student.unsqueeze(0) if student.dim() == 2 else student
    _check_options(teacher, student, teacher_temperature, student_temperature, reduction)
    if pair_count(len(teacher), len(student), exclude_matched) == 0:
        raise ValueError(
            f"exclude_matched=True leaves no pair of {len(teacher)} teacher and {len(student)} "
            "student crops"
        )
    impl = resolve("dino_loss", impl, student.device.type)
    center = center.detach().reshape(-1)
    options = (float(teacher_temperature), float(student_temperature), bool(exclude_matched))
    if impl == "torch":
        rows = _rows(teacher.detach(), student, center, *options)
    else:
        rows = _FusedRows.apply(teacher.detach(), student, center, options, impl)
    return rows.sum() / max(1, rows.shape[0]) if reduction == "mean" else rows


def update_center(
    center: Tensor,
    teacher: Tensor,
    *,
    momentum: float = 0.9,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """momentum * center + (1 - momentum) * mean of the teacher's logits, as a new tensor.

    center: (D,) or (1, D). teacher: (T, B, D) or (B, D), before centring; call this after the
    loss. group: process group whose logits count together (each process gives its own B; the
    number of rows is summed, too); None: this process alone.

    Returns the shape and dtype of `center`; the mean is taken in float32 or better and has no
    gradient. Without rows anywhere the centre stays. Errors are ValueErrors that name the argument.
    """
    _check_center(center, "teacher", teacher)
    check_number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
    resolve("update_center", impl, teacher.device.type)
    rows = teacher.detach().flatten(0, -2)
    dtype = compute_dtype(center, teacher)
    old = center.detach().to(dtype)
    if group is not None:
        mean = _mean_over_processes(rows, old.flatten(), group)
    elif rows.shape[0] == 0:
        return center.detach().clone()
    else:
        mean = rows.mean(dim=0, dtype=dtype)
    return torch.lerp(mean.view(old.shape), old, momentum).to(center.dtype)


def _mean_over_processes(rows: Tensor, fallback: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean of the rows of all processes, whose numbers travel with the sums: one message."""
    sums = fallback.new_empty(fallback.shape[0] + 1)
    sums[:-1] = rows.sum(dim=0, dtype=sums.dtype)
    sums[-1] = rows.shape[0]
    dist.all_reduce(sums, group=group)
    return torch.where(sums[-1] > 0, sums[:-1] / sums[-1], fallback)


def _check_center(center: Tensor, name: str, logits: Tensor) -> None:
    check_ndim(name, logits, (2, 3), "(crops, B, D) or (B, D)")
    check_dtype(name, logits, FLOATS)
    if logits.shape[-1] == 0 or (logits.dim() == 3 and logits.shape[0] == 0):
        raise ValueError(f"{name} has no crops or no logits: shape {tuple(logits.shape)}")
    check_ndim("center", center, (1, 2), "(D,) or (1, D)")
    check_shape("center", center, (*(1,) * (center.dim() - 1), logits.shape[-1]), "(D,) or (1, D)")
    check_dtype("center", center, FLOATS)
    if center.device != logits.device:
        raise ValueError(f"center is on {center.device}, {name} on {logits.device}")


def _check_logits(teacher: Tensor, student: Tensor, center: Tensor) -> None:
    _check_center(center, "teacher", teacher)
    check_ndim("student", student, (2, 3), "(S, B, D) or (B, D)")
    check_dtype("student", student, FLOATS)
    crops = student.shape[:-2]
    check_shape("student", student, (*crops, *teacher.shape[-2:]), "(S, B, D) of the teacher's")
    if crops == (0,):
        raise ValueError(f"student has no crops: shape {tuple(student.shape)}")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")


def _check_options(
    teacher: Tensor,
    student: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    reduction: str,
) -> None:
    named = {"teacher_temperature": teacher_temperature, "student_temperature": student_temperature}
    for name, value in named.items():
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def _rows(
    teacher: Tensor,
    student: Tensor,
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    exclude_matched: bool,
) -> Tensor:
    dtype = compute_dtype(teacher, student, center)
    teacher, student, center = teacher.to(dtype), student.to(dtype), center.to(dtype)
    return dino_rows(
        teacher, student, center, teacher_temperature, student_temperature, exclude_matched
    )


class _FusedRows(torch.autograd.Function):
    """Cross-entropies by one of the fused implementations.

    Keeps the inputs and two numbers per row of logits, from which the backward pass has the
    probabilities with one exponential.
    """

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        student: Tensor,
        center: Tensor,
        options: tuple[float, float, bool],
        impl: str,
    ) -> Tensor:
        rows, statistics = _FORWARD[impl](teacher, student, center, *options)
        ctx.save_for_backward(teacher, student, center, statistics)
        ctx.options, ctx.impl = options, impl
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        return None, _BACKWARD[ctx.impl](grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _rows_fake(
    teacher: Tensor, student: Tensor, center: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(teacher, student, center)
    crops, batch = teacher.shape[0] + student.shape[0], student.shape[1]
    return student.new_empty(batch, dtype=dtype), student.new_empty(2, crops, batch, dtype=dtype)


def _rows_grad_fake(grad: Tensor, teacher: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


_LOGITS = "Tensor teacher, Tensor student, Tensor center"
_OPTIONS = "float teacher_temperature, float student_temperature, bool exclude_matched"
_KERNELS = f"{__package__}.kernel_dino"

torch.library.define("kdcmae_fast::dino_loss", f"({_LOGITS}, {_OPTIONS}) -> Tensor")
torch.library.impl("kdcmae_fast::dino_loss", "CompositeImplicitAutograd", _rows)

# statistics (2, T + S, B): of each row z of scaled logits max z and the sum of exp(z - max z).
_FORWARD = define_fused(
    "dino_rows", f"({_LOGITS}, {_OPTIONS}) -> (Tensor, Tensor)", _rows_fake, _KERNELS
)
_BACKWARD = define_fused(
    "dino_rows_grad",
    f"(Tensor grad, {_LOGITS}, Tensor statistics, {_OPTIONS}) -> Tensor",
    _rows_grad_fake,
    _KERNELS,
)
