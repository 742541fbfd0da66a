"""Cross-modal retrieval of a model over a dataset's clips: features, ranks, metrics.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcmae_fast.evaluation.features import extract_features
from kdcmae_fast.evaluation.ranking import Ties, retrieval_scores
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.messages import require_folder


def retrieve(
    source: EvaluationSource, *, ties: Ties = "average", output: str | Path | None = None
) -> dict[str, Any]:
    """Cross-modal retrieval in both directions; see `retrieval_scores`.

    output: folder for metrics.json (None: writes nothing). Returns what metrics.json holds.
    """
    if output is not None:
        require_folder(output)
    opened = open_source(source)
    features = extract_features(
        opened.model,
        opened.dataset,
        opened.data,
        num_clips=source.num_clips,
        batch_size=source.batch_size,
        progress=source.progress,
    )
    device = opened.device
    scores = retrieval_scores(features.audio.to(device), features.video.to(device), ties=ties)
    metrics = {
        "command": "retrieve",
        **opened.described,
        **scores.named(),
        **listed_bad(features.bad),
    }
    write_metrics(metrics, output)
    return metrics


def retrieval_table(metrics: Mapping[str, Any]) -> str:
    """The figures of `retrieve` as a table for a terminal, chance level included."""
    recalls = [name for name in metrics["chance"] if name.startswith("R@")]
    lines = [f"{'':16}" + "".join(f"{name:>9}" for name in recalls) + f"{'MedR':>9}{'MRR':>9}"]
    for label, key in (("audio -> video", "audio_to_video"), ("video -> audio", "video_to_audio")):
        row = metrics[key]
        cells = "".join(f"{row[name]:>9.1%}" for name in recalls)
        lines.append(f"{label:16}{cells}{row['median_rank']:>9.1f}{row['mrr']:>9.3f}")
    chance = metrics["chance"]
    cells = "".join(f"{chance[name]:>9.1%}" for name in recalls)
    lines.append(f"{'chance':16}{cells}{chance['median_rank']:>9.1f}{chance['mrr']:>9.3f}")
    times = [metrics[key]["R@1"] / chance["R@1"] for key in ("audio_to_video", "video_to_audio")]
    lines.append(
        f"R@1 is {times[0]:.1f} and {times[1]:.1f} times chance "
        f"(1 of {metrics['num_clips']} clips: {metrics['clips_of']}; ties: {metrics['ties']})"
    )
    return "\n".join(lines)
