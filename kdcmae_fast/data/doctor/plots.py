"""Durations, levels and classes of a dataset, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcmae_fast.data.doctor.media_checks import decibel, values_of
from kdcmae_fast.data.doctor.probe import ClipFacts
from kdcmae_fast.figure import INK, MUTED, PALETTE, new_figure, save_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
LEVEL_STEP = 2.0  # dB
NAMED_CLASSES = 40  # more than that are a curve without names


def plot_dataset(
    facts: Sequence[ClipFacts],
    histogram: Mapping[str, int],
    names: Mapping[str, str],
    clip_seconds: float,
    folder: Path,
) -> list[Path]:
    """Write durations.png, levels.png and classes.png, those there is something for; their paths.

    histogram: clips of each class. names: of classes, for people. clip_seconds: the longest sound
        a clip uses.
    """
    written = []
    if seconds := values_of(facts, lambda fact: fact.properties.seconds):
        written.append(_durations(seconds, clip_seconds, folder / "durations.png"))
    good = [fact for fact in facts if not fact.reason]
    if good:
        written.append(_levels(good, folder / "levels.png"))
    if histogram:
        named = [(names.get(mid, mid), count) for mid, count in histogram.items()]
        written.append(_classes(named, folder / "classes.png"))
    return written


def _durations(seconds: list[float], clip_seconds: float, path: Path) -> Path:
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    end = 1.1 * max(*seconds, clip_seconds)
    axes.hist(seconds, bins=np.linspace(0, end, BINS + 1).tolist(), color=PALETTE[0])
    axes.axvline(clip_seconds, color=PALETTE[1], linewidth=1.4)
    axes.annotate(
        f"a clip: {clip_seconds:.2f} s ",
        (clip_seconds, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        ha="right",
        fontsize=9,
        color=PALETTE[1],
    )
    _label(axes, f"durations of {len(seconds):,} clips", "seconds of sound", "clips")
    return save_figure(figure, path)


def _levels(facts: Sequence[ClipFacts], path: Path) -> Path:
    figure = new_figure(6.4, 3.6)
    axes = figure.add_subplot()
    means, peaks = [decibel(f.rms) for f in facts], [decibel(f.peak) for f in facts]
    first = LEVEL_STEP * (min(means) // LEVEL_STEP)
    edges = np.arange(first, max(*peaks, 0.0) + 2 * LEVEL_STEP, LEVEL_STEP)
    for label, colour, values in (("mean level", PALETTE[0], means), ("peak", PALETTE[1], peaks)):
        axes.hist(values, bins=edges.tolist(), color=colour, alpha=0.65, label=label)
    axes.legend(frameon=False, fontsize=9)
    _label(axes, f"levels of {len(facts):,} clips", "dBFS", "clips")
    return save_figure(figure, path)


def _classes(named: Sequence[tuple[str, int]], path: Path) -> Path:
    rows = sorted(named, key=lambda row: -row[1])
    counts = [count for _, count in rows]
    if len(rows) <= NAMED_CLASSES:
        figure = new_figure(6.4, 1.2 + 0.2 * len(rows))
        axes = figure.add_subplot()
        axes.barh(range(len(rows)), counts, color=PALETTE[0])
        axes.set_yticks(range(len(rows)), [name[:40] for name, _ in rows], parse_math=False)
        axes.invert_yaxis()
        _label(axes, f"clips of {len(rows)} classes", "clips", "")
    else:
        figure = new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        axes.plot(range(1, len(rows) + 1), counts, color=PALETTE[0], linewidth=1.8)
        axes.set_yscale("symlog")
        never = sum(count == 0 for count in counts)
        axes.set_title(f"{never} never seen", loc="right", fontsize=9, color=MUTED)
        _label(axes, f"clips of {len(rows)} classes", "classes, most clips first", "clips")
    return save_figure(figure, path)


def _label(axes: "Axes", title: str, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    tidy_axes(axes)
    if x == "clips":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    elif axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
