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
from kdcmae_fast.data import BadClip, BadClips, ClipDataset, FrontEnd, open_dataset
from kdcmae_fast.evaluation.features import extract_features, read_clips
from kdcmae_fast.evaluation.pictures import draw_clip, reconstruct_batch
from kdcmae_fast.evaluation.retrieval import Ties, retrieval_scores
from kdcmae_fast.figure import require_matplotlib
from kdcmae_fast.messages import require_folder
from kdcmae_fast.models import from_pretrained
from kdcmae_fast.models.cav_mae import CavMae


@dataclass(frozen=True, kw_only=True)
class EvaluationSource:
    """A model and the clips to try it on.

    checkpoint: folder of `save_pretrained`, or a run folder that has one at `model/`.
    recipe: YAML file whose `data` group and `train.seed` describe the clips (None: the settings
        written beside the checkpoint by its run, else the defaults).
    overrides: `data.key=value` and `train.seed=value`, on top.
    split: "heldout" (the default) or "train" of the synthetic clips; None for clips of one's own,
        which are all of data.path. num_clips: how many, from the start (None: all).
    batch_size: clips at once. device: "auto" (CUDA where there is one), "cpu", "cuda:1", ...
    """

    checkpoint: str
    recipe: str | None = None
    overrides: Sequence[str] = ()
    split: str | None = None
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
    if output is not None:
        require_folder(output)
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
        f"(1 of {metrics['num_clips']} clips: {metrics['clips_of']}; ties: {metrics['ties']})"
    )
    return "\n".join(lines)


def reconstruct(source: EvaluationSource, output: str | Path) -> dict[str, Any]:
    """Draw what the model makes of masked clips: OUTPUT/<clip>.png and OUTPUT/metrics.json.

    source.num_clips=None draws 8 clips. The masks are those of step 0. Returns what metrics.json
    holds.
    """
    require_matplotlib("the reconstruction pictures")
    require_folder(output)
    model, dataset, data, described = _open(source)
    wanted = min(8, len(dataset)) if source.num_clips is None else source.num_clips
    front_end = FrontEnd(data, model.config)
    device = next(model.parameters()).device
    bad = BadClips(len(dataset), data.max_bad_share)
    pictures: list[dict[str, Any]] = []
    for raw in read_clips(dataset, data, num_clips=wanted, batch_size=source.batch_size, bad=bad):
        frames, fbanks = reconstruct_batch(model, front_end(raw, device))
        for row, index in enumerate(raw.sample_ids.tolist()):
            name = dataset.video_id(index)
            path = Path(output) / f"{len(pictures):03d}_{_file_name(name)}.png"
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
        **_listed(bad.rows()),
    }
    _write_metrics(metrics, output)
    return metrics


def _open(
    source: EvaluationSource,
) -> tuple[CavMae, ClipDataset, DataConfig, dict[str, Any]]:
    """Model on its device, dataset, data settings, and what to say of them in metrics.json."""
    folder = model_folder(source.checkpoint)
    data, seed, origin = data_settings(folder, source.recipe, source.overrides)
    model = from_pretrained(folder)
    if not isinstance(model, CavMae):
        raise ValueError(f"--checkpoint {folder} holds a {model.name}; give a pretrained model")
    model = model.to(pick_device(source.device)).eval()
    synthetic = data.source == "synthetic"
    split = source.split or ("heldout" if synthetic else "train")
    dataset = open_dataset(data, model.config, seed=seed, split=split)
    described = {
        "checkpoint": str(folder),
        "version": kdcmae_fast.__version__,
        "clips_of": f"synthetic, {split}" if synthetic else data.path,
        "data_from": origin,
        "data": asdict(data),
        "seed": seed,
    }
    return model, dataset, data, described


def model_folder(checkpoint: str | Path) -> Path:
    """The model folder that `checkpoint` is, or has at model/; FileNotFoundError without one."""
    path = Path(checkpoint)
    for folder in (path, path / "model"):
        if (folder / "model.safetensors").is_file():
            return folder
    reason = "is no folder" if not path.is_dir() else "has no model.safetensors"
    raise FileNotFoundError(
        f"--checkpoint {path} {reason}; give the model/ folder of a run (a published file becomes "
        "one with `kdcmae convert`)"
    )


def data_settings(
    folder: Path, recipe: str | None, overrides: Sequence[str] = ()
) -> tuple[DataConfig, int, str]:
    """Data settings, seed and where they came from, for a model in `folder`.

    Without a recipe they are those of the run the model came from (config.json above `folder`), or
    else the defaults. overrides: `data.key=value` and `train.seed=value` only.
    """
    run = folder.resolve().parent / "config.json"
    origin, found = "defaults", {}
    if recipe is not None:
        origin, found = recipe, read_yaml(recipe)
    elif run.is_file():
        record = read_yaml(run)  # JSON is YAML
        if "deepspeed" in record:
            origin, found = str(run), record["config"]
    groups = {"data": found["data"]} if "data" in found else {}
    train = found.get("train")
    seed = {"seed": train["seed"]} if isinstance(train, dict) and "seed" in train else {}
    for override in overrides:
        if not override.startswith(("data.", "train.seed=")):
            raise ValueError(
                f"argument {override}: only data.key=value and train.seed=value describe the clips "
                "(the model's own settings come with the checkpoint)"
            )
    # `steps` only because a run's settings must name a length.
    config = load_config({**groups, "train": {"steps": 1, **seed}}, overrides, origin=origin)
    return config.data, config.train.seed, origin


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. ValueError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name} is not here: torch sees {count} CUDA devices")
    return device


def _mean_errors(pictures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    means = {}
    for modality in ("video", "audio"):
        errors = [error for clip in pictures for error in clip["error_per_view"][modality]]
        means[modality] = sum(errors) / len(errors)
    return means


def _listed(bad: Iterable[BadClip]) -> dict[str, Any]:
    return {"bad_clips": [clip._asdict() for clip in bad]}


def _file_name(video_id: str) -> str:
    """A name that is safe as a file's on any system."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in video_id)


def _write_metrics(metrics: Mapping[str, Any], output: str | Path | None) -> None:
    if output is None:
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
