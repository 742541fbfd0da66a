"""What is told of a run's training: what it is, how it went, where it came from."""

import statistics
from collections.abc import Mapping
from typing import Any

from kdcmae_fast.report.charts import LOSSES
from kdcmae_fast.report.figures import numbers, show_json, write_value
from kdcmae_fast.report.markup import Markup, definitions, details, join
from kdcmae_fast.report.reading import number, whole
from kdcmae_fast.report.run import Run

LONG = ("Date", "Commit", "Versions")  # facts that take a line each


def facts(run: Run) -> Markup:
    """Name, system, sizes, length, versions, date of a run; its settings to unfold."""
    known = {name: value for name, value in _facts(run).items() if value}
    whole = {key: run.settings[key] for key in run.settings if key != "versions"}
    return join(
        [
            definitions({name: known[name] for name in known if name not in LONG}, "facts"),
            definitions({name: known[name] for name in LONG if name in known}, "facts long"),
            details("Settings", show_json(whole)) if whole else None,
        ]
    )


def training_figures(run: Run) -> dict[str, float]:
    """The figures of training that a table of several runs shows."""
    metrics = run.metrics or {}
    found: dict[str, float] = {}
    steps = _steps_done(run)
    if steps:
        found["steps"] = steps
    if (samples := _figure(run, "samples")) is not None:
        found["samples"] = samples
    losses = numbers(metrics.get("final_losses"))
    for name, title in LOSSES.items():
        last = losses.get(name, run.log.last(name) if run.log else None)
        if last is not None:
            found[f"{title.lower().removesuffix(' loss')} loss"] = last
    if (speed := _clips_per_second(run)) is not None:
        found["clips per second"] = speed
    return found


def _facts(run: Run) -> dict[str, str | None]:
    name, preset = run.setting("config", "name"), run.setting("config", "preset")
    started, finished = run.started, run.finished
    date = None
    if started and finished:
        same_day = started.date() == finished.date()
        end = f"{finished:%H:%M}" if same_day else f"{finished:%d %b %Y, %H:%M}"
        date = f"{started:%d %b %Y, %H:%M} to {end} UTC (times of its files)"
    batch = run.setting("deepspeed", "train_micro_batch_size_per_gpu")
    world = whole((run.metrics or {}).get("world_size"))
    samples, speed = _figure(run, "samples"), _clips_per_second(run)
    return {
        "System": _words(name) and f"{name}, preset {_words(preset) or 'none'}",
        "Parameters": f"{run.parameters:,}" if run.parameters else None,
        "Steps": _steps(run),
        "Clips seen": f"{samples:,.0f}" if samples is not None else None,
        "Processes": write_value(world) if world is not None else None,
        "Batch per process": write_value(batch) if isinstance(batch, int) else None,
        "Throughput": f"{speed:,.1f} clips per second (median)" if speed is not None else None,
        "Clips": _clips(run),
        "Bad clips": _bad(run),
        "Seed": _words(run.setting("config", "train", "seed")),
        "Date": date,
        "Commit": _words(run.setting("git_commit")),
        "Versions": _versions(run.setting("versions")),
    }


def _steps_done(run: Run) -> int | None:
    done = whole((run.metrics or {}).get("steps"))
    return run.log.last_step if done is None and run.log else done


def _steps(run: Run) -> str | None:
    done = _steps_done(run)
    if done is None:
        return None
    planned = whole(run.setting("config", "train", "steps"))
    if run.metrics is None:
        of = f" of {planned:,}" if planned else ""
        return f"{done:,}{of} (not finished: no metrics.json)"
    return f"{done:,}"


def _clips_per_second(run: Run) -> float | None:
    found = number((run.metrics or {}).get("clips_per_second"))
    if found is not None or run.log is None:
        return found
    rates = [value for _, value in run.log.curves.get("clips_per_second", [])[1:]]
    return statistics.median(rates) if rates else None


def _figure(run: Run, name: str) -> float | None:
    found: float | None = whole((run.metrics or {}).get(name))
    return found if found is not None or run.log is None else run.log.last(name)


def _clips(run: Run) -> str | None:
    data = run.setting("config", "data")
    if not isinstance(data, Mapping):
        return None
    source, path = _words(data.get("source")), _words(data.get("path"))
    if source == "synthetic":
        return f"{write_value(data.get('num_clips'))} synthetic"
    return " ".join(part for part in (source, path) if part) or None


def _bad(run: Run) -> str | None:
    found = (run.metrics or {}).get("bad_clips")
    return f"{len(found):,}" if isinstance(found, list) else None


def _versions(found: Any) -> str | None:
    if not isinstance(found, Mapping):
        return None
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _words(value: object) -> str | None:
    return str(value) if isinstance(value, str | int) and value != "" else None
