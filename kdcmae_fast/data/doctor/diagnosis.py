"""`examine`: all findings about one dataset."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kdcmae_fast
from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.clip import ClipDataset, keyed_rng
from kdcmae_fast.data.doctor.archives import check_archives
from kdcmae_fast.data.doctor.checks import Check
from kdcmae_fast.data.doctor.list_checks import check_labels, check_list, check_overlap
from kdcmae_fast.data.doctor.lists import ClipList, display_names, guess_source, read_list
from kdcmae_fast.data.doctor.media_checks import (
    bad_interval,
    check_media,
    check_normalisation,
    check_properties,
    fbank_statistics,
)
from kdcmae_fast.data.doctor.probe import ClipFacts, Probe, probe_clips
from kdcmae_fast.data.frontend import FrontEnd
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.data.shards.layout import SHARDS
from kdcmae_fast.data.source import open_dataset

SAMPLES = 500  # clips that are read unless all are
SAMPLED_SHARDS = 32  # whose headers are read unless all are
SAMPLE_STREAM = 4  # first word of the keys of the doctor's random draws


@dataclass
class Diagnosis:
    """What was found.

    num_clips: of the dataset, None if it does not open. read: clips that were read.
    facts: one for each. histogram: clips of each class. names: of the classes, for people.
    """

    path: str
    data: DataConfig
    model: ModelConfig
    checks: list[Check]
    num_clips: int | None = None
    facts: list[ClipFacts] = field(default_factory=list)
    histogram: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def would_start(self) -> bool:
        """Whether a run starts, stays under data.max_bad_share, and no shard is damaged."""
        return all(check.result != "error" for check in self.checks)

    def metrics(self) -> dict[str, Any]:
        """The figures, as metrics.json has them."""
        bad = [fact for fact in self.facts if fact.reason]
        measured = fbank_statistics(self.facts)
        return {
            "command": "doctor",
            "version": kdcmae_fast.__version__,
            "path": self.path,
            "source": self.data.source,
            "would_start": self.would_start,
            "num_clips": self.num_clips,
            "clips_read": len(self.facts),
            "bad_clips": len(bad),
            "bad_share": len(bad) / len(self.facts) if self.facts else None,
            "bad_share_interval": bad_interval(len(bad), len(self.facts)) if self.facts else None,
            "max_bad_share": self.data.max_bad_share,
            "fbank_mean": measured[0] if measured else None,
            "fbank_std": measured[1] if measured else None,
            "checks": {c.name: {"result": c.result, "count": c.count} for c in self.checks},
        }

    def report(self) -> dict[str, Any]:
        """Everything, as doctor.json has it."""
        bad = [fact for fact in self.facts if fact.reason]
        return {
            **self.metrics(),
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "bad_clips": [{"video_id": f.video_id, "reason": f.reason} for f in bad],
            "clips_of_each_class": self.histogram,
            "data": dataclasses.asdict(self.data),
            "model": dataclasses.asdict(self.model),
        }


def examine(
    path: str,
    data: DataConfig,
    model: ModelConfig,
    *,
    seed: int = 0,
    against: str | None = None,
    samples: int | None = SAMPLES,
    epochs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Look at the dataset at `path` as a run with these settings would.

    data: its source and path are those of `path`; the rest is what the run has. Of a list or a
    folder that has pictures too, source "sounds" takes the sounds alone.
    against: another dataset that must have no clip in common. samples: clips to read, drawn at
    random; None reads all. epochs: reads of each clip, as that many epochs see it.
    progress: told how many of how many clips have been read.
    Raises ValueError for a path with nothing to examine; what is wrong in it becomes a finding.
    """
    source = guess_source(path, sounds=data.source == "sounds")
    if source == "tar":
        return Diagnosis(path, data, model, _foreign(path))
    data = dataclasses.replace(data, source=source, path=path)
    others = None if against is None else _other_list(data, against)
    found = read_list(data)
    checks = _shard_checks(data, all_of_them=samples is None) if source == "shards" else []
    checks += check_list(found)
    labels, histogram = check_labels(found)
    checks += labels
    if against is not None and others is not None:
        checks.append(check_overlap(found.rows, others, against))
    names = display_names(found.label_csv)
    diagnosis = Diagnosis(path, data, model, checks, histogram=histogram, names=names)
    try:
        dataset = open_dataset(data, model, seed=seed)
    except ValueError as error:
        advice = "a run stops with this message; correct it first, media are checked after that"
        checks.insert(0, Check("opens", "error", 1, str(error), advice=advice))
        return diagnosis
    diagnosis.num_clips = len(dataset)
    checks.insert(0, Check("opens", "ok", len(dataset), f"clips, data.source={source}"))
    _check_media(diagnosis, dataset, samples, epochs, found, progress)
    return diagnosis


def _other_list(data: DataConfig, path: str) -> ClipList:
    """The clips of another dataset."""
    source = guess_source(path)
    if source == "tar":
        raise ValueError(f"--against {path}: tar files without an index; give a dataset")
    return read_list(dataclasses.replace(data, source=source, path=path))


def _check_media(
    diagnosis: Diagnosis,
    dataset: ClipDataset,
    samples: int | None,
    epochs: int,
    found: ClipList,
    progress: Callable[[int, int], None],
) -> None:
    """Read clips, and append what they tell."""
    data, model, checks = diagnosis.data, diagnosis.model, diagnosis.checks
    plain = FrontEnd(dataclasses.replace(data, dataset_mean=0.0, dataset_std=1.0), model)
    indexes = choose(len(dataset), samples)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(indexes))

    try:
        for fact in probe_clips(Probe(dataset, plain, epochs), indexes, data.num_workers, tell):
            diagnosis.facts.append(fact)
    except RuntimeError as error:
        advice = "a run stops here too; prepare the dataset again, or remove the clip"
        checks.append(Check("bad clips", "error", 1, str(error), advice=advice))
        return
    checks += check_media(diagnosis.facts, len(dataset), data.max_bad_share)
    checks += check_properties(diagnosis.facts, found.source, data, model)
    checks.append(check_normalisation(diagnosis.facts, data))


def choose(total: int, samples: int | None) -> Sequence[int]:
    """Which of `total` to look at: all, or `samples` of them at random, in order."""
    if samples is None or samples >= total:
        return range(total)
    rng = keyed_rng(0, SAMPLE_STREAM, total)
    return sorted(rng.choice(total, samples, replace=False).tolist())


def _shard_checks(data: DataConfig, *, all_of_them: bool) -> list[Check]:
    root = Path(data.path)
    tars = sorted((root / SHARDS).glob("*.tar"))
    chosen = [tars[i] for i in choose(len(tars), None if all_of_them else SAMPLED_SHARDS)]
    return check_archives(chosen, root, of=0 if len(chosen) == len(tars) else len(tars))


def _foreign(path: str) -> list[Check]:
    """Of tar files that `kdcmae prepare` did not make: whether they are safe and whole."""
    target = Path(path)
    tars = [target] if target.is_file() else sorted(target.rglob("*.tar"))
    advice = "unpack them and run `kdcmae prepare` on the videos"
    detail = f"{len(tars)} tar files that `kdcmae prepare` did not make; a run cannot read them"
    return [Check("opens", "error", len(tars), detail, advice=advice), *check_archives(tars)]


def write_diagnosis(diagnosis: Diagnosis, folder: Path, *, plots: bool) -> list[str]:
    """Write doctor.json, metrics.json and, with `plots`, PNG files; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in (
        ("doctor.json", diagnosis.report()),
        ("metrics.json", diagnosis.metrics()),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8", errors="replace")
        written.append(name)
    if plots:
        from kdcmae_fast.data.doctor.plots import plot_dataset

        seconds = MediaOptions.of(diagnosis.data, diagnosis.model).seconds
        classes = diagnosis.histogram, diagnosis.names
        paths = plot_dataset(diagnosis.facts, *classes, seconds, folder)
        written += [path.name for path in paths]
    return written
