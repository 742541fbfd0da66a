"""Residual addition and norms as the published CAV-MAE / KDC-MAE blocks do them, in our own words.

The baseline of the benchmark and nothing else: the stream is a tensor per modality, each pass adds
a branch and then normalises with its own LayerNorm.
"""

import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, rows: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """x, residual (R, D), weight, bias (S, D), rows[i] rows under norm i -> normed and summed, one
    of each per modality."""
    normed, summed = [], []
    streams = zip(x.split(rows), residual.split(rows), weight, bias, strict=True)
    for branch, stream, scale, shift in streams:
        stream = stream + branch
        summed.append(stream)
        normed.append(F.layer_norm(stream.to(scale.dtype), x.shape[1:], scale, shift).to(x.dtype))
    return normed, summed
