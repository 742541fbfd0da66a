"""What an evaluation works on, a model folder and the settings of its clips, and what it writes."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kdcmae_fast
from kdcmae_fast.config import DataConfig, RunConfig
from kdcmae_fast.config_file import AnyRunConfig, load_settings, read_yaml
from kdcmae_fast.data import BadClip, ClipDataset, open_dataset
from kdcmae_fast.finetune_config import FinetuneRunConfig
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


class Opened(NamedTuple):
    """What an `EvaluationSource` names.

    model: on its device, for inference. data, seed: the clips' settings. described: what
    metrics.json says of all this.
    """

    model: CavMae
    dataset: ClipDataset
    data: DataConfig
    seed: int
    described: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device


def open_source(source: EvaluationSource, *, needs: Sequence[str] = ("audio", "video")) -> Opened:
    """Model and clips; ValueError naming the setting for what is not there or does not fit.

    needs: the modalities that the evaluation takes of both.
    """
    model, data, seed, described = open_model(source, needs=needs)
    synthetic = data.source == "synthetic"
    split = source.split or ("heldout" if synthetic else "train")
    dataset = open_dataset(data, model.config, seed=seed, split=split)
    described = {
        **described,
        "clips_of": f"synthetic, {split}" if synthetic else data.path,
        "seed": seed,
    }
    return Opened(model, dataset, data, seed, described)


def open_model(
    source: EvaluationSource, *, needs: Sequence[str] = ("audio", "video")
) -> tuple[CavMae, DataConfig, int, dict[str, Any]]:
    """The model on its device, data settings and seed, and what metrics.json says of them."""
    folder = model_folder(source.checkpoint)
    data, seed, origin = data_settings(folder, source.recipe, source.overrides)
    model = from_pretrained(folder)
    if not isinstance(model, CavMae):
        raise ValueError(f"--checkpoint {folder} holds a {model.name}; give a pretrained model")
    model.require(*needs)
    if "video" in needs and data.source == "sounds":
        raise ValueError("data.source=sounds has no pictures, and this needs them")
    described = {
        "checkpoint": str(folder),
        "version": kdcmae_fast.__version__,
        "data_from": origin,
        "data": asdict(data),
    }
    return model.to(pick_device(source.device)).eval(), data, seed, described


def modalities_of(opened: Opened) -> tuple[str, ...]:
    """What both the model and the clips have; may be none."""
    silent = opened.data.source == "sounds"
    return tuple(m for m in opened.model.config.modality_names if m == "audio" or not silent)


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
    settings = {**groups, "train": {"steps": 1, **seed}}
    config: AnyRunConfig
    if "finetune" in found:  # its data group has more
        config = load_settings(FinetuneRunConfig, settings, overrides, origin=origin)
    else:
        config = load_settings(RunConfig, settings, overrides, origin=origin)
    return config.data, config.train.seed, origin


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. ValueError if it is not here.

    Of a launcher's processes each takes the GPU that its LOCAL_RANK counts to.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name == "auto":
        local_rank = os.environ.get("LOCAL_RANK")
        number = None if local_rank is None else int(local_rank) % torch.cuda.device_count()
        return torch.device("cuda" if number is None else f"cuda:{number}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name} is not here: torch sees {count} CUDA devices")
    return device


def listed_bad(bad: Iterable[BadClip]) -> dict[str, Any]:
    """`bad_clips` of metrics.json."""
    return {"bad_clips": [clip._asdict() for clip in bad]}


def file_name(video_id: str) -> str:
    """A name that is safe as a file's on any system."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in video_id)


def write_metrics(metrics: Mapping[str, Any], output: str | Path | None) -> None:
    """OUTPUT/metrics.json; None writes nothing."""
    if output is None:
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
