"""Pictures of what a model makes of masked clips, and metrics.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcmae_fast.data import BadClips, FrontEnd
from kdcmae_fast.evaluation.features import read_clips
from kdcmae_fast.evaluation.pictures import draw_clip, reconstruct_batch
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    file_name,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.figure import require_matplotlib
from kdcmae_fast.messages import require_folder


def reconstruct(source: EvaluationSource, output: str | Path) -> dict[str, Any]:
    """Draw what the model makes of masked clips: OUTPUT/<clip>.png and OUTPUT/metrics.json.

    source.num_clips=None draws 8 clips. The masks are those of step 0. Returns what metrics.json
    holds.
    """
    require_matplotlib("the reconstruction pictures")
    require_folder(output)
    model, dataset, data, _, described = opened = open_source(source)
    wanted = min(8, len(dataset)) if source.num_clips is None else source.num_clips
    front_end = FrontEnd(data, model.config)
    device = opened.device
    bad = BadClips(len(dataset), data.max_bad_share)
    pictures: list[dict[str, Any]] = []
    for raw in read_clips(dataset, data, num_clips=wanted, batch_size=source.batch_size, bad=bad):
        frames, fbanks = reconstruct_batch(model, front_end(raw, device))
        for row, index in enumerate(raw.sample_ids.tolist()):
            name = dataset.video_id(index)
            path = Path(output) / f"{len(pictures):03d}_{file_name(name)}.png"
            draw_clip(path, name, frames, fbanks, row, norm_pix=model.config.norm_pix_loss)
            errors = {
                "video": frames.error[:, row].tolist(),
                "audio": fbanks.error[:, row].tolist(),
            }
            pictures.append({"clip": name, "picture": path.name, "error_per_view": errors})
    if not pictures:
        raise ValueError(f"none of the {wanted} clips could be used; first: {bad.rows()[0]}")
    metrics = {
        "command": "reconstruct",
        **described,
        "norm_pix_loss": model.config.norm_pix_loss,
        "mean_error": _mean_errors(pictures),
        "clips": pictures,
        **listed_bad(bad.rows()),
    }
    write_metrics(metrics, output)
    return metrics


def _mean_errors(pictures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    means = {}
    for modality in ("video", "audio"):
        errors = [error for clip in pictures for error in clip["error_per_view"][modality]]
        means[modality] = sum(errors) / len(errors)
    return means
