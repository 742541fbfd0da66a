"""The published teacher update, in our own words; a baseline only."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """One parameter at a time, two operations each."""
    for t, s in zip(teacher, student, strict=True):
        t.mul_(momentum).add_((1 - momentum) * s.detach())
