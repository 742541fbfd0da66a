"""The op sequences of the published CAV-MAE / KDC-MAE training code, in our own words.

These are the baselines of the benchmarks and nothing else: double argsort, indices repeated to the
width of the data, dense patch embedding, targets and errors for every patch, logits kept whole.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PublishedMasks(NamedTuple):
    """One view. ids_keep (B, keep), ids_restore (B, L) int64; mask (B, L) float, 1 = removed."""

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def complementary_masks(noise: Tensor, len_keep: int, num_views: int) -> list[PublishedMasks]:
    """noise (B, L) -> one set of masks per view; each view sorts its own restore index."""
    batch, num_tokens = noise.shape
    views = []
    for view in range(num_views):
        shuffle = torch.argsort(noise, dim=1).roll(-view * len_keep, dims=1)
        restore = torch.argsort(shuffle, dim=1)
        mask = torch.ones(batch, num_tokens, device=noise.device)
        mask[:, :len_keep] = 0
        mask = torch.gather(mask, 1, restore)
        views.append(PublishedMasks(shuffle[:, :len_keep], restore, mask))
    return views


def gather_tokens(x: Tensor, ids_keep: Tensor) -> Tensor:
    """x (B, L, D), ids_keep (B, keep) -> (B, keep, D), through an index repeated D times."""
    return torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def embed_visible_patches(
    images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, views: list[PublishedMasks]
) -> Tensor:
    """images (B, C, H, W) -> (K*B, keep, D): every patch is embedded, then most are dropped."""
    dense = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    dense = dense + pos_embed
    return torch.cat([gather_tokens(dense, masks.ids_keep) for masks in views])


def assemble_decoder_input(
    x: Tensor, views: list[PublishedMasks], mask_token: Tensor, pos_embed: Tensor
) -> Tensor:
    """x (K*B, keep, D) -> (K*B, L, D): append mask tokens, then gather everything back in order."""
    outputs = []
    for visible, masks in zip(x.chunk(len(views)), views, strict=True):
        missing = masks.ids_restore.shape[1] - visible.shape[1]
        filler = mask_token.expand(visible.shape[0], missing, -1)
        tokens = torch.cat([visible, filler], dim=1)
        outputs.append(gather_tokens(tokens, masks.ids_restore) + pos_embed)
    return torch.cat(outputs)


def masked_reconstruction_loss(
    pred: Tensor, images: Tensor, views: list[PublishedMasks], patch_size: int
) -> Tensor:
    """pred (K*B, L, P), images (B, C, H, W) -> (); errors of all patches, then masked."""
    batch, channels, height, width = images.shape
    rows, cols = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, cols, patch_size)
    target = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    losses = []
    for view_pred, masks in zip(pred.chunk(len(views)), views, strict=True):
        error = ((view_pred - target) ** 2).mean(-1)
        losses.append((error * masks.mask).sum() / masks.mask.sum())
    return torch.stack(losses).mean()


def info_nce(
    audio: Tensor, video: Tensor, temperature: float = 0.05, symmetric: bool = False
) -> Tensor:
    """audio, video (B, D) -> softmax over audio for each video, B x B logits kept for backward.

    symmetric: the mean of that and of the softmax over video for each audio.
    """
    audio, video = F.normalize(audio, dim=-1), F.normalize(video, dim=-1)
    logits = audio @ video.T / temperature
    loss = -F.log_softmax(logits, dim=0).diagonal().mean()
    if not symmetric:
        return loss
    return (loss - F.log_softmax(logits, dim=1).diagonal().mean()) / 2


def distillation_loss(p: Tensor, q: Tensor) -> Tensor:
    """p, q (B, D) -> Jensen-Shannon divergence of both after a shift by the batch minimum."""
    p = p + p.min().abs()
    q = q + q.min().abs()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    middle = (p + q) / 2
    divergences = [(side * ((side + 1e-12) / (middle + 1e-12)).log()).sum(-1) for side in (p, q)]
    return ((divergences[0] + divergences[1]) / 2).mean()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, H, L, d): scores and probabilities in full."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v
