"""A run's folder: its settings, its log, and every evaluation written inside it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kdcmae_fast.report.log import Log, read_log
from kdcmae_fast.report.reading import Unreadable, count_parameters, read_json

SKIPPED = {"checkpoints", "tensorboard", "model"}  # large, and never a place of evaluations
MAX_EVALUATIONS = 200
ORDER = ("pretrain", "finetune", "probe", "retrieve", "localize", "score", "inpaint", "reconstruct")


@dataclass
class Evaluation:
    """What a metrics.json says.

    folder: where it is. place: the same, relative to the run ("" at its top). log: of training, as
        fine-tuning leaves one.
    """

    command: str
    folder: Path
    place: str
    metrics: dict[str, Any]
    log: Log | None = None


@dataclass
class Run:
    """A folder that `kdcmae pretrain` or `kdcmae finetune` wrote, or one of evaluations alone."""

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    log: Log | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    parameters: int | None = None
    started: datetime | None = None
    finished: datetime | None = None

    def setting(self, *keys: str) -> Any:
        """A setting by its path, as `setting("config", "train", "steps")`; None without it."""
        return dig(self.settings, *keys)


def dig(found: Any, *keys: str) -> Any:
    """The value at a path of keys in nested objects; None where it ends early."""
    for key in keys:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in `folders`, with names that differ; ValueError naming one that is none."""
    if not folders:
        raise ValueError("no run is named; give the folder that `kdcmae pretrain` wrote")
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path) for path in paths]
    known: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in known:
            raise ValueError(f"{path} is named twice (also as {known[path.resolve()]})")
        known[path.resolve()] = path
    for run, name in zip(runs, _distinct(paths), strict=True):
        run.name = name
    return runs


def read_run(folder: str | Path) -> Run:
    """One run's folder; ValueError if it holds neither a log nor an evaluation.

    Files that are damaged are named in `problems`.
    """
    path = Path(folder)
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {state}; give the folder that `kdcmae pretrain` wrote")
    run = Run(path, path.resolve().name)
    _read_training(run)
    for place in _metrics_files(run):
        _read_evaluation(run, place)
    run.evaluations.sort(key=_order)
    if not (run.log or run.settings or run.metrics or run.evaluations or run.problems):
        raise ValueError(
            f"{path} is no run: it has no log.jsonl, and no metrics.json of an evaluation in it; "
            "give the folder that `kdcmae pretrain` wrote"
        )
    return run


def _read_training(run: Run) -> None:
    config, log = run.folder / "config.json", run.folder / "log.jsonl"
    if config.is_file():
        try:
            run.settings = read_json(config)
            run.started = _written(config)
        except Unreadable as error:
            run.problems.append(f"config.json {error}")
    if log.is_file():
        try:
            run.log = read_log(log)
            run.finished = _written(log)
            run.problems += run.log.problems
        except Unreadable as error:
            run.problems.append(f"log.jsonl {error}")
    run.parameters = count_parameters(run.folder / "model" / "model.safetensors")


def _read_evaluation(run: Run, folder: Path) -> None:
    place = folder.relative_to(run.folder).as_posix().removeprefix(".")
    name = f"{place}/metrics.json".removeprefix("/")
    try:
        if not (folder / "metrics.json").resolve().is_relative_to(run.folder.resolve()):
            raise Unreadable("is refused: it leads out of the run's folder")
        metrics = read_json(folder / "metrics.json")
        command = metrics.get("command")
        if not isinstance(command, str) or not command:
            raise Unreadable('has no "command": no evaluation of this package')
    except Unreadable as error:
        run.problems.append(f"{name} {error}")
        return
    trains = command in ("pretrain", "finetune")
    if trains and not place:
        run.metrics = metrics
        if not run.settings:
            keys = ("config", "deepspeed", "versions", "git_commit")
            run.settings = {key: metrics[key] for key in keys if key in metrics}
    if command == "pretrain" and not place:
        return
    evaluation = Evaluation(command, folder, place, metrics)
    if trains and place:
        try:
            evaluation.log = read_log(folder / "log.jsonl")
            run.problems += [f"{place}/{problem}" for problem in evaluation.log.problems]
        except Unreadable as error:
            run.problems.append(f"{place}/log.jsonl {error}")
    run.evaluations.append(evaluation)


def _metrics_files(run: Run) -> Iterator[Path]:
    """Folders with a metrics.json, in order of their names; symbolic links are not followed."""

    def unreadable(error: OSError) -> None:
        run.problems.append(f"{error.filename} cannot be read: {error.strerror}")

    found = 0
    for folder, names, files in os.walk(run.folder, onerror=unreadable):
        names[:] = sorted(n for n in names if n not in SKIPPED and not n.startswith("."))
        if "metrics.json" not in files:
            continue
        found += 1
        if found > MAX_EVALUATIONS:
            run.problems.append(f"only the first {MAX_EVALUATIONS} metrics.json are shown")
            return
        yield Path(folder)


def _order(evaluation: Evaluation) -> int:
    """Figures before pictures; commands that are not known here last, in order of their folders."""
    return ORDER.index(evaluation.command) if evaluation.command in ORDER else len(ORDER)


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell all apart."""
    resolved = [path.resolve() for path in paths]
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]
