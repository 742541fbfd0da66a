"""What a masked autoencoder saw and what it made of it, as pictures.

One PNG per clip, frame left and spectrogram right: the original, each view's visible patches, and
each view's reconstruction (visible patches as they are, predictions in the masked ones).
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.figure import (
    INK,
    MUTED,
    new_figure,
    picture_axes,
    require_matplotlib,
    save_figure,
)
from kdcmae_fast.kernels.tokens import patchify, unpatchify

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kdcmae_fast.batch import Batch
    from kdcmae_fast.kernels import MaskPlan
    from kdcmae_fast.models.cav_mae import CavMae

MEL_TITLE = "sound: log-mel spectrogram, low frequencies at the bottom"
HIDDEN_GREY = 0.88  # of removed patches
NORM_PIX_EPS = 1e-6  # of the reconstruction target (MAE, arXiv 2111.06377)
SECONDS_PER_FRAME = 0.01  # of a spectrogram
NORM_PIX_CAPTION = (
    "The model predicts each patch relative to its own mean and standard deviation; the true "
    "patch's are put back\nhere, so the brightness and loudness of a patch are given, not guessed."
)


class Views(NamedTuple):
    """One modality of B clips and its K views. C channels, H rows (mel bins), W columns (frames).

    original: (B, C, H, W). masked: (K, B, C, H, W), NaN where removed. reconstructed: (K, B, C, H,
    W). error: (K, B) mean squared error over the masked patches, in the units of the loss.
    """

    original: Tensor
    masked: Tensor
    reconstructed: Tensor
    error: Tensor


def reconstruct_views(
    original: Tensor, predicted: Tensor, plan: "MaskPlan", *, patch_size: int, norm_pix: bool
) -> Views:
    """Put predictions into the patches that each view had removed.

    original: (B, C, H, W), as the model normalises it; a spectrogram is (B, 1, F, T).
    predicted: (K*B, L, P), as in `Reconstruction`. plan: the masks of these K*B rows.
    norm_pix: the predictions are relative to each true patch's mean and standard deviation
        (unbiased), which are put back here.
    """
    num_views = predicted.shape[0] // original.shape[0]
    shape = (num_views, *original.shape)
    target = patchify(original, patch_size).repeat(num_views, 1, 1)
    index = torch.cat([plan.ids_masked(view) for view in range(plan.num_views)])
    index = index.unsqueeze(-1).expand(-1, -1, target.shape[-1])
    guess, removed = predicted.to(target.dtype).gather(1, index), target.gather(1, index)
    mean, std = torch.zeros(1, device=target.device), torch.ones(1, device=target.device)
    if norm_pix:
        mean = removed.mean(-1, keepdim=True)
        std = (removed.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt()
    error = (guess - (removed - mean) / std).square().mean((1, 2))
    hidden = target.scatter(1, index, torch.full_like(guess, float("nan")))
    filled = target.scatter(1, index, guess * std + mean)
    return Views(
        original,
        unpatchify(hidden, original.shape[1:], patch_size).reshape(shape),
        unpatchify(filled, original.shape[1:], patch_size).reshape(shape),
        error.reshape(num_views, -1),
    )


def reconstruct_batch(model: "CavMae", batch: "Batch") -> tuple[Views, Views]:
    """Frames (RGB in 0..1) and spectrograms of a batch, masked and reconstructed by the model."""
    config = model.config
    with torch.inference_mode():
        result = model.reconstruct(batch)
    mean, std = (
        torch.tensor(values, device=batch.frames.device).reshape(3, 1, 1)
        for values in (config.pixel_mean, config.pixel_std)
    )
    pixels = batch.frames
    if pixels.dtype == torch.uint8:
        pixels = (pixels / 255 - mean) / std
    fbank = batch.fbank.transpose(1, 2).unsqueeze(1)
    frames, fbanks = (
        reconstruct_views(
            original,
            getattr(result, modality),
            result.plans[modality],
            patch_size=config.patch_size,
            norm_pix=config.norm_pix_loss,
        )
        for original, modality in ((pixels, "video"), (fbank, "audio"))
    )
    in_rgb = Views(
        frames.original * std + mean,
        frames.masked * std + mean,
        frames.reconstructed * std + mean,
        frames.error,
    )
    return in_rgb, fbanks


def draw_clip(
    path: str | Path, title: str, frames: Views, fbanks: Views, clip: int, *, norm_pix: bool
) -> Path:
    """Write the picture of one clip: frame left, spectrogram right, original above the views.

    frames: (.., 3, H, W) with RGB in 0..1. fbanks: (.., 1, F, T) in any units. clip: its row in
    the batch. norm_pix: say in a caption what the reconstruction was given. Returns the path.
    """
    require_matplotlib("the reconstruction picture")
    num_views = len(frames.masked)
    rows = 1 + 2 * num_views
    figure = new_figure(9.0, 1.45 * rows + 0.9)
    figure.suptitle(title, fontsize=12, color=INK, x=0.02, ha="left")
    frame_axes, fbank_axes = figure.subplots(rows, 2, width_ratios=(1, 4.4)).T
    low, high = (fbanks.original[clip].quantile(q).item() for q in (0.005, 0.995))

    def draw_row(row: int, label: str, frame: Tensor, fbank: Tensor) -> None:
        _show_frame(frame_axes[row], frame)
        _show_fbank(fbank_axes[row], fbank, (low, high))
        frame_axes[row].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)

    for axes, name in ((frame_axes[0], "frame"), (fbank_axes[0], MEL_TITLE)):
        axes.set_title(name, loc="left", pad=3, fontsize=9, color=MUTED)
    draw_row(0, "original", frames.original[clip], fbanks.original[clip])
    for view in range(num_views):
        row, name = 1 + 2 * view, f"view {view + 1}\n" if num_views > 1 else ""
        draw_row(row, f"{name}visible", frames.masked[view, clip], fbanks.masked[view, clip])
        draw_row(
            row + 1,
            f"{name}reconstructed",
            frames.reconstructed[view, clip],
            fbanks.reconstructed[view, clip],
        )
        _note_error(frame_axes[row + 1], frames.error[view, clip].item())
        _note_error(fbank_axes[row + 1], fbanks.error[view, clip].item())
    _label_time(fbank_axes[-1])
    note = "Error: mean squared error over the masked patches, in the units of the loss."
    caption = f"{note}\n{NORM_PIX_CAPTION}" if norm_pix else note
    figure.supxlabel(caption, fontsize=7.5, color=MUTED, x=0.02, ha="left")
    return save_figure(figure, path)


def _show_frame(axes: "Axes", frame: Tensor) -> None:
    """(3, H, W) in 0..1; NaN pixels in the colour of nothing."""
    picture = frame.permute(1, 2, 0).clamp(0, 1).nan_to_num(HIDDEN_GREY)
    axes.imshow(picture.numpy(force=True), interpolation="nearest")
    picture_axes(axes)


def _show_fbank(axes: "Axes", fbank: Tensor, limits: tuple[float, float]) -> None:
    """(1, F, T), low frequencies at the bottom, in a colour scale shared by the whole figure."""
    axes.set_facecolor((HIDDEN_GREY,) * 3)
    axes.imshow(
        fbank[0].numpy(force=True),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
        extent=(0, fbank.shape[-1] * SECONDS_PER_FRAME, 0, fbank.shape[-2]),
    )
    picture_axes(axes)


def _note_error(axes: "Axes", error: float) -> None:
    axes.set_title(f"error {error:.3f}", loc="right", pad=2, fontsize=7.5, color=MUTED)


def _label_time(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    axes.set_xlabel("seconds", fontsize=8, color=MUTED)
