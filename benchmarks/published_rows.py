"""Row losses and pooling as published training code runs them, in our own words.

Baselines of the benchmarks and nothing else: one cross-entropy per pair of crops in a Python loop,
and normalised tokens written out before their mean is taken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dino_loss(
    teacher: Tensor,
    student: Tensor,
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    exclude_matched: bool,
) -> Tensor:
    """teacher (T, B, D), student (S, B, D), center (D,) -> mean over crop pairs and batch."""
    targets = F.softmax((teacher - center) / teacher_temperature, dim=-1).detach()
    scaled = student / student_temperature
    total, pairs = torch.zeros((), device=student.device), 0
    for t, q in enumerate(targets.unbind()):
        for s, logits in enumerate(scaled.unbind()):
            if exclude_matched and t == s:
                continue
            total = total + torch.sum(-q * F.log_softmax(logits, dim=-1), dim=-1).mean()
            pairs += 1
    return total / pairs


def update_center(center: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """center (D,), teacher (T, B, D) -> the new centre."""
    batch_center = torch.sum(teacher.flatten(0, 1), dim=0) / (teacher.shape[0] * teacher.shape[1])
    return center * momentum + batch_center * (1 - momentum)


def pooled_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, L, D) -> (B, D): every normalised token is written, then read for the mean."""
    return F.layer_norm(x, x.shape[2:], weight, bias).mean(dim=1)
