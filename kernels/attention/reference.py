"""Softmax attention with materialised scores, in plain differentiable PyTorch."""

import torch
from torch import Tensor

from ..common import compute_dtype, without_autocast


def attention_scores_materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, H, L, d) and k, v (B, H, S, d) -> (B, H, L, d).

    Scores and softmax are float32 (float64 for float64), as in the fused back-ends. bfloat16
    probabilities meet bfloat16 values in the last product; float16 ones are multiplied in
    float32, because CPUs without float16 arithmetic emulate it slowly.
    """
    wide = compute_dtype(q)
    with without_autocast(q.device):
        scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-2, -1)
        values = v.to(wide) if v.dtype == torch.float16 else v
        return (scores.softmax(dim=-1).to(values.dtype) @ values).to(q.dtype)
