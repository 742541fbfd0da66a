"""A confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdcmae_fast.figure import INK, new_figure, require_matplotlib, save_figure

NAMED = 40  # classes whose names are written
COUNTED = 12  # classes whose counts are written


def plot_confusion(
    confusion: Sequence[Sequence[int]], names: Sequence[str], out_png: str | Path
) -> Path:
    """Draw C x C counts, rows true and columns predicted, coloured by the share of their row.

    Raises ModuleNotFoundError without Matplotlib.
    """
    require_matplotlib("the confusion matrix")
    table = np.asarray(confusion, dtype=np.float64)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    count = len(table)
    size = min(12.0, 3.2 + 0.32 * min(count, NAMED))
    figure = new_figure(size + 0.6, size)
    axes = figure.add_subplot()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if count <= NAMED:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= COUNTED:
        for row, column in np.ndindex(count, count):
            if table[row, column]:
                colour = "white" if share[row, column] > 0.5 else INK
                text = f"{int(table[row, column])}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("share of the true class", fontsize=9, color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return save_figure(figure, out_png)
