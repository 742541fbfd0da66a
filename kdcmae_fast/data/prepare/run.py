"""`prepare`: from sources to a finished dataset, as far as this run's share goes."""

import csv
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdcmae_fast.data.prepare import cav_mae
from kdcmae_fast.data.prepare.inputs import (
    Input,
    Sources,
    digest_inputs,
    finish_inputs,
    label_rows,
    read_sources,
)
from kdcmae_fast.data.prepare.pool import Job, Pool
from kdcmae_fast.data.prepare.report import REPORT, Report
from kdcmae_fast.data.prepare.settings import PrepareSettings
from kdcmae_fast.data.prepare.state import begin, json_text, locked, write_file
from kdcmae_fast.data.prepare.units import Unit, UnitMaker, is_complete, probe, read_lines
from kdcmae_fast.data.shards import finish_dataset
from kdcmae_fast.data.shards.layout import LABELS, SHARDS
from kdcmae_fast.messages import require_folder, require_packages

PROBED = 64  # videos whose length a process asks for at a time
METRICS = "metrics.json"

Progress = Callable[[int, int], None]  # (inputs done, skipped among them), both increments


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    missing: units of this share that were not complete. made: those made by this run. left: units
    that are not complete now, those of other shares included. inputs_made: in the units made.
    seconds: of the run. report: of the whole dataset, None until it is finished. notes: lines for
    the user.
    """

    missing: int
    made: int
    left: int
    num_units: int
    inputs_made: int
    seconds: float
    report: Report | None
    notes: list[str]


def prepare(
    sources: Sequence[str],
    output: str | Path,
    settings: PrepareSettings,
    *,
    media_root: str = "",
    label_csv: str = "",
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    timeout: float = 0.0,
    progress: Callable[[int], Progress | None] | None = None,
) -> Outcome:
    """Make what is missing of a dataset; finish it when every unit of every share is there.

    sources: folders, videos, CSV lists, CAV-MAE manifests. output: folder. media_root: for lists
    of ids. label_csv: classes and their numbers ("": those found). workers: processes, 0: one a
    core. share: (i, n), units i, i + n, ... are ours. timeout: seconds for an input, 0: none.
    progress: called with the number of inputs to do, returns what is called as they are done.

    The files are a function of sources and settings, but for metrics.json: not of workers, shares
    or interruptions. Processes are started by `forkserver`: a script calls this under
    `if __name__ == "__main__"`. Raises ValueError for sources that are none, for settings or inputs
    other than those the folder was begun with, and when no clip came out; ModuleNotFoundError
    where a package that reads videos is not installed.
    """
    started = time.monotonic()
    root = Path(output)
    require_folder(root)
    require_packages("kdcmae prepare", "av", "soundfile", "PIL")  # or every input would be damaged
    workers = workers or _cores()
    found = read_sources(sources, settings, media_root)
    if settings.cut == "all":
        found.inputs = _cut(found.inputs, settings, workers, timeout)
    inputs = finish_inputs(found.inputs, settings.order)
    labels = label_rows(inputs, label_csv)
    settings = replace(settings, clips_per_shard=settings.unit_size(len(inputs)))
    digest = digest_inputs(inputs, labels)
    begin(root, settings.as_dict(), digest, len(inputs))

    size = settings.clips_per_shard
    num_units = math.ceil(len(inputs) / size)
    missing = [
        number
        for number in range(share[0], num_units, share[1])
        if not is_complete(root, settings, number)
    ]
    made = _make(root, settings, inputs, missing, workers, timeout, progress)
    left = sum(not is_complete(root, settings, number) for number in range(num_units))
    seconds = time.monotonic() - started
    report = None
    if not left:
        report = _finish(root, settings, num_units, labels, found, digest, bool(made))
        if made:
            _write_metrics(root, report, seconds, made, workers)
        report.require_clips()
    inputs_made = sum(min(size, len(inputs) - number * size) for number in made)
    return Outcome(
        len(missing), len(made), left, num_units, inputs_made, seconds, report, found.notes
    )


def _make(
    root: Path,
    settings: PrepareSettings,
    inputs: Sequence[Input],
    numbers: Sequence[int],
    workers: int,
    timeout: float,
    progress: Callable[[int], Progress | None] | None,
) -> list[int]:
    """Make units; returns the numbers of those that were made here."""
    size = settings.clips_per_shard
    units = [Unit(n, n * size, list(inputs[n * size : (n + 1) * size])) for n in numbers]
    advance = progress(sum(len(unit.items) for unit in units)) if progress else None
    seen = {unit.number: (0, 0) for unit in units}

    def show(number: int, done: int, skipped: int) -> None:
        if advance is not None and done >= seen[number][0]:  # a unit may be begun again
            advance(done - seen[number][0], skipped - seen[number][1])
            seen[number] = done, skipped

    pool = Pool(
        UnitMaker(root, settings),
        min(workers, len(units)),
        timeout,
        lambda job, item, skipped: show(job.number, item, skipped),
    )
    made = []
    for job, mine in pool.run(Job(unit.number, unit) for unit in units):
        show(job.number, len(job.payload.items), seen[job.number][1])
        if mine:
            made.append(job.number)
    return sorted(made)


def _cut(
    inputs: Sequence[Input], settings: PrepareSettings, workers: int, timeout: float
) -> list[Input]:
    """Inputs longer than a clip become several, one after another; a short rest is dropped."""
    videos = [item for item in inputs if not item.frames and item.skip is None]
    paths = sorted({item.path for item in videos})
    parts = [paths[i : i + PROBED] for i in range(0, len(paths), PROBED)]
    length: dict[str, float | None] = {}
    for job, seconds in Pool(probe, min(workers, len(parts)), timeout).run(
        Job(number, part) for number, part in enumerate(parts)
    ):
        length.update(zip(job.payload, seconds, strict=True))
    return [part for item in inputs for part in _parts(item, length.get(item.path), settings)]


def _parts(item: Input, length: float | None, settings: PrepareSettings) -> list[Input]:
    """Windows of one input, itself if it is no longer than a clip or nobody knows."""
    if item.frames or item.skip is not None or length is None:
        return [item]
    total = length - item.start
    if item.seconds is not None:
        total = min(total, item.seconds)
    full, rest = divmod(total, settings.seconds)
    count = int(full) + (rest >= settings.min_seconds)
    if count <= 1:
        return [item]
    starts = [round(item.start + k * settings.seconds, 6) for k in range(count)]
    return [
        replace(item, id=f"{item.id}_{start:.3f}", start=start, seconds=settings.seconds)
        for start in starts[:-1]
    ] + [
        replace(
            item,
            id=f"{item.id}_{starts[-1]:.3f}",
            start=starts[-1],
            seconds=round(min(settings.seconds, item.start + total - starts[-1]), 6),
        )
    ]


def _finish(
    root: Path,
    settings: PrepareSettings,
    num_units: int,
    labels: Sequence[tuple[int, str, str]],
    found: Sources,
    digest: str,
    made: bool,
) -> Report:
    """The report over complete units; writes what is missing of the dataset's own files."""
    with locked(root, 0):
        report = Report().add(read_lines(root, settings, num_units))
        if (root / REPORT).exists() and not made:  # it is written last
            return report
        rows = list(labels)
        if settings.layout == "shards":
            (root / SHARDS).mkdir(exist_ok=True)
            if report.clips:
                finish_dataset(root, num_units, settings.as_dict())
        elif cav_mae.write_list(root, read_lines(root, settings, num_units), settings):
            number = max((row[0] for row in rows), default=-1) + 1
            rows.append((number, cav_mae.UNLABELLED, cav_mae.UNLABELLED))
        if rows:
            write_file(root / LABELS, _csv_bytes([("index", "mid", "display_name"), *rows]))
        about = {
            "ignored_files": dict(sorted(found.ignored.items())),
            "inputs_sha256": digest,
            "settings": settings.as_dict(),
        }
        report.write(root, about)
    return report


def _write_metrics(
    root: Path, report: Report, seconds: float, made: Sequence[int], workers: int
) -> None:
    """metrics.json: the report's counts, and how fast the run was that finished the dataset."""
    run = {"units": len(made), "seconds": round(seconds, 3), "workers": workers}
    figures = {**report.figures(), "last_run": run}
    write_file(root / METRICS, json_text(figures).encode())


def _cores() -> int:
    """Cores this process may use, which in a job is not all that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _csv_bytes(rows: Sequence[Sequence[object]]) -> bytes:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue().encode("utf-8", "replace")
