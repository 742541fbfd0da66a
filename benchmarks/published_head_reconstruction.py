"""The head and its loss as published training code has them, in our own words.

The head runs on every token, targets are made of every patch, and the errors of visible patches are
multiplied by 0 at the end. A baseline of the benchmarks and nothing else.
"""

import torch.nn.functional as F
from published_ops import PublishedMasks, masked_reconstruction_loss
from torch import Tensor


def masked_head_reconstruction_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    images: Tensor,
    views: list[PublishedMasks],
    patch_size: int,
) -> Tensor:
    """x (K*B, L, D'), weight (P, D'), bias (P,), images (B, C, H, W) -> ()."""
    return masked_reconstruction_loss(F.linear(x, weight, bias), images, views, patch_size)
