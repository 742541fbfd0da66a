"""Moving averages over lists of tensors, in plain PyTorch."""

from collections import defaultdict

import torch
from torch import Tensor

PIECE = 2**20  # elements of a student converted at a time


def update_(
    teacher: list[Tensor], student: list[Tensor], weight: float | Tensor, shadow: list[Tensor]
) -> None:
    """In place; `weight` is 1 - momentum. A `shadow`, if any, receives the teacher, rounded."""
    same: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for t, s in zip(teacher, student, strict=True):
        if s.dtype == t.dtype:
            same[t.dtype][0].append(t)
            same[t.dtype][1].append(s)
        else:
            _lerp_converted_(t, s, weight)
    for dtype, (teachers, students) in same.items():
        if isinstance(weight, Tensor):
            torch._foreach_lerp_(teachers, students, [weight.to(dtype)] * len(teachers))
        else:
            torch._foreach_lerp_(teachers, students, weight)
    if shadow:
        torch._foreach_copy_(shadow, teacher)


def _lerp_converted_(teacher: Tensor, student: Tensor, weight: float | Tensor) -> None:
    """A student of another dtype, piece by piece: no second copy of it in the teacher's dtype."""
    if isinstance(weight, Tensor):
        weight = weight.to(teacher.dtype)
    if teacher.is_contiguous() and student.is_contiguous():
        pieces = zip(teacher.view(-1).split(PIECE), student.view(-1).split(PIECE), strict=True)
    else:
        pieces = zip([teacher], [student], strict=True)
    for t, s in pieces:
        t.lerp_(s.to(t.dtype), weight)
