"""Where in a frame its sound is: maps in one pass, and how maps are scaled and fused.

B frames, H W pixels, L = h w patches, D width. The cosine of the sound's vector with each video
token is CAV-MAE's own way of showing it. A model whose contrastive loss compares the means over
tokens is not made for it: nothing says which token carries what; see attribution.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcmae_fast.models.masking import video_grid

if TYPE_CHECKING:
    from kdcmae_fast.batch import Batch
    from kdcmae_fast.models.cav_mae import CavMae

FUSIONS: dict[str, tuple[float, ...]] = {
    "ezvsl": (0.4, 0.6),
    "avl-flickr": (1 / 3, 1 / 3, 1 / 3),
    "avl-vggss": (1.0, 0.4),
}


def similarity_maps(model: "CavMae", batch: "Batch") -> Tensor:
    """Cosine of each clip's sound with the tokens of its frame, (B, h, w) on the patch grid.

    The sound's vector is the mean of its tokens, of CAV-MAE Sync the CLS token; for the latter
    batch.fbank holds the segment that belongs to the frame.
    """
    with torch.no_grad():
        features = model.encode(fbank=batch.fbank, frames=batch.frames)
    assert features.audio is not None and features.video_tokens is not None  # both given
    return cosine_maps(features.audio, features.video_tokens, video_grid(model.config))


def cosine_maps(sounds: Tensor, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, D), (B, L, D) -> (B, *grid)."""
    cosine = torch.einsum("bd,bld->bl", unit(sounds), unit(tokens))
    return cosine.unflatten(1, grid)


def normalized(model: "CavMae", frames: Tensor) -> Tensor:
    """uint8 (.., 3, H, W) as the model's floats; floats as they are."""
    if frames.dtype != torch.uint8:
        return frames
    mean, std = (
        torch.tensor(values, device=frames.device).reshape(3, 1, 1)
        for values in (model.config.pixel_mean, model.config.pixel_std)
    )
    return (frames / 255 - mean) / std


def token_norm_maps(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Length of each video token, (B, *grid): a map without any sound."""
    return tokens.norm(dim=-1).unflatten(1, grid)


def colour_maps(frames: Tensor) -> Tensor:
    """How far each pixel's colour is from the picture's mean, (B, H, W); no model, no sound.

    frames: (B, 3, H, W). After Achanta et al., Frequency-tuned Salient Region Detection (2009), in
    RGB, smoothed by 1/32 of the picture.
    """
    pixels = frames.float()
    pixels = blur(pixels, pixels.shape[-1] / 32)
    return (pixels - pixels.mean((2, 3), keepdim=True)).norm(dim=1)


def upsample(maps: Tensor, size: int) -> Tensor:
    """(B, h, w) -> (B, size, size), bilinear with aligned corners, as EZ-VSL scales its maps."""
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]


def min_max(maps: Tensor) -> Tensor:
    """Each (.., H, W) map scaled to [0, 1]; a constant one is left as it is."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), maps)


def fusion_weights(rule: str, alpha: float = 0.4) -> tuple[float, ...]:
    """Weights of the audio-visual map and of the priors that follow it.

    rule: "ezvsl" 0.4 and 0.6; "avl-flickr" a third each of three maps; "avl-vggss" 1 and 0.4;
    "alpha" 1 - alpha and alpha.
    """
    if rule == "alpha":
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1")
        return (1 - alpha, alpha)
    if rule not in FUSIONS:
        raise ValueError(f"fusion={rule!r} must be one of {', '.join([*FUSIONS, 'alpha'])}")
    return FUSIONS[rule]


def fuse(maps: list[Tensor], weights: tuple[float, ...], *, drop_nan: bool = True) -> Tensor:
    """Weighted sum of min-max scaled maps, scaled again; all (B, H, W), the audio-visual one first.

    drop_nan: leave a map that is NaN for a picture (no object found) out of that picture's sum and
    scale the other weights up; False: the sum is NaN and scores 0, as in the published code.
    """
    if len(maps) != len(weights):
        raise ValueError(f"{len(weights)} weights need as many maps, got {len(maps)}")
    scaled = torch.stack([min_max(m) for m in maps])
    share = scaled.new_tensor(weights)[:, None, None, None].expand(-1, scaled.shape[1], 1, 1)
    if drop_nan:
        missing = scaled.isnan().any((2, 3), keepdim=True)
        scaled = scaled.masked_fill(missing, 0.0)
        share = share * ~missing
        share = share * (sum(weights) / share.sum(0).clamp(min=1e-12))
    return min_max((share * scaled).sum(0))


def blur(maps: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of the last two axes, edges repeated; deviation: pixels."""
    reach = max(1, round(3 * deviation))
    places = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(places**2) / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))
    return flat.reshape(maps.shape)


def unit(x: Tensor) -> Tensor:
    """(.., D) in fp32, scaled to length 1."""
    return F.normalize(x.float(), dim=-1)
