"""A report on results files: report.md, plots of speed and of the share of the floor."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcmae_fast.bench.markdown import (
    comparison,
    markdown,
    megabytes,
    milliseconds,
    percent,
    times,
)
from kdcmae_fast.bench.rows import MODES, PUBLISHED, GroupRun, Row, Run, group_runs, read_rows
from kdcmae_fast.messages import require_folder

HEAD = (
    "provider", "mode", "median ms", "p20-p80", "speed", "wall ms", "graph ms", "launches",
    "samples/s", "MFU", "of the floor", "saved MB", "peak MB",
)  # fmt: skip
NOTES = """\
Speed: the published sequence's median over the row's, from the same run; below 1 is a loss. Floor:
the longer of the op's least memory traffic at this machine's copy rate and its matrix products at
its GEMM rate, both measured in the same run; a result that stays in a cache can be above 100 %.
Saved: bytes kept for the backward pass, inputs included. Peak: allocated above the start of the
step."""


def write_report(files: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """OUTPUT/report.md, OUTPUT/*.png and OUTPUT/metrics.json, whose content is returned.

    Raises ValueError for files without rows, ModuleNotFoundError without Matplotlib.
    """
    from kdcmae_fast.bench.plots import plot_runs

    require_folder(output)
    groups = _groups(files)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plot_runs(groups, folder)
    shown = [f"![{picture.stem}]({picture.name})" for picture in pictures]
    text = "\n\n".join([_text(groups), *shown])
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    metrics = {
        "files": [str(file) for file in files],
        "pictures": [picture.name for picture in pictures],
        "runs": [_run_metrics(run, groups) for run in runs(groups)],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def report_text(files: Sequence[str | Path]) -> str:
    """The report's Markdown, without plots."""
    return _text(_groups(files))


def runs(groups: Sequence[GroupRun]) -> list[Run]:
    """The runs, in order."""
    return list(dict.fromkeys(entry.run for entry in groups))


def slug(run: Run) -> str:
    """A run's part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{Path(run.file).stem} {run.started}".lower()).strip("-")


def _groups(files: Sequence[str | Path]) -> list[GroupRun]:
    groups = group_runs(read_rows(files))
    if not groups:
        raise ValueError(f"no rows in {', '.join(map(str, files)) or 'no file'}")
    return groups


def _text(groups: Sequence[GroupRun]) -> str:
    parts = ["# Benchmarks", NOTES]
    for run in runs(groups):
        parts += [f"## {run}", *_machine(run, groups)]
        own = [entry for entry in groups if entry.run == run]
        for entry in own:
            parts += [f"### {entry.group}", "\n".join(_rows(entry))]
        providers = dict.fromkeys(row.provider for entry in own for row in _all(entry))
        summary = comparison([(entry.group, entry) for entry in own], list(providers))
        parts += ["### Summary", "\n".join(summary)]
    return "\n\n".join(parts)


def _machine(run: Run, groups: Sequence[GroupRun]) -> list[str]:
    """One line of the run's measured ceilings, where its rows have them."""
    rows = [row for entry in groups if entry.run == run for row in _all(entry)]
    copy = next((row.number("copy_gb_s") for row in rows if row.number("copy_gb_s")), None)
    gemm = {
        row.more["dtype"]: row.number("gemm_tflop_s") for row in rows if "gemm_tflop_s" in row.more
    }
    if copy is None:
        return []
    rates = ", ".join(f"{rate:.3g} TFLOP/s ({dtype})" for dtype, rate in gemm.items())
    return [f"Measured ceilings: copy {copy:.4g} GB/s, matrix product {rates}."]


def _all(entry: GroupRun) -> list[Row]:
    return [row for mode in entry.modes.values() for row in mode.values()]


def _rows(entry: GroupRun) -> list[str]:
    cells = []
    for mode in MODES:
        for provider, row in entry.modes.get(mode, {}).items():
            speed = entry.speed(provider, mode)
            cells.append([
                provider,
                mode,
                milliseconds(row.median_ms),
                f"{milliseconds(row.p20_ms)}-{milliseconds(row.p80_ms)}",
                "" if speed is None or provider == PUBLISHED else times(speed),
                _time(row, "wall_ms"),
                _time(row, "graph_ms"),
                "" if row.number("launches") is None else str(row.more["launches"]),
                _rate(row),
                percent(row.number("mfu")),
                percent(row.number("floor_share")),
                _size(row, "saved_for_backward_bytes"),
                _size(row, "peak_bytes"),
            ])  # fmt: skip
    return markdown(HEAD, cells)


def _time(row: Row, name: str) -> str:
    value = row.number(name)
    return "" if value is None else milliseconds(value)


def _rate(row: Row) -> str:
    value = row.number("samples_per_second")
    return "" if value is None else f"{value:.4g}"


def _size(row: Row, name: str) -> str:
    value = row.number(name)
    return "" if value is None else megabytes(value)


def _run_metrics(run: Run, groups: Sequence[GroupRun]) -> dict[str, Any]:
    figures = {
        entry.group: {
            mode: {who: _figures(row, entry.speed(who, mode)) for who, row in found.items()}
            for mode, found in entry.modes.items()
        }
        for entry in groups
        if entry.run == run
    }
    return {**run._asdict(), "groups": figures}


def _figures(row: Row, speed: float | None) -> dict[str, Any]:
    """What metrics.json tells of one row."""
    names = ("wall_ms", "graph_ms", "launches", "bytes", "flops", "floor_ms", "floor_share",
             "peak_bytes", "saved_for_backward_bytes", "samples_per_second", "mfu")  # fmt: skip
    figures: dict[str, Any] = {
        "median_ms": row.median_ms, "p20_ms": row.p20_ms, "p80_ms": row.p80_ms, "speed": speed,
    }  # fmt: skip
    return figures | {name: row.more[name] for name in names if row.more.get(name) is not None}
