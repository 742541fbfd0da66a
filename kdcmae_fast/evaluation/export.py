"""Features of a dataset's clips as files."""

from pathlib import Path
from typing import Any

from kdcmae_fast.evaluation.clips import hears_frames
from kdcmae_fast.evaluation.feature_cache import FrameSettings, find_features
from kdcmae_fast.evaluation.feature_files import require_parquet, save_features
from kdcmae_fast.evaluation.features import broken_clips
from kdcmae_fast.evaluation.processes import launched_processes
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    listed_bad,
    open_source,
    write_metrics,
)
from kdcmae_fast.messages import require_folder


def export_features(
    source: EvaluationSource,
    output: str | Path,
    *,
    frames: bool = False,
    num_frames: int | None = None,
) -> dict[str, Any]:
    """Extract features and write them with `save_features`; in a folder also metrics.json.

    frames: all frames of each clip; always so for CAV-MAE Sync, and with num_frames.
    num_frames: as in `extract_frame_features`.

    Returns what metrics.json holds: how many clips, the shapes, the clips that were left out, and
    those written whose features are not finite.
    """
    path = Path(output)
    is_file = path.suffix in (".npz", ".parquet")
    require_parquet(path)
    require_folder(path.parent if is_file else path)
    if is_file and path.is_dir():
        raise ValueError(f"--output {path} is a folder; give another name")
    processes = launched_processes()
    opened = open_source(source)
    every = frames or num_frames is not None or hears_frames(opened.model)
    settings = FrameSettings(num_frames) if every else None
    features = find_features(source, opened, settings, processes=processes).features

    def written() -> dict[str, Any]:
        save_features(features, path)
        columns = {"audio": features.audio, "video": features.video, "times": features.times}
        metrics = {
            "command": "features",
            **opened.described,
            "num_clips": len(features.video_ids),
            "shapes": {k: list(x.shape) for k, x in columns.items() if x is not None},
            "not_finite": broken_clips(features),
            **listed_bad(features.bad),
        }
        write_metrics(metrics, None if is_file else path)
        return metrics

    return processes.on_first(written)
