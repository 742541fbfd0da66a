"""Matplotlib figures without its global state: no pyplot, no chosen back-end, no rcParams.

Matplotlib is an extra (`pip install kdcmae-fast[plots]`); it is imported when a figure is made.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
MUTED = "#777777"
GRID = "#e6e6e6"
PALETTE = ("#20639b", "#e07b39", "#3c8d5a", "#8e5ea2", "#c0392b", "#7f8c8d")


def require_matplotlib(purpose: str) -> None:
    """Raise ModuleNotFoundError, saying how to install it, where there is no Matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs Matplotlib; `pip install matplotlib` (the extra kdcmae-fast[plots])",
            name=error.name,
        ) from error


def new_figure(width: float, height: float) -> "Figure":
    """An empty white figure that draws itself with Agg. width, height: inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | Path, *, dpi: int = 120) -> Path:
    """Write a PNG, making its folder; dpi: pixels per inch. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, format="png")
    return path


def tidy_axes(axes: "Axes") -> None:
    """Light grid, no box: for curves."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")
    axes.tick_params(colors=INK, labelsize=9, length=0)


def picture_axes(axes: "Axes") -> None:
    """No ticks and a thin frame: for images."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
        spine.set_linewidth(0.6)
