"""`retrieve` and `reconstruct`: from a model folder and data settings to figures and files.

What `kdcmae retrieve` and `kdcmae reconstruct` run; the same functions serve Python code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import kdcmae_fast
from kdcmae_fast.config import DataConfig
from kdcmae_fast.config_file import load_config, read_yaml
from kdcmae_fast.data import BadClip, FrontEnd, RawBatch, open_dataset
from kdcmae_fast.evaluation.features import extract_features, read_clips
from kdcmae_fast.evaluation.figure import require_matplotlib
from kdcmae_fast.evaluation.pictures import Views, draw_clip, reconstruct_views
from kdcmae_fast.evaluation.retrieval import RetrievalScores, Ties, retrieval_scores
from kdcmae_fast.models import from_pretrained


@dataclass(frozen=True, kw_only=True)
class EvaluationSource:
    """A model and the clips to try it on.

    checkpoint: folder of `save_pretrained`, or a run folder that has one at `model/`.
    recipe: YAML file whose `data` group and `train.seed` describe the clips (None: the settings
        written beside the checkpoint by its run, else the defaults).
    overrides: `data.key=value` and `train.seed=value`, on top.
    split: "heldout" or "train". num_clips: how many, from the start (None: all).
    batch_size: clips at once. device: "auto" (CUDA where there is one), "cpu", "cuda:1", ...
    """

    checkpoint: str
    recipe: str | None = None
    overrides: Sequence[str] = ()
    split: str = "heldout"
    num_clips: int | None = None
    batch_size: int = 32
    device: str = "auto"
    progress: bool = field(default=False, compare=False)


def retrieve(
    source: EvaluationSource, *, ties: Ties = "average", output: str | Path | None = None
) -> dict[str, Any]:
    """Cross-modal retrieval in both directions; see `retrieval_scores`.

    output: folder for metrics.json (None: writes nothing). Returns what metrics.json holds.
    """
    model, dataset, data, described = _open(source)
    features = extract_features(
        model,
        dataset,
        data,
        num_clips=source.num_clips,
        batch_size=source.batch_size,
        progress=source.progress,
    )
    device = next(model.parameters()).device
    scores = retrieval_scores(features.audio.to(device), features.video.to(device), ties=ties)
    metrics = {"command": "retrieve", **described, **scores.named(), **_listed(features.bad)}
    _write_metrics(metrics, output)
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
        f"(1 of {metrics['num_clips']} {metrics['split']} clips; ties: {metrics['ties']})"
    )
    return "\n".join(lines)


def reconstruct(source: EvaluationSource, output: str | Path) -> dict[str, Any]:
    """Draw what the model makes of masked clips: OUTPUT/<clip>.png and OUTPUT/metrics.json.

    The masks are those of step 0. Returns what metrics.json holds.
    """
    require_matplotlib("the reconstruction pictures")
    model, dataset, data, described = _open(source)
    wanted = min(source.num_clips or len(dataset), len(dataset))
    front_end = FrontEnd(data, model.config)
    device = next(model.parameters()).device
    pictures: list[dict[str, Any]] = []
    bad: list[BadClip] = []
    for raw in read_clips(dataset, data, num_clips=wanted, batch_size=source.batch_size):
        bad.extend(raw.bad)
        if not len(raw.sample_ids):
            continue
        frames, fbanks = _reconstruct_batch(model, raw, front_end, device)
        shown = frames._replace(**_in_rgb(frames, model.config))
        for row, index in enumerate(raw.sample_ids.tolist()):
            name = dataset.video_id(index)
            path = Path(output) / f"{_file_name(name)}.png"
            draw_clip(path, name, shown, fbanks, row, norm_pix=model.config.norm_pix_loss)
            errors = {"video": frames.error[:, row].tolist(), "audio": fbanks.error[:, row].tolist()}
            pictures.append({"clip": name, "picture": path.name, "error_per_view": errors})
    if not pictures:
        raise ValueError(f"none of the {wanted} clips could be read; first: {bad[0]}")
    metrics = {
        "command": "reconstruct",
        **described,
        "norm_pix_loss": model.config.norm_pix_loss,
        "mean_error": _mean_errors(pictures),
        "clips": pictures,
        **_listed(bad),
    }
    _write_metrics(metrics, output)
    return metrics
