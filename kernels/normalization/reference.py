"""Residual addition and LayerNorm in plain differentiable PyTorch. The README has the formulas."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import compute_dtype


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    runs: tuple[Sequence[int], Sequence[int]],
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """x (R, D); weight, bias (S, D); runs (norms, rows): rows[i] rows of x in order have norm
    norms[i] -> (R, D)."""
    norms, rows = runs
    dtype = compute_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    width = x.shape[1:]
    parts = [
        F.layer_norm(part, width, weight[norm], bias[norm], eps).to(out_dtype)
        for part, norm in zip(x.split(list(rows)), norms, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
