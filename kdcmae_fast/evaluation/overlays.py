"""Heat maps over frames, as pictures and as videos with the clip's sound."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.evaluation.video_file import write_video
from kdcmae_fast.figure import INK, MUTED, new_figure, picture_axes, save_figure

Picture = NDArray[np.uint8]
Boxes = Sequence[tuple[float, float, float, float]]

COLOURS = "turbo"
STRENGTH = 0.55  # of the heat over the frame
BOX = (255, 255, 255)
VIDEO_SIZE = 256  # pixels a side of each half of a video


class Panel(NamedTuple):
    """One heat map of a picture: its name, values (S, S) in 0..1, and what to say of it."""

    title: str
    heat: NDArray[np.float32]
    note: str = ""


def heat_over(frame: Picture, heat: NDArray[np.floating], *, strength: float = STRENGTH) -> Picture:
    """(S, S, 3) frame under the colours of (S, S) `heat` in 0..1, high is red; NaN shows nothing.

    strength: of the heat, 0 to 1.
    """
    from matplotlib import colormaps

    colours = colormaps[COLOURS](np.nan_to_num(np.clip(heat, 0, 1)))[..., :3] * 255
    share = np.where(np.isnan(heat), 0.0, strength)[..., None]
    return np.asarray(np.rint((1 - share) * frame + share * colours), dtype=np.uint8)


def draw_boxes(picture: Picture, boxes: Boxes, *, width: int = 2) -> Picture:
    """A copy with the outlines of boxes x0, y0, x1, y1 in pixels of the picture."""
    drawn = picture.copy()
    size = picture.shape[0]
    for box in boxes:
        x0, y0, x1, y1 = (round(min(max(v, 0), size)) for v in box)
        if x0 >= x1 or y0 >= y1:
            continue
        inner = np.zeros(picture.shape[:2], dtype=bool)
        inner[y0:y1, x0:x1] = True
        inner[y0 + width : y1 - width, x0 + width : x1 - width] = False
        drawn[inner] = BOX
    return drawn


def draw_overlay(
    path: str | Path, title: str, frame: Picture, boxes: Boxes, panels: Sequence[Panel]
) -> Path:
    """A PNG: the frame with its boxes, then each panel's heat over it.

    frame: (S, S, 3). boxes: in its pixels. Returns the path.
    """
    count = 1 + len(panels)
    figure = new_figure(2.3 * count + 0.2, 3.1)
    figure.suptitle(title, fontsize=11, color=INK, x=0.02, ha="left")
    pictures = [("the frame", "box: what sounds", draw_boxes(frame, boxes))]
    pictures += [
        (panel.title, panel.note, draw_boxes(heat_over(frame, panel.heat), boxes))
        for panel in panels
    ]
    for axes, (name, note, picture) in zip(
        figure.subplots(1, count, squeeze=False)[0], pictures, strict=True
    ):
        axes.imshow(picture, interpolation="nearest")
        picture_axes(axes)
        axes.set_title(name, loc="left", fontsize=9, color=INK, pad=3)
        axes.set_xlabel(note, loc="left", fontsize=8, color=MUTED)
    return save_figure(figure, path)


def write_overlay_video(
    path: str | Path,
    frames: Picture,
    heats: NDArray[np.floating],
    boxes: Sequence[Boxes],
    times: NDArray[np.float64],
    waveform: NDArray[np.float32],
) -> Path:
    """An MP4: the frame left, the heat over it right, each frame at its time, with the sound.

    frames: (T, S, S, 3). heats: (T, S, S) in 0..1. boxes: those of each frame, in pixels of S.
    times: (T,) seconds from the sound's start. waveform: (N,) at 16 kHz. Returns the path.
    """
    pictures = (_side_by_side(*shown) for shown in zip(frames, heats, boxes, strict=True))
    return write_video(path, pictures, times, waveform)


def _side_by_side(frame: Picture, heat: NDArray[np.floating], boxes: Boxes) -> Picture:
    left = draw_boxes(frame, boxes)
    right = draw_boxes(heat_over(frame, heat), boxes)
    return np.concatenate([_resized(left), _resized(right)], axis=1)


def _resized(picture: Picture) -> Picture:
    from PIL import Image

    size = (VIDEO_SIZE, VIDEO_SIZE)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
