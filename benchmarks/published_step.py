"""The published CAV-MAE / KDC-MAE training step, in our own words, on the weights of a `CavMae`.

The views one after the other, dense patch embedding, indices repeated to the width of the data,
three passes of the shared blocks, the decoder and its heads on every token, errors of every patch
times the mask. With `attention=published_ops.attention` it is the baseline of the benchmarks (the
scores of attention in memory, as the timm release the published code pins has them); with
`F.scaled_dot_product_attention` it is a port of it to today's PyTorch.
"""

from collections.abc import Callable, Sequence

import published_ops as published
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcmae_fast.models import Batch
from kdcmae_fast.models.cav_mae import CavMae

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Masks = dict[str, list[published.PublishedMasks]]


def step_loss(
    model: CavMae, batch: Batch, noise: dict[str, Tensor], attention: Attention
) -> Tensor:
    """Total loss of B clips under the K views that noise {"audio", "video"} (B, L) sorts out.

    The objective is that of the published code: one-directional InfoNCE, and with two views the
    Jensen-Shannon divergence after a shift by the batch minimum, as a mean over the clips.
    """
    config = model.config
    masks = _masks(model, noise)
    tokens = _dense_tokens(model, batch)
    total = torch.zeros((), device=batch.fbank.device)
    pooled = []
    for view in range(config.num_views):
        own = {name: masks[name][view] for name in masks}
        joint, audio, video = _encode(model, tokens, own, attention)
        predictions = _decode(model, joint, own, attention)
        for pred, images, name in zip(predictions, _images(batch), ("audio", "video"), strict=True):
            error = published.masked_reconstruction_loss(
                pred, images, [own[name]], config.patch_size
            )
            total = total + config.mae_loss_weight * error
        contrastive = published.info_nce(audio.mean(1), video.mean(1), config.temperature)
        total = total + config.contrast_loss_weight * contrastive
        pooled.append(joint.mean(1).float())
    if config.num_views == 2:
        total = total + config.kd_loss_weight * published.distillation_loss(*pooled)
    return total


def _masks(model: CavMae, noise: dict[str, Tensor]) -> Masks:
    config = model.config
    return {
        name: published.complementary_masks(
            keys, int(keys.shape[1] * (1 - config.mask_ratio)), config.num_views
        )
        for name, keys in noise.items()
    }


def _images(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.fbank.unsqueeze(1).transpose(2, 3), batch.frames


def _dense_tokens(model: CavMae, batch: Batch) -> dict[str, Tensor]:
    """Every patch of both modalities, embedded: (B, L, D) each."""
    tokens = {}
    for name, images in zip(("audio", "video"), _images(batch), strict=True):
        embed = getattr(model.encoder, name).patch_embed
        dense = F.conv2d(images, embed.weight, embed.bias, stride=embed.patch_size)
        tokens[name] = dense.flatten(2).transpose(1, 2) + embed.pos_embed + embed.modality
    return tokens


def _encode(
    model: CavMae,
    tokens: dict[str, Tensor],
    masks: dict[str, published.PublishedMasks],
    attention: Attention,
) -> tuple[Tensor, Tensor, Tensor]:
    encoder = model.encoder
    streams = {}
    for name, dense in tokens.items():
        x = published.gather_tokens(dense, masks[name].ids_keep)
        for block in getattr(encoder, name).blocks:
            x = _block(x, block, block.norm1, block.norm2, attention)
        streams[name] = x
    streams = {"joint": torch.cat([streams["audio"], streams["video"]], dim=1), **streams}
    for name, x in streams.items():
        for block in encoder.shared.blocks:
            norms = block.norm1.norms[name], block.norm2.norms[name]
            x = _block(x, block, *norms, attention)
        streams[name] = _norm(x, encoder.shared.norm[name])
    return streams["joint"], streams["audio"], streams["video"]


def _decode(
    model: CavMae,
    joint: Tensor,
    masks: dict[str, published.PublishedMasks],
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    decoder = model.decoder
    x = F.linear(joint, decoder.embed.weight, decoder.embed.bias)
    keep = masks["audio"].ids_keep.shape[1]
    segments = []
    for visible, own, pos, modality in (
        (x[:, :keep], masks["audio"], decoder.audio_pos_embed, decoder.audio_modality),
        (x[:, keep:], masks["video"], decoder.video_pos_embed, decoder.video_modality),
    ):
        missing = own.ids_restore.shape[1] - visible.shape[1]
        filler = decoder.mask_token.to(visible.dtype).repeat(visible.shape[0], missing, 1)
        whole = published.gather_tokens(torch.cat([visible, filler], dim=1), own.ids_restore)
        segments.append(whole + pos + modality)
    x = torch.cat(segments, dim=1)
    for block in decoder.blocks:
        x = _block(x, block, block.norm1, block.norm2, attention)
    x = _norm(x, decoder.norm)
    num_audio = decoder.audio_pos_embed.shape[1]
    audio, video = x[:, :num_audio], x[:, num_audio:]
    heads = decoder.audio_head, decoder.video_head
    return (
        F.linear(audio, heads[0].weight, heads[0].bias),
        F.linear(video, heads[1].weight, heads[1].bias),
    )


def _block(
    x: Tensor, block: nn.Module, norm1: nn.LayerNorm, norm2: nn.LayerNorm, attention: Attention
) -> Tensor:
    attn, mlp = block.attn, block.mlp
    batch, length, dim = x.shape
    qkv = F.linear(_norm(x, norm1), attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.view(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
    x = x + F.linear(mixed, attn.proj.weight, attn.proj.bias)
    hidden = F.gelu(F.linear(_norm(x, norm2), mlp.fc1.weight, mlp.fc1.bias))
    return x + F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


PROVIDERS: Sequence[tuple[str, Attention]] = (
    ("published", published.attention),
    ("sdpa", F.scaled_dot_product_attention),
)
