"""linear -> GELU -> linear in plain differentiable PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """x (..., D), weight1 (H, D), bias1 (H,), weight2 (E, H), bias2 (E,) -> (..., E)."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
