"""The reconstruction loss as plain differentiable torch: all patches are targets, then selected.

Arguments as in `op.py`, already checked.
"""

import torch
from torch import Tensor

from ..common import compute_dtype
from ..masking import MaskPlan
from ..tokens.reference import normalized_patches

EPS = 1e-6  # inside the square root of the patch deviation


def masked_reconstruction_loss(
    pred: Tensor,
    pixels: Tensor,
    plan: MaskPlan,
    patch_size: tuple[int, ...],
    norm_pix: bool,
    statistics: tuple[Tensor, Tensor] | None,
    masked_only: bool,
) -> Tensor:
    """(K*B,): mean over masked patches of the mean squared error over their values.

    masked_only: `pred` holds the masked patches in `MaskPlan.ids_masked` order, not all L.
    """
    target = normalized_patches(pixels, patch_size, statistics)
    target = target.to(compute_dtype(pred, target))
    if norm_pix:
        centred = target - target.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = centred / (variance + EPS).sqrt()
    sample = torch.arange(pixels.shape[0], device=pixels.device).unsqueeze(1)
    losses = []
    for view, own in enumerate(pred.unflatten(0, (plan.num_views, pixels.shape[0]))):
        masked = plan.ids_masked(view)
        own = own if masked_only else own[sample, masked]
        losses.append((own - target[sample, masked]).square().mean(dim=(1, 2)))
    return torch.cat(losses)
