"""Pictures of what a masked autoencoder saw and what it made of it.

One PNG per clip, frame left and spectrogram right: the original, each view's visible patches, and
each view's reconstruction (visible patches as they are, predictions in the masked ones). Where the
reconstruction was given the true patches' means, a line between shows these alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.data.clip import FRAME_SHIFT, SAMPLE_RATE
from kdcmae_fast.data.fbank import mel_edges
from kdcmae_fast.evaluation.views import Views
from kdcmae_fast.figure import (
    INK,
    MUTED,
    new_figure,
    picture_axes,
    require_matplotlib,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEL_TITLE = "sound (log-mel spectrogram, kHz)"
HIDDEN_GREY = 0.88  # of removed patches
TICKS_KHZ = (0.25, 1, 4)
SECONDS_PER_ROW = FRAME_SHIFT / SAMPLE_RATE  # of a filterbank
NORM_PIX_CAPTION = (
    "The model predicts each patch relative to its own mean and standard deviation; the true "
    "patch's are put back in\nthe reconstruction, so the brightness and loudness of a patch are "
    "given, not guessed."
)
ERROR_CAPTION = "Error: mean squared error over the masked patches, in the units of the loss."
BASELINES = {"visible_mean": "mean visible patch", "patch_mean": "true mean of each patch"}


def draw_clip(
    path: str | Path,
    title: str,
    frames: Views,
    fbanks: Views,
    clip: int,
    *,
    rows: int | None = None,
    hidden: str = "",
) -> Path:
    """Write the picture of one clip: frame left, spectrogram right, original above the views.

    frames: (.., 3, H, W) with RGB in 0..1. fbanks: (.., 1, F, T) in any units. clip: its row in
    the batch. rows: of the filterbank that are sound, not padding (None: all). hidden: what is, for
    the caption, which also says what the reconstruction was given. Returns the path.
    """
    require_matplotlib("the reconstruction picture")
    shown = _lines(frames, fbanks, clip)
    lines = len(shown)
    figure = new_figure(9.0, 1.45 * lines + 1.1)
    figure.suptitle(title, fontsize=12, color=INK, x=0.02, ha="left")
    frame_axes, fbank_axes = figure.subplots(lines, 2, width_ratios=(1, 4.4)).T
    sound = fbanks.original[clip][..., :rows]
    low, high = (sound.quantile(q).item() for q in (0.005, 0.995))

    for line, (label, frame, fbank, view) in enumerate(shown):
        _show_frame(frame_axes[line], frame)
        _show_fbank(fbank_axes[line], fbank, (low, high), rows)
        frame_axes[line].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        if view is not None:
            _note_error(frame_axes[line], frames, view, clip, short=True)
            _note_error(fbank_axes[line], fbanks, view, clip)
    for axes, name in ((frame_axes[0], "frame"), (fbank_axes[0], MEL_TITLE)):
        axes.set_title(name, loc="left", pad=3, fontsize=9, color=MUTED)
    _label_time(fbank_axes[-1])
    captions = [hidden, ERROR_CAPTION, "" if frames.given is None else NORM_PIX_CAPTION]
    figure.supxlabel(
        "\n".join(filter(None, captions)), fontsize=7.5, color=MUTED, x=0.02, ha="left"
    )
    return save_figure(figure, path)


class _Line(NamedTuple):
    """A line of the figure; view: of whose reconstruction it is, if of one."""

    label: str
    frame: Tensor
    fbank: Tensor
    view: int | None = None


def _lines(frames: Views, fbanks: Views, clip: int) -> list[_Line]:
    num_views = len(frames.masked)
    lines = [_Line("original", frames.original[clip], fbanks.original[clip])]
    for view in range(num_views):
        name, at = f"view {view + 1}\n" if num_views > 1 else "", (view, clip)
        lines.append(_Line(f"{name}visible", frames.masked[at], fbanks.masked[at]))
        if frames.given is not None and fbanks.given is not None:
            lines.append(_Line("and the\ngiven means", frames.given[at], fbanks.given[at]))
        made = frames.reconstructed[at], fbanks.reconstructed[at]
        lines.append(_Line(f"{name}reconstructed", *made, view))
    return lines


def _show_frame(axes: "Axes", frame: Tensor) -> None:
    """(3, H, W) in 0..1; NaN pixels in the colour of nothing."""
    picture = frame.permute(1, 2, 0).clamp(0, 1).nan_to_num(HIDDEN_GREY)
    axes.imshow(picture.numpy(force=True), interpolation="nearest")
    picture_axes(axes)


def _show_fbank(axes: "Axes", fbank: Tensor, limits: tuple[float, float], rows: int | None) -> None:
    """(1, F, T), low frequencies at the bottom, in a colour scale shared by the whole figure."""
    bins, length = fbank.shape[-2:]
    axes.set_facecolor((HIDDEN_GREY,) * 3)
    axes.imshow(
        fbank[0].numpy(force=True),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
        extent=(0, length * SECONDS_PER_ROW, 0, bins),
    )
    picture_axes(axes)
    edges = mel_edges(bins)
    places = [sum(edge <= 1000 * khz for edge in edges) - 0.5 for khz in TICKS_KHZ]
    axes.set_yticks(places, [f"{khz:g}" for khz in TICKS_KHZ])
    axes.tick_params(axis="y", labelsize=7, colors=MUTED, length=2, pad=2)
    if rows is not None and rows < length:  # after the end of the sound there is nothing to see
        axes.axvspan(rows * SECONDS_PER_ROW, length * SECONDS_PER_ROW, color="white", lw=0)


def _note_error(axes: "Axes", views: Views, view: int, clip: int, *, short: bool = False) -> None:
    """The model's error and, unless `short`, what guessing without a model would have got."""
    error = views.error[view, clip]
    note = "nothing masked"
    if not torch.isnan(error):
        note = f"error {error.item():.3f}"
        for name, label in BASELINES.items():
            if name in views.errors and not short:
                note += f"   ({label}: {views.errors[name].loss[view, clip].item():.3f})"
                break
    axes.set_title(note, loc="right", pad=2, fontsize=7.5, color=MUTED)


def _label_time(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    axes.set_xlabel("seconds", fontsize=8, color=MUTED)
