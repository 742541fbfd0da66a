"""Row divergences, the DINO loss and pooled LayerNorm, in plain differentiable PyTorch.

Inputs are in float32 or float64. The README has the formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # inside the logarithms of distributions that may hold zeros, as released


def shifted(z: Tensor, whole_batch: bool) -> Tensor:
    """z + |min z|, divided by its row sums; the min is of each row or of the whole batch.

    A row without mass (constant and not positive) becomes all zeros, which no divergence below
    counts, instead of 0 / 0.
    """
    low = z.amin() if whole_batch else z.amin(dim=1, keepdim=True)
    mass = z + low.abs()
    total = mass.sum(dim=1, keepdim=True)
    return mass / torch.where(total > 0, total, torch.ones_like(total))


def kl_with_eps(p: Tensor, q: Tensor) -> Tensor:
    """Sum over the features of p log((p + eps) / (q + eps)): finite where p or q is 0."""
    return (p * ((p + EPS) / (q + EPS)).log()).sum(dim=1)


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, between 0 and log 2."""
    middle = (p + q) / 2
    return (kl_with_eps(p, middle) + kl_with_eps(q, middle)) / 2


def probabilities(z: Tensor, distribution: str, temperature: float) -> Tensor:
    """Rows of features as probability vectors."""
    if distribution == "softmax":
        return (z / temperature).softmax(dim=1)
    return shifted(z, whole_batch=distribution == "batch_shift")


def softmax_kl(p: Tensor, q: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """KL(p || q) of softmax rows from their logarithms; no eps, exact also for tiny values.

    Symmetrised it is the sum of (p - q)(log p - log q) / 2, no term of which is negative.
    """
    log_p = (p / temperature).log_softmax(dim=1)
    log_q = (q / temperature).log_softmax(dim=1)
    weight = (log_p.exp() - log_q.exp()) / 2 if symmetric else log_p.exp()
    return (weight * (log_p - log_q)).sum(dim=1)


def divergence_rows(
    p: Tensor, q: Tensor, divergence: str, distribution: str, temperature: float
) -> Tensor:
    """(B, D) -> (B,), divergence of each row: "kl" (symmetrised), "kl_12" (KL(p || q)), "js"."""
    if distribution == "softmax" and divergence != "js":
        return softmax_kl(p, q, temperature, symmetric=divergence == "kl")
    p = probabilities(p, distribution, temperature)
    q = probabilities(q, distribution, temperature)
    if divergence == "js":
        return js(p, q)
    if divergence == "kl_12":
        return kl_with_eps(p, q)
    return (kl_with_eps(p, q) + kl_with_eps(q, p)) / 2


def pair_count(teachers: int, students: int, exclude_matched: bool) -> int:
    """Number of teacher x student crop pairs that count."""
    return teachers * students - (min(teachers, students) if exclude_matched else 0)


def dino_rows(
    teacher: Tensor,
    student: Tensor,
    center: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    exclude_matched: bool,
) -> Tensor:
    """teacher (T, B, D), student (S, B, D), center (D,) -> (B,), mean over the crop pairs.

    The sum over all pairs of sum_k q_t log p_s is one product of sums; the pairs of equal index
    are taken out of it again.
    """
    q = ((teacher.detach() - center.detach()) / teacher_temperature).softmax(dim=2)
    log_p = (student / student_temperature).log_softmax(dim=2)
    total = (q.sum(dim=0) * log_p.sum(dim=0)).sum(dim=1)
    if exclude_matched:
        matched = min(len(q), len(log_p))
        total = total - (q[:matched] * log_p[:matched]).sum(dim=(0, 2))
    return -total / pair_count(len(q), len(log_p), exclude_matched)


def layer_norm_mean(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (B, L, D) -> (B, D): LayerNorm of each token, then the mean over the tokens."""
    return F.layer_norm(x, x.shape[2:], weight, bias, eps).mean(dim=1)
