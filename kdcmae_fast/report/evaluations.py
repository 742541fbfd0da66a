"""The section of one evaluation: its figures, what to look at and to listen to, its settings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdcmae_fast.report.charts import Logged, charts
from kdcmae_fast.report.confusion import confusion
from kdcmae_fast.report.figures import label, numbers, show, show_json, write_number, write_value
from kdcmae_fast.report.galleries import Galleries
from kdcmae_fast.report.markup import Markup, definitions, details, element, join
from kdcmae_fast.report.media import Media
from kdcmae_fast.report.reading import Unreadable
from kdcmae_fast.report.run import Evaluation, Run

TITLES = {
    "retrieve": "Retrieval",
    "reconstruct": "Reconstructions",
    "inpaint": "Inpainting",
    "localize": "Sound localisation",
    "score": "Similarity of sound and picture",
    "probe": "Probe",
    "finetune": "Fine-tuning",
    "pretrain": "Further pretraining",
    "features": "Features",
    "doctor": "Check of a dataset",
}
# Where the figures come from: told in one line, and whole in what can be unfolded.
ORIGIN = (
    "checkpoint", "version", "clips_of", "data_from", "data", "seed", "config", "deepspeed",
    "versions", "git_commit", "recipe",
)  # fmt: skip
SHOWN_APART = (
    "command", "headline", "pictures", "sounds", "videos", "confusion", "class_names", "examples",
    "bad_clips",
)  # fmt: skip
MOST_HEADLINES = 8
SHOWN_BAD = 20


def title(evaluation: Evaluation) -> str:
    """What a reader calls the evaluation."""
    known = label(evaluation.command)
    return TITLES.get(evaluation.command, known[:1].upper() + known[1:])


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The few figures that a table of several runs shows."""
    if isinstance(metrics.get("headline"), Mapping):
        found = numbers(metrics["headline"])
    elif metrics.get("command") == "retrieve":
        found = _retrieval_headline(metrics)
    elif metrics.get("command") == "reconstruct":
        errors = numbers(metrics.get("mean_error"))
        found = {f"error, {modality}": error for modality, error in errors.items()}
    else:
        found = numbers(metrics)
    return dict(list(found.items())[:MOST_HEADLINES])


def evaluation_section(
    run: Run, place: int, evaluation: Evaluation, media: Media, anchor: str
) -> Markup:
    """The section; place: of the run on the page. Files that cannot be shown are named in it."""
    metrics = evaluation.metrics
    problems: list[str] = []
    galleries = Galleries(run, evaluation, media, problems.append).all()
    drawn = charts([Logged(run.name, place, evaluation.log)]) if evaluation.log else None
    matrix = _confusion(metrics, problems.append)
    where = element("code", f"{evaluation.place}/") if evaluation.place else None
    return element(
        "section",
        element("h3", title(evaluation), " ", where),
        _about(run, metrics),
        _figures(metrics),
        drawn,
        matrix,
        galleries,
        _problems(problems),
        bad_clips(metrics.get("bad_clips")),
        _settings(metrics),
        id=anchor,
        class_="evaluation",
    )


def bad_clips(found: object) -> Markup | None:
    """Clips that were left out, and why; None where there is none."""
    if not isinstance(found, list) or not found:
        return None
    rows = []
    for clip in found[:SHOWN_BAD]:
        known = clip if isinstance(clip, Mapping) else {"video_id": clip}
        name, reason = str(known.get("video_id", "?")), write_value(known.get("reason"))
        rows.append(element("li", element("b", name), f": {reason}"))
    if len(found) > SHOWN_BAD:
        rows.append(element("li", f"and {len(found) - SHOWN_BAD:,} more"))
    many = f"{len(found):,} clips were" if len(found) > 1 else "One clip was"
    return details(f"{many} left out", element("ul", rows))


def _problems(problems: list[str]) -> Markup | None:
    if not problems:
        return None
    listed = [element("li", problem) for problem in problems]
    return element("div", element("b", "Not shown"), element("ul", listed), class_="problems")


def _confusion(metrics: Mapping[str, Any], problem: Callable[[str], None]) -> Markup | None:
    if "confusion" not in metrics:
        return None
    try:
        return confusion(metrics["confusion"], metrics.get("class_names"))
    except Unreadable as error:
        problem(str(error))
        return None


def _about(run: Run, metrics: Mapping[str, Any]) -> Markup | None:
    """Clips and model in one line; the model only where it is not the run's own."""
    said = []
    if isinstance(metrics.get("clips_of"), str):
        count = metrics.get("num_clips")
        clips = f"{write_value(count)} clips: " if isinstance(count, int) else "clips: "
        said.append(clips + metrics["clips_of"])
    checkpoint = metrics.get("checkpoint")
    if isinstance(checkpoint, str) and not _within(run, checkpoint):
        said.append(f"checkpoint {checkpoint}")
    if isinstance(metrics.get("seed"), str | int):
        said.append(f"seed {metrics['seed']}")
    return element("p", " · ".join(said), class_="note") if said else None


def _within(run: Run, checkpoint: str) -> bool:
    """Whether a path, as a metrics.json has it, is of the run's folder."""
    try:
        return Path(checkpoint).resolve().is_relative_to(run.folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def _figures(metrics: Mapping[str, Any]) -> Markup | None:
    """The headline large, everything else below it."""
    first = numbers(metrics.get("headline"))
    told = {label(name): value for name, value in first.items()}
    rest = {
        key: value
        for key, value in metrics.items()
        if key not in (*SHOWN_APART, *ORIGIN) and (value is None or told.get(label(key)) != value)
    }
    clips = rest.get("clips")
    per_clip = rest.pop("clips", None) if isinstance(clips, list) else None
    large = None
    if first:
        shown = {label(name): write_number(value, name) for name, value in first.items()}
        large = definitions(shown, "headline")
    body = show(rest) if rest else None
    if first and rest and len(rest) > 12:
        body = details("All figures", show(rest))
    each = details(f"Figures of {len(per_clip)} clips", show_json(per_clip)) if per_clip else None
    return join([large, body, each])


def _settings(metrics: Mapping[str, Any]) -> Markup | None:
    found = {key: metrics[key] for key in ORIGIN if key in metrics}
    return details("Settings", show_json(found)) if found else None


def _retrieval_headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """R@1 both ways and of chance, then the median ranks."""
    rows = {key: numbers(metrics.get(key)) for key in ("audio_to_video", "video_to_audio")}
    chance = numbers(metrics.get("chance"))
    found: dict[str, float] = {}
    for name in ("R@1", "median_rank"):
        found |= {f"{name} {key}": row[name] for key, row in rows.items() if name in row}
        found |= {f"{name} chance": chance[name]} if name in chance else {}
    return found
