"""What a masked autoencoder saw of each clip, what it made of it, and the errors of its guesses.

B clips, K views of each (view-major rows k*B + b), L patches of P values.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.kernels.tokens import patchify, unpatchify
from kdcmae_fast.models.rows import kept_tokens, masked_tokens

if TYPE_CHECKING:
    from kdcmae_fast.batch import Batch
    from kdcmae_fast.config import DataConfig
    from kdcmae_fast.kernels import MaskPlan
    from kdcmae_fast.models.cav_mae import CavMae
    from kdcmae_fast.models.outputs import Plans

NORM_PIX_EPS = 1e-6  # of the reconstruction target (MAE, arXiv 2111.06377)


class Errors(NamedTuple):
    """Mean squared errors over the hidden patches of K views of B clips, (K, B) each.

    loss: in the units of the training loss. shown: in those of the pictures (`Views`).
    NaN where a view hides nothing.
    """

    loss: Tensor
    shown: Tensor


class Targets(NamedTuple):
    """What the model was to predict. B clips, K views, L patches of P values.

    value: (B, L, P). weight: (B, L, P) or broadcast to it, what a squared error of 1 is in the
    picture's units. hidden: (K, B, L) bool.
    """

    value: Tensor
    weight: Tensor
    hidden: Tensor


class Views(NamedTuple):
    """One modality of B clips and its K views. C channels, H rows (mel bins), W columns (frames).

    original: (B, C, H, W). masked: (K, B, C, H, W), NaN where removed. reconstructed: (K, B, C, H,
    W), predictions in the removed patches. given: (K, B, C, H, W), their true means there, or None
    where the model has to guess those too. errors: by who guessed: "model"; "patch_mean", each
    patch as flat at its own true mean; "visible_mean", each patch as the mean of the view's visible
    ones (both in the space the model predicts in; absent without visible patches). targets: of
    all patches.
    """

    original: Tensor
    masked: Tensor
    reconstructed: Tensor
    errors: dict[str, Errors]
    targets: Targets
    given: Tensor | None = None

    @property
    def error(self) -> Tensor:
        """(K, B), the model's in the units of the loss."""
        return self.errors["model"].loss


class _Patches(NamedTuple):
    """Targets of every row: value = target * spread + mean, in the units the model is given.

    target: (K*B, L, P), what the model predicts. mean, spread: broadcast to it.
    """

    target: Tensor
    mean: Tensor
    spread: Tensor

    def at(self, ids: Tensor) -> "_Patches":
        """Patches ids (K*B, M) of every row."""
        return _Patches(*(_pick(part.expand_as(self.target), ids) for part in self))


def reconstruct_views(
    original: Tensor,
    predicted: Tensor,
    plan: "MaskPlan",
    *,
    patch_size: int,
    norm_pix: bool,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
) -> Views:
    """Put predictions into the patches that each view had removed, and measure them.

    original: (B, C, H, W), as the model normalises it; a spectrogram is (B, 1, F, T).
    predicted: (K*B, L, P), as in `Reconstruction`. plan: the masks of these K*B rows.
    norm_pix: the predictions are relative to each true patch's mean and standard deviation
        (unbiased), which are put back here.
    mean, std: scalars or (C, 1, 1); the pictures, and the errors in their units, are of
        value * std + mean.
    """
    num_views = predicted.shape[0] // original.shape[0]
    shape = (num_views, *original.shape)
    patches = _patches(original, num_views, patch_size, norm_pix)
    kept, removed = kept_tokens(plan), masked_tokens(plan)
    hidden = patches.at(removed)
    std, mean = (torch.as_tensor(x, device=original.device).to(original.dtype) for x in (std, mean))
    scale = patchify(std.expand(original.shape[1:])[None].contiguous(), patch_size)[0, 0]

    def errors_of(guess: Tensor) -> Errors:
        wrong = (guess - hidden.target).square().mean((1, 2))
        shown = ((guess - hidden.target) * hidden.spread * scale).square().mean((1, 2))
        return Errors(wrong.reshape(num_views, -1), shown.reshape(num_views, -1))

    guess = _pick(predicted.to(original.dtype), removed)
    errors = {
        "model": errors_of(guess),
        "patch_mean": errors_of(hidden.target.mean(-1, keepdim=True).expand_as(guess)),
    }
    if kept.shape[1]:
        visible = patches.at(kept).target.mean(1, keepdim=True)
        errors["visible_mean"] = errors_of(visible.expand_as(guess))

    def picture(values: Tensor) -> Tensor:
        whole = patches.target * patches.spread + patches.mean
        index = removed.unsqueeze(-1).expand_as(values)
        whole = whole.scatter(1, index, values)
        return unpatchify(whole, original.shape[1:], patch_size).reshape(shape) * std + mean

    clips = len(original)
    gone = torch.zeros(patches.target.shape[:2], dtype=torch.bool, device=original.device)
    return Views(
        original * std + mean,
        picture(torch.full_like(guess, float("nan"))),
        picture(guess * hidden.spread + hidden.mean),
        errors,
        Targets(
            patches.target[:clips],
            (patches.spread[:clips] * scale).square(),
            gone.scatter(1, removed, True).reshape(num_views, clips, -1),
        ),
        picture(hidden.mean) if norm_pix else None,
    )


def reconstruct_batch(
    model: "CavMae",
    batch: "Batch",
    plans: "Plans | None" = None,
    *,
    data: "DataConfig | None" = None,
) -> tuple[Views, Views]:
    """Frames (RGB in 0..1) and spectrograms of a batch, masked and reconstructed by the model.

    plans: what is hidden (None: what the model hides of these clips at step 0).
    data: the spectrograms' normalisation, which is undone (None: they stay as the model has them).
    """
    config = model.config
    with torch.inference_mode():
        result = model.reconstruct(batch, plans)
    mean, std = (
        torch.tensor(values, device=batch.frames.device).reshape(3, 1, 1)
        for values in (config.pixel_mean, config.pixel_std)
    )
    pixels = batch.frames
    if pixels.dtype == torch.uint8:
        pixels = (pixels / 255 - mean) / std
    put_in = functools.partial(
        reconstruct_views, patch_size=config.patch_size, norm_pix=config.norm_pix_loss
    )
    fbank = batch.fbank.transpose(1, 2).unsqueeze(1)
    level, spread = (0.0, 1.0) if data is None else (data.dataset_mean, data.dataset_std)
    return (
        put_in(pixels, result.video, result.plans["video"], mean=mean, std=std),
        put_in(fbank, result.audio, result.plans["audio"], mean=level, std=spread),
    )


def _patches(original: Tensor, num_views: int, patch_size: int, norm_pix: bool) -> _Patches:
    values = patchify(original, patch_size).repeat(num_views, 1, 1)
    if not norm_pix:
        return _Patches(values, values.new_zeros(1), values.new_ones(1))
    mean = values.mean(-1, keepdim=True)
    spread = (values.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt()
    return _Patches((values - mean) / spread, mean, spread)


def _pick(patches: Tensor, ids: Tensor) -> Tensor:
    """Patches ids (N, M) of (N, L, P) -> (N, M, P)."""
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
