"""Cross-modal retrieval of a model over a dataset's clips: features, ranks, metrics.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdcmae_fast.evaluation.clips import hears_frames
from kdcmae_fast.evaluation.feature_cache import FrameSettings, find_features
from kdcmae_fast.evaluation.features import ClipFeatures, require_finite
from kdcmae_fast.evaluation.processes import launched_processes
from kdcmae_fast.evaluation.ranking import (
    STRATEGIES,
    RetrievalScores,
    Strategy,
    Ties,
    retrieval_scores,
)
from kdcmae_fast.evaluation.retrieval_examples import require_writers, write_examples
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    Opened,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.messages import require_folder

DIRECTIONS = {"audio_to_video": "audio -> video", "video_to_audio": "video -> audio"}
EXAMPLES = 3  # queries shown per direction


def retrieve(
    source: EvaluationSource,
    *,
    strategy: Strategy | Literal["all"] | None = None,
    ties: Ties = "average",
    num_frames: int | None = None,
    features: str | Path | None = None,
    examples: int = EXAMPLES,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Cross-modal retrieval in both directions; see `retrieval_scores`.

    strategy: how frames are compared; "all" ranks by each. None: "diagonal_mean" for CAV-MAE Sync,
        which has T frames and T segments of each clip, and one frame of each clip for the others,
        which with a strategy take T frames and the sound as a whole.
    num_frames: T (None: as many as the dataset has).
    features: folder that keeps features for the next time, by what they were made of.
    output: folder for metrics.json (None: writes nothing), and for `examples` queries of each
        direction with what was found for them.

    Returns what metrics.json holds, on all processes of a launcher; the first writes.
    """
    if output is not None:
        require_folder(output)
        if examples > 0:
            require_writers()
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")
    processes = launched_processes()
    opened = open_source(source)
    frame_level = hears_frames(opened.model)
    if strategy is None and (frame_level or num_frames is not None):
        strategy = "diagonal_mean"
    frames = None if strategy is None else FrameSettings(num_frames)
    found = find_features(source, opened, frames, folder=features, processes=processes)

    def ranked() -> dict[str, Any]:
        metrics: dict[str, Any] = {"command": "retrieve", **opened.described}
        if frames is not None:
            metrics["frames"] = _described(found.features, frame_level, opened.data.time_base)
        if found.note:
            metrics["features"] = found.note
        metrics |= _ranked(opened, found.features, strategy, ties, examples, output)
        metrics |= listed_bad(found.features.bad)
        write_metrics(metrics, output)
        return metrics

    return processes.on_first(ranked)


def retrieval_table(metrics: Mapping[str, Any]) -> str:
    """The figures of `retrieve` as a table for a terminal, chance level included."""
    recalls = [name for name in metrics["chance"] if name.startswith("R@")]
    by_strategy = metrics.get("strategies", {"": metrics})
    width = 16 + (15 if len(by_strategy) > 1 else 0)
    lines = [f"{'':{width}}" + "".join(f"{name:>9}" for name in recalls) + f"{'MedR':>9}{'MRR':>9}"]
    for strategy, scores in by_strategy.items():
        for key, label in DIRECTIONS.items():
            row = scores[key]
            label = f"{strategy:15}{label}" if len(by_strategy) > 1 else label
            lines.append(_line(label, width, row, recalls))
    lines.append(_line("chance", width, metrics["chance"], recalls))
    chance = metrics["chance"]["R@1"]
    times = [metrics[key]["R@1"] / chance for key in DIRECTIONS]
    how = f"ties: {metrics['ties']}"
    if "strategy" in metrics:
        how = f"{metrics['strategy']} of {metrics['frames']['num_frames']} frames; {how}"
    lines.append(
        f"R@1 is {times[0]:.1f} and {times[1]:.1f} times chance "
        f"(1 of {metrics['num_clips']} clips: {metrics['clips_of']}; {how})"
    )
    return "\n".join(lines)


def _line(label: str, width: int, row: Mapping[str, float], recalls: Sequence[str]) -> str:
    cells = "".join(f"{row[name]:>9.1%}" for name in recalls)
    return f"{label:{width}}{cells}{row['median_rank']:>9.1f}{row['mrr']:>9.3f}"


def _ranked(
    opened: Opened,
    features: ClipFeatures,
    strategy: Strategy | Literal["all"] | None,
    ties: Ties,
    examples: int,
    output: str | Path | None,
) -> dict[str, Any]:
    """The scores of every strategy asked for; the first one's stand at the top as well."""
    if ties != "published":
        require_finite(features)
    device = opened.device
    audio, video = features.audio.to(device), features.video.to(device)
    names = STRATEGIES if strategy == "all" else (strategy or "diagonal_mean",)
    scores = {name: retrieval_scores(audio, video, strategy=name, ties=ties) for name in names}
    first = scores[names[0]]
    metrics = {**first.named(), "headline": headline(first)}
    if strategy is not None:
        named = {name: found.named() for name, found in scores.items()}
        directions = {
            name: {key: found[key] for key in DIRECTIONS} for name, found in named.items()
        }
        metrics |= {"strategy": names[0], "strategies": directions}
    if output is not None and examples > 0:
        metrics["examples"] = write_examples(
            opened.dataset,
            features._replace(audio=audio, video=video),
            first,
            strategy=names[0],
            count=examples,
            output=output,
        )
    return metrics


def headline(scores: RetrievalScores) -> dict[str, float]:
    """The figures that a table of several runs shows."""
    return {
        "R@1 audio->video": scores.audio_to_video.recall[1],
        "R@1 video->audio": scores.video_to_audio.recall[1],
        "R@1 of chance": scores.chance["R@1"],
        "median rank audio->video": scores.audio_to_video.median_rank,
        "median rank video->audio": scores.video_to_audio.median_rank,
    }


def _described(features: ClipFeatures, frame_level: bool, time_base: str) -> dict[str, Any]:
    assert features.times is not None  # they were extracted frame by frame
    described = {"num_frames": features.times.shape[1]}
    if not frame_level:
        return {**described, "audio": "one vector per clip"}
    return {**described, "audio": "a segment around each frame", "time_base": time_base}
