"""The token ops as plain differentiable torch: dense where that is clearest.

Shapes and arguments as in `op.py`, already checked. These are what the fast forms are tested
against; nothing here is lean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking import MaskPlan
from .patches import patchify


def gather_tokens(x: Tensor, plan: MaskPlan) -> Tensor:
    """x (B, L, D) -> (K*B, keep, D)."""
    sample = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return torch.cat([x[sample, plan.ids_keep(view)] for view in range(plan.num_views)])


def normalized_patches(
    pixels: Tensor, patch_size: tuple[int, ...], statistics: tuple[Tensor, Tensor] | None
) -> Tensor:
    """(B, L, P) in target order; uint8 pixels as ((x / 255) - mean) / std with (C,) statistics."""
    patches = patchify(pixels, patch_size)
    if statistics is None:
        return patches
    mean, std = statistics
    values = patches.unflatten(-1, (-1, mean.shape[0])).to(mean.dtype) / 255
    return ((values - mean) / std).flatten(-2)


def embed_visible_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    plan: MaskPlan,
    patch_size: tuple[int, ...],
    statistics: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Embed every patch, add positions, keep the visible tokens: (K*B, keep, D)."""
    patches = normalized_patches(pixels, patch_size, statistics).to(weight.dtype)
    # (D, 1, pF, pT) or (D, C, ...) with the channel moved last, as the patches have it.
    kernel = weight.movedim(1, -1).flatten(1)
    tokens = F.linear(patches, kernel, bias) + pos_embed
    return gather_tokens(tokens, plan).to(weight.dtype)


def assemble_decoder_input(
    x: Tensor, plans: list[MaskPlan], mask_token: Tensor, pos_embed: Tensor, released: bool
) -> Tensor:
    """Append mask tokens, put every token into its place, add positions: (K*B, sum of L, D)."""
    num_views = plans[0].num_views
    batch = x.shape[0] // num_views
    sample = torch.arange(batch, device=x.device).unsqueeze(1)
    rows = []
    for view, own in enumerate(x.unflatten(0, (num_views, batch))):
        segments = []
        for plan, visible in zip(plans, own.split([p.len_keep for p in plans], 1), strict=True):
            filler = mask_token.expand(batch, plan.num_tokens - plan.len_keep, -1)
            restore = plan.ids_restore(0 if released else view)
            segments.append(torch.cat([visible, filler], dim=1)[sample, restore])
        rows.append(torch.cat(segments, dim=1))
    out = torch.cat(rows)
    return (out + pos_embed).to(out.dtype)
