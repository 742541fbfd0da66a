"""Pictures of similarities: of a clip's moments with each other, and of clips with clips."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.evaluation.scoring import ClipScore, offset_sentence
from kdcmae_fast.figure import INK, MUTED, PALETTE, new_figure, save_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = "viridis"
MOST_LABEL = 28  # characters of a file's name on an axis
MOST_VALUES = 12  # rows and columns up to which cells show their numbers
MOST_INCHES = 11.0  # of the matrix a side; beyond that its cells get smaller
MOST_NAMES = 50  # on an axis, evenly spread over more


def draw_score(path: str | Path, title: str, score: ClipScore, times: Tensor) -> Path:
    """The T x T matrix with seconds on both axes, or the T similarities of a model without one.

    times: (T,) seconds of the frames. Returns the path.
    """
    if score.matrix is None:
        return _draw_curve(path, title, score, times)
    figure = new_figure(6.2, 5.6)
    figure.suptitle(title, fontsize=12, color=INK, x=0.02, ha="left")
    axes = figure.subplots()
    seconds = times.double().numpy()
    edges = _edges(seconds)
    mesh = axes.pcolormesh(edges, edges, score.matrix.numpy(), cmap=COLOURS, rasterized=True)
    axes.set_aspect("equal")
    axes.plot(seconds, seconds, color="white", linewidth=1.2, linestyle=":", label="in sync")
    if score.offset:
        shift = score.offset_seconds or 0.0
        reach = np.array([max(edges[0], edges[0] - shift), min(edges[-1], edges[-1] - shift)])
        label = f"best offset, {shift:+.1f} s"
        axes.plot(reach + shift, reach, color=PALETTE[1], linewidth=1.8, label=label)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(edges[0], edges[-1])
    axes.set_xlabel("picture: time of the frame, seconds", fontsize=9, color=INK)
    axes.set_ylabel("sound around this time, seconds", fontsize=9, color=INK)
    says = textwrap.fill(offset_sentence(score), 84)
    axes.set_title(says, loc="left", fontsize=9, color=MUTED)
    axes.legend(loc="lower right", fontsize=8, framealpha=0.85)
    _colour_bar(axes, mesh)
    return save_figure(figure, path)


def draw_pairs(
    path: str | Path, matrix: Tensor, rows: Sequence[str], columns: Sequence[str]
) -> Path:
    """Similarities (R, C) of the sound of each row's clip with the picture of each column's."""
    wide, high = min(0.62 * len(columns), MOST_INCHES), min(0.45 * len(rows), MOST_INCHES)
    figure = new_figure(3.4 + wide, 2.1 + high)
    axes = figure.subplots()
    values = matrix.numpy()
    image = axes.imshow(values, cmap=COLOURS, aspect="auto", interpolation="nearest")
    columns, rows = ([_shortened(name) for name in names] for names in (columns, rows))
    named = slice(None, None, -(-len(columns) // MOST_NAMES))
    turn = 40 if len(columns) <= MOST_VALUES else 90
    places, ends = range(len(columns))[named], "right" if turn == 40 else "center"
    axes.set_xticks(places, columns[named], rotation=turn, ha=ends, fontsize=8)
    named = slice(None, None, -(-len(rows) // MOST_NAMES))
    axes.set_yticks(range(len(rows))[named], rows[named], fontsize=8)
    axes.set_xlabel("picture of", fontsize=9, color=INK)
    axes.set_ylabel("sound of", fontsize=9, color=INK)
    best = values.argmax(1)
    size = min(11.0, 60 * min(wide / len(columns), high / len(rows)))  # points, within a cell
    axes.plot(best, range(len(rows)), "o", markersize=size, fillstyle="none", color=PALETTE[1])
    figure.suptitle("circled: best of the row", fontsize=9, color=MUTED, x=0.02, ha="left")
    if max(values.shape) <= MOST_VALUES:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < middle else INK
            text = f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    _colour_bar(axes, image)
    return save_figure(figure, path)


def _draw_curve(path: str | Path, title: str, score: ClipScore, times: Tensor) -> Path:
    figure = new_figure(7.0, 3.2)
    axes = figure.subplots()
    axes.plot(times.numpy(), score.frames.numpy(), "o-", color=PALETTE[0], linewidth=1.6)
    axes.axhline(score.similarity, color=MUTED, linewidth=0.9, linestyle="--")
    tidy_axes(axes)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_title(f"mean {score.similarity:.3f}", loc="right", fontsize=9, color=MUTED)
    axes.set_xlabel("time of the frame, seconds", fontsize=9, color=INK)
    axes.set_ylabel("cosine with the clip's sound", fontsize=9, color=INK)
    return save_figure(figure, path)


def _edges(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T + 1,) borders halfway between frames; frames shown twice get a sliver of a cell."""
    if len(seconds) == 1:
        return np.array([seconds[0] - 0.5, seconds[0] + 0.5])
    rising = np.maximum.accumulate(seconds + 1e-6 * np.arange(len(seconds)))
    between = (rising[1:] + rising[:-1]) / 2
    first, last = 2 * rising[0] - between[0], 2 * rising[-1] - between[-1]
    return np.concatenate([[first], between, [last]])


def _colour_bar(axes: "Axes", drawn: object) -> None:
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.85)  # type: ignore[arg-type]
    bar.ax.tick_params(labelsize=8, length=0, colors=INK)
    bar.outline.set_visible(False)
    bar.set_label("cosine", fontsize=8, color=MUTED)


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_LABEL else f"...{name[3 - MOST_LABEL :]}"
