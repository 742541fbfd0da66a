"""Line charts as HTML and SVG: they fit any width, any theme and paper, and need no script.

Lines are drawn in an SVG that the page stretches; labels are text beside it, so that they stay
readable on a phone. The page's script adds a read-out where a pointer is.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from kdcmae_fast.report.figures import label, write_number
from kdcmae_fast.report.log import Curve, Log
from kdcmae_fast.report.markup import Markup, data_block, element
from kdcmae_fast.report.scale import (
    SIZE,
    Scale,
    running_mean,
    step_scale,
    thin,
    value_scale,
    write_tick,
)

COLOURS = 6  # of the style sheet; more series repeat them, dashed
LOSSES = {
    "total": "Total loss",
    "mae_audio": "Audio reconstruction",
    "mae_video": "Video reconstruction",
    "contrastive": "Contrastive",
    "kd": "Self-distillation",
}
OTHERS = {
    "lr": "Learning rate",
    "clips_per_second": "Clips per second",
    "grad_norm": "Gradient norm",
}
LINEAR = {"lr", "clips_per_second"}  # never on a log scale
UNDRAWN = {"step", "epoch", "samples", "seconds_left"}
MAX_CHARTS = 24


class Logged(NamedTuple):
    """The log of a run. place: of the run on the page, which chooses its colour."""

    name: str
    place: int
    log: Log


class Series(NamedTuple):
    """One line of a chart, of the run at a place."""

    name: str
    place: int
    curve: Curve


def charts(logs: Sequence[Logged]) -> Markup:
    """A chart for each figure that any of the logs holds; the first one is wide."""
    found = {name for logged in logs for name in logged.log.curves} - UNDRAWN
    titles = {**LOSSES, **OTHERS}
    known = [name for name in titles if name in found]
    unknown = sorted(found - titles.keys())[: MAX_CHARTS - len(known)]
    drawn = []
    for place, name in enumerate([*known, *unknown]):
        series = [
            Series(logged.name, logged.place, logged.log.curves[name])
            for logged in logs
            if name in logged.log.curves
        ]
        title = titles.get(name) or label(name).replace("eval/", "Evaluation: ")
        several, linear, smooth = len(logs) > 1, name in LINEAR, name != "lr"
        shown = chart(title, series, many=several, wide=place == 0, linear=linear, smooth=smooth)
        drawn.append(shown)
    return element("div", drawn, class_="charts")


def chart(
    title: str,
    series: Sequence[Series],
    *,
    many: bool = False,
    wide: bool = False,
    linear: bool = False,
    smooth: bool = True,
) -> Markup:
    """One chart.

    many: of several runs, so that the caption cannot tell one's values. wide: across the page.
    linear: not on a log scale, however much the values differ. smooth: the running mean is the
    line, the values faint.
    """
    means = [running_mean(line.curve) if smooth else None for line in series]
    values = [value for line in series for _, value in line.curve]
    across = step_scale([step for line in series for step, _ in line.curve])
    up = value_scale(values, linear=linear)
    grid = [_rule(up.at(tick)) for tick in up.ticks(4)]
    lines: list[Markup] = []
    for line, mean in zip(series, means, strict=True):
        if mean is not None:
            lines.append(_path(line, thin(line.curve), across, up, "raw"))
        lines.append(_path(line, thin(mean or line.curve), across, up, "line"))
    drawing = element(
        "svg", grid, lines, viewBox="0 0 1000 1000", preserveAspectRatio="none", aria_hidden="true"
    )
    told = _told(series, means)
    scale = element("span", "log scale", class_="scale") if up.log else None
    plot = element(
        "div",
        element("div", [_label(up, tick) for tick in up.ticks(4)], class_="up"),
        element("div", drawing, scale, class_="drawing"),
        element("div", [_label(across, t, "left") for t in across.ticks(5)], class_="across"),
        class_="plot",
        role="img",
        aria_label=f"{title} over {across.high:,.0f} steps. " + "; ".join(told),
    )
    change = "" if many else _change(title, series[0].curve, told[0])
    caption = element("figcaption", element("b", title), element("span", change, class_="change"))
    points = [
        {"name": line.name, "place": line.place, "points": thin(mean or line.curve)}
        for line, mean in zip(series, means, strict=True)
    ]
    data = {"steps": across[:2], "values": up[:2], "log": up.log, "many": many, "series": points}
    return element(
        "figure", caption, plot, data_block(data), class_="chart wide" if wide else "chart"
    )


def legend(logs: Sequence[Logged]) -> Markup:
    """Names of runs with their colours."""
    keys = [
        element("li", element("span", class_=f"swatch {colour(place)}"), name, data_place=place)
        for name, place, _ in logs
    ]
    return element("ul", keys, class_="legend", aria_label="Runs and their colours")


def colour(place: int) -> str:
    """Classes of the style sheet for the run at a place."""
    return f"s{place % COLOURS}" + (" dashed" if place >= COLOURS else "")


def _path(line: Series, curve: Curve, across: Scale, up: Scale, kind: str) -> Markup:
    points = [(SIZE * across.at(step), SIZE - SIZE * up.at(value)) for step, value in curve]
    if len(points) == 1:  # a line without length: its round ends make a dot
        points *= 2
    drawn = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", d=drawn, class_=f"{kind} {colour(line.place)}", data_place=line.place)


def _rule(share: float) -> Markup:
    height = f"{SIZE - SIZE * share:.1f}"
    return element("path", d=f"M0 {height}H1000", class_="rule")


def _label(scale: Scale, tick: float, side: str = "bottom") -> Markup:
    return element("span", write_tick(tick), style=f"{side}:{100 * scale.at(tick):.2f}%")


def _change(title: str, curve: Curve, told: str) -> str:
    """What one line says beside its title."""
    values = [value for _, value in curve]
    if title == OTHERS["lr"]:
        return f"peak {max(values):.3g}"
    if title == OTHERS["clips_per_second"]:
        return f"median {write_number(statistics.median(values))}"
    return told.partition(": ")[2]


def _told(series: Sequence[Series], means: Sequence[Curve | None]) -> list[str]:
    """ "name: first → last" of each line, for those who do not see it."""
    told = []
    for line, mean in zip(series, means, strict=True):
        first, last = line.curve[0][1], (mean or line.curve)[-1][1]
        told.append(f"{line.name}: {write_number(first)} → {write_number(last)}")
    return told
