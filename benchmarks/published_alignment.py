"""The published op sequences of maximum mean discrepancy, in our own words; baselines only."""

import torch
from torch import Tensor

DECADES = tuple(10.0**k for k in range(-3, 4))


def mmd_decades(x: Tensor, y: Tensor) -> Tensor:
    """XKD's: three matrices of distances, one more per kernel of each."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b).square().clamp_min(1e-30)
        return torch.stack([torch.exp(-gamma * squares) for gamma in DECADES]).sum(0)

    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def mmd_tiled(x: Tensor, y: Tensor) -> Tensor:
    """The tiled form: differences of all pairs of rows in full, (N, M, D) three times."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        differences = a.unsqueeze(1) - b.unsqueeze(0)
        return torch.exp(-differences.square().mean(2) / a.shape[1])

    return kernel(x, x).mean() + kernel(y, y).mean() + 2 * kernel(x, y).mean()
