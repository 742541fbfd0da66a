"""Plots of benchmark runs: a mark per provider, a line per group."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kdcmae_fast.bench.report import runs, slug
from kdcmae_fast.bench.rows import MODES, PUBLISHED, GroupRun, Run
from kdcmae_fast.figure import (
    INK,
    MUTED,
    PALETTE,
    new_figure,
    require_matplotlib,
    save_figure,
    tidy_axes,
)

MARKS = "osD^v<>PX*"
Figure = Callable[[GroupRun, str, str], float | None]  # of a group, its provider and mode


def plot_runs(groups: Sequence[GroupRun], folder: Path) -> list[Path]:
    """speed-RUN-MODE.png and, where floors were counted, floor-RUN-MODE.png; their paths."""
    require_matplotlib("the plots of kdcmae bench report")
    written: list[Path | None] = []
    for run in runs(groups):
        own = [entry for entry in groups if entry.run == run]
        for mode in MODES:
            for name, title, figure in (
                ("speed", "times as fast as the published sequence", _speed),
                ("floor", "share of the floor", _floor_share),
            ):
                path = folder / f"{name}-{slug(run)}-{mode.replace('+', '-')}.png"
                written.append(_plot(own, mode, figure, f"{title}, {mode}", run, path))
    return [path for path in written if path]


def _speed(entry: GroupRun, provider: str, mode: str) -> float | None:
    return None if provider == PUBLISHED else entry.speed(provider, mode)


def _floor_share(entry: GroupRun, provider: str, mode: str) -> float | None:
    row = entry.get(provider, mode)
    return row.number("floor_share") if row else None


def _plot(
    groups: Sequence[GroupRun], mode: str, figure: Figure, title: str, run: Run, path: Path
) -> Path | None:
    """One picture, or None where no group has the figure."""
    found = {
        entry.group: {
            provider: value
            for provider in entry.modes.get(mode, {})
            if (value := figure(entry, provider, mode))
        }
        for entry in groups
    }
    found = {group: values for group, values in found.items() if values}
    if not found:
        return None
    providers = list(dict.fromkeys(name for values in found.values() for name in values))
    picture = new_figure(9.0, 1.4 + 0.28 * len(found))
    axes = picture.add_subplot()
    for place, provider in enumerate(providers):
        points = [
            (values[provider], line) for line, values in enumerate(found.values())
            if provider in values
        ]  # fmt: skip
        axes.plot(
            *zip(*points, strict=True), MARKS[place % len(MARKS)], markersize=5,
            color=PALETTE[place % len(PALETTE)], label=provider,
        )  # fmt: skip
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xscale("log", subs=(2, 5))
    for of_axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        of_axis(lambda value, _: f"{value:g}")
    tidy_axes(axes)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(str(run), fontsize=8, color=MUTED)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save_figure(picture, path)
