"""Curves of a run and of an evaluation, as PNG files."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from kdcmae_fast.figure import (
    INK,
    PALETTE,
    new_figure,
    require_matplotlib,
    save_figure,
    tidy_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The losses a log may hold (the names of `Losses`) and what a reader is told about each.
LOSSES = {
    "total": "total loss",
    "mae_audio": "audio reconstruction",
    "mae_video": "video reconstruction",
    "contrastive": "contrastive",
    "kd": "self-distillation",
}

LOG_SCALE_FROM = 20.0  # ratio of largest to smallest value from which a log scale reads better

Curve = tuple[list[int], list[float]]


def plot_losses(log_jsonl: str | Path, out_png: str | Path) -> Path:
    """Draw the total loss and each of its terms over the steps of a run.

    log_jsonl: one JSON object per line, with `step` and the loss names of `Losses`; lines without
        them are passed over. Where a step comes twice (a resumed run) the later line counts.
    Returns the path of the picture. Raises ValueError when the log holds no losses or a line is
    not JSON, ModuleNotFoundError without Matplotlib.
    """
    require_matplotlib("the loss plot")
    curves = read_losses(log_jsonl)
    names = [name for name in LOSSES if name in curves]
    terms = names[1:] if names[0] == "total" else names
    rows = 1 if len(terms) < 3 else 2
    columns = max(1, math.ceil(len(terms) / rows))
    figure = new_figure(5.6 + 3.0 * (columns if terms else 0), 3.9 if rows == 1 else 4.8)
    if names[0] == "total":
        grid = figure.add_gridspec(rows, columns + 2)
        _draw(figure.add_subplot(grid[:, :2]), "total", curves["total"], PALETTE[0])
    else:
        grid = figure.add_gridspec(rows, columns)
    first = 2 if names[0] == "total" else 0
    for place, name in enumerate(terms):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row, first + column])
        _draw(axes, name, curves[name], PALETTE[1 + place % (len(PALETTE) - 1)])
    return save_figure(figure, out_png)


def read_losses(log_jsonl: str | Path) -> dict[str, Curve]:
    """(steps, values) of each loss in a log, in order of step. See `plot_losses`."""
    found: dict[str, dict[int, float]] = {}
    text = Path(log_jsonl).read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                break  # the line a stopped run was writing
            raise ValueError(f"{log_jsonl}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or "step" not in record:
            continue
        for name in LOSSES.keys() & record.keys():
            found.setdefault(name, {})[int(record["step"])] = float(record[name])
    if not found:
        raise ValueError(
            f"{log_jsonl} holds no losses (lines with `step` and one of {', '.join(LOSSES)})"
        )
    return {name: _in_order(values) for name, values in found.items()}


def _in_order(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _draw(axes: "Axes", name: str, curve: Curve, colour: str) -> None:
    """One loss: every logged value, faint under a running mean where there are many."""
    from matplotlib.ticker import MaxNLocator

    steps, values = curve
    smooth = _running_mean(values)
    marker = "o" if len(values) < 2 else None
    if smooth is None:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker)
    else:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth, color=colour, linewidth=1.8)
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > LOG_SCALE_FROM:
        axes.set_yscale("log")
    tidy_axes(axes)
    axes.set_title(LOSSES[name], loc="left", fontsize=11, color=INK)
    if finite:
        change = f"{finite[0]:.3g} → {(smooth or finite)[-1]:.3g}"
        axes.set_title(change, loc="right", fontsize=9, color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimizer step", fontsize=9, color=INK)
    axes.margins(x=0.02)


def _running_mean(values: list[float]) -> list[float] | None:
    """Mean around each value, 5 % of the log wide; None for logs too short to need it."""
    reach = len(values) // 40
    if reach < 2:
        return None
    means = []
    for place in range(len(values)):
        near = values[max(0, place - reach) : place + reach + 1]
        means.append(sum(near) / len(near))
    return means
