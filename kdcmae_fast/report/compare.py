"""Several runs side by side: their figures, with the best of each marked, and what differs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdcmae_fast.report.evaluations import headline, title
from kdcmae_fast.report.figures import better, label, write_number
from kdcmae_fast.report.markup import Child, Markup, details, element, join, table
from kdcmae_fast.report.run import Evaluation, Run
from kdcmae_fast.report.training import training_figures

SHOWN_DIFFERENCES = 12
# What figures depend on beside the model; where it differs, no run is the better one.
CONDITIONS = (
    "clips_of", "num_clips", "seed", "ties", "strategy", "num_frames", "time_base", "hidden",
    "tested_on", "classifier", "modality", "mode",
)  # fmt: skip
LISTS = ("source", "path", "label_csv")  # of the data settings: which clips there are


def comparison(runs: Sequence[Run]) -> Markup:
    """Figures of all runs in one table: training, then each kind of evaluation."""
    head = [element("th", "", scope="col"), *(element("th", run.name, scope="col") for run in runs)]
    groups = [_training_group(runs)]
    for name, found in _evaluations(runs).items():
        same = _same_conditions([entry for entry in found if entry is not None])
        rows = [headline(entry.metrics) if entry else {} for entry in found]
        if not any(rows):
            continue
        note = "" if same else "measured on different clips or otherwise: no best is marked"
        groups.append(_group(name, note, rows, marked=same))
    whole = element(
        "table",
        element("thead", element("tr", head)),
        *groups,
        style=f"--runs:{len(runs)}",
    )
    return element("div", whole, class_="scroll compared", tabindex="0", role="region",
                   aria_label="Figures of all runs")  # fmt: skip


def differences(runs: Sequence[Run]) -> Markup:
    """Settings and versions that are not the same in all runs."""
    flat = [dict(_flat(run.settings)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows: list[list[Child]] = []
    for key in keys:
        values = [settings.get(key) for settings in flat]
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1:
            name = element("code", key.removeprefix("config."))
            rows.append([name, *(_short(value) for value in values)])
    if not rows:
        return element("p", "The runs have the same settings, versions and commit.", class_="note")
    head = ["Setting", *(run.name for run in runs)]
    shown = table(head, rows[:SHOWN_DIFFERENCES], caption="Settings that differ")
    if len(rows) <= SHOWN_DIFFERENCES:
        return shown
    rest = table(head, rows[SHOWN_DIFFERENCES:], caption="Further settings that differ")
    return join([shown, details(f"{len(rows) - SHOWN_DIFFERENCES} more settings differ", rest)])


def _training_group(runs: Sequence[Run]) -> Markup:
    """Training's figures. Losses are of one scale only where the model's settings are the same."""
    models = {json.dumps(_objective(run), sort_keys=True, default=str) for run in runs}
    same = len(models) == 1
    note = "losses of the last logged step"
    if not same:
        note += "; the models or their data differ: no best is marked"
    return _group("Training", note, [training_figures(run) for run in runs], marked=same)


def _objective(run: Run) -> list[Any]:
    data = _lists(run.setting("config", "data"))
    return [run.setting("config", "name"), run.setting("config", "model"), data]


def _lists(data: object) -> object:
    """The part of the data settings that says which clips there are."""
    return [data.get(key) for key in LISTS] if isinstance(data, Mapping) else None


def _evaluations(runs: Sequence[Run]) -> dict[str, list[Evaluation | None]]:
    """Of each kind, the evaluation of each run; by folder too where a run has several of a kind."""
    several = {
        evaluation.command
        for run in runs
        for evaluation in run.evaluations
        if sum(other.command == evaluation.command for other in run.evaluations) > 1
    }
    found: dict[str, list[Evaluation | None]] = {}
    for column, run in enumerate(runs):
        for evaluation in run.evaluations:
            key = title(evaluation)
            if evaluation.command in several:
                key += f", {evaluation.place or 'at the top'}"
            found.setdefault(key, [None] * len(runs))[column] = evaluation
    return found


def _same_conditions(evaluations: Sequence[Evaluation]) -> bool:
    found = []
    for metrics in (evaluation.metrics for evaluation in evaluations):
        clips = metrics.get("clips")
        own = [metrics.get(key) for key in CONDITIONS] + [_lists(metrics.get("data"))]
        found.append([*own, len(clips) if isinstance(clips, list) else None])
    return all(conditions == found[0] for conditions in found)


def _group(
    title: str, note: str, figures: Sequence[Mapping[str, float]], *, marked: bool
) -> Markup:
    """A `<tbody>`: a line that names it, then a line for each figure that any run has."""
    said = element("span", note, class_="note") if note else None
    first = element("th", title, said, scope="rowgroup", colspan=len(figures) + 1)
    rows = [element("tr", first, class_="group")]
    for name in dict.fromkeys(name for row in figures for name in row):
        values = [row.get(name) for row in figures]
        best = _best(name, values) if marked else None
        cells = [_figure(value, name, best is not None and value == best) for value in values]
        rows.append(element("tr", element("th", label(name), scope="row"), cells))
    return element("tbody", rows)


def _best(name: str, values: Sequence[float | None]) -> float | None:
    """The best of a row; None where nothing can be better, or where all are equal."""
    known = [value for value in values if value is not None and value == value]
    sign = better(name)
    if sign == 0 or len(known) < 2 or min(known) == max(known):
        return None
    return max(known) if sign > 0 else min(known)


def _figure(value: float | None, name: str, is_best: bool) -> Markup:
    shown = "–" if value is None else write_number(value, name)
    if not is_best:
        return element("td", shown)
    return element("td", element("span", "best ", class_="best"), element("b", shown))


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    shown = "–" if value is None else shown
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
