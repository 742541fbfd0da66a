"""The op sequence of the published EZ-VSL / AVL training loss, in our own words.

The baseline of the benchmark and nothing else: every cell with every vector in one B x B x HW
tensor, a second one for the division by the temperature, then the maximum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pooled_info_nce(maps: Tensor, vectors: Tensor, temperature: float = 0.03) -> Tensor:
    """maps (B, HW, D), vectors (B, D) -> (); the sum of both directions."""
    maps, vectors = F.normalize(maps, dim=2), F.normalize(vectors, dim=1)
    similarities = torch.einsum("npd,md->nmp", maps, vectors) / temperature
    logits = similarities.max(dim=2).values
    pairs = torch.arange(len(maps), device=maps.device)
    return F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)
