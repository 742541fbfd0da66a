"""Features of a dataset's clips as files."""

from pathlib import Path
from typing import Any

from kdcmae_fast.evaluation.clips import hears_frames
from kdcmae_fast.evaluation.feature_cache import FrameSettings, make_features
from kdcmae_fast.evaluation.feature_files import require_parquet, save_features
from kdcmae_fast.evaluation.features import broken_clips
from kdcmae_fast.evaluation.processes import launched_processes
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    listed_bad,
    modalities_of,
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

    Those of one modality where the model or the clips have no other. frames: all frames of each
    clip, sound and pictures; always so for CAV-MAE Sync, and with num_frames.
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
    opened = open_source(source, needs=())
    modalities = modalities_of(opened)
    every = frames or num_frames is not None or hears_frames(opened.model)
    if every or not modalities:
        opened.model.require("audio", "video")
        if len(modalities) < 2:
            raise ValueError(
                f"data.source={opened.data.source} has no pictures, and features of "
                f"{'frames' if every else 'this model'} need them"
            )
    settings = FrameSettings(num_frames) if every else None
    features = make_features(source, opened, settings, processes, modalities)

    def written() -> dict[str, Any]:
        save_features(features, path)
        columns = {"audio": features.audio, "video": features.video, "times": features.times}
        metrics = {
            "command": "features",
            **opened.described,
            "num_clips": len(features.video_ids),
            "shapes": {
                name: list(column.shape)
                for name, column in columns.items()
                if column is not None and column.shape[-1]
            },
            "not_finite": broken_clips(features),
            **listed_bad(features.bad),
        }
        write_metrics(metrics, None if is_file else path)
        return metrics

    return processes.on_first(written)
