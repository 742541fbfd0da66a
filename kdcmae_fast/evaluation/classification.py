"""`classify`: what a fine-tuned model makes of a dataset's clips, and metrics.json about it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import kdcmae_fast
from kdcmae_fast.config import ModelConfig
from kdcmae_fast.config_file import load_settings, read_yaml
from kdcmae_fast.data import ClipDataset, open_dataset
from kdcmae_fast.data.classes import Classes, classes_of_data, label_csv_of
from kdcmae_fast.evaluation.class_evaluation import Evaluation, evaluate_classifier
from kdcmae_fast.evaluation.classifier_record import ClassifierRecord, read_record
from kdcmae_fast.evaluation.source import model_folder, pick_device, write_metrics
from kdcmae_fast.finetune_config import FinetuneRunConfig
from kdcmae_fast.messages import require_folder
from kdcmae_fast.models import from_pretrained
from kdcmae_fast.models.build import Classifier
from kdcmae_fast.models.classifier import CavMaeClassifier, Mode
from kdcmae_fast.models.sync_classifier import CavMaeSyncClassifier

Loss = Literal["bce", "cross_entropy"]

# Figures of an evaluation that stand in logs and in tables of runs, and what people call them.
SHORT = {
    "top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy",
    "mAP": "mAP", "AUC": "AUC", "d_prime": "d'", "chance": "chance",
}  # fmt: skip
WORST = 5  # classes named in the table
CONFUSION = "confusion.png"


@dataclass(frozen=True, kw_only=True)
class ClassifySource:
    """A fine-tuned model and the clips to try it on.

    checkpoint: a fine-tuning run's folder, or a model folder of it.
    recipe: YAML whose `data` group describes the clips (None: the run's own settings).
    overrides: `data.key=value` and `train.seed=value`, on top. The clips are those of
        data.eval_path, or held-out synthetic ones; with split="train" those trained on.
    mode: None: as trained. missing_video and missing_audio: a multimodal model given one of both.
    num_frames: of each clip, whose probabilities are averaged (None: data.eval_frames, or else
        data.num_frames). loss: None: as trained.
    """

    checkpoint: str
    recipe: str | None = None
    overrides: Sequence[str] = ()
    split: str | None = None
    mode: Mode | None = None
    loss: Loss | None = None
    num_clips: int | None = None
    num_frames: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    progress: bool = field(default=False, compare=False)


def classify(source: ClassifySource, output: str | Path | None = None) -> dict[str, Any]:
    """Classify the clips; returns what OUTPUT/metrics.json holds (None: nothing is written).

    Under torchrun every process takes a part of the clips, and the figures are those of all.
    """
    if output is not None:
        require_folder(output)
    folder = model_folder(source.checkpoint)
    config, origin = _settings(folder, source)
    model = from_pretrained(folder)
    if not isinstance(model, CavMaeClassifier | CavMaeSyncClassifier):
        raise ValueError(
            f"--checkpoint {folder} holds a {model.name}, which has no classes; fine-tune it with "
            "`kdcmae finetune`"
        )
    classes = classes_of_data(config.data)
    record = _check(folder, model, classes, source)
    mode = source.mode or record.mode
    if source.split == "heldout" and config.data.source != "synthetic":
        raise ValueError("--split heldout is for synthetic clips; the others' are data.eval_path")
    dataset = open_eval_clips(config, model.config, train=source.split == "train")
    rank, world_size, device = _place(source.device)
    model = model.to(device).eval()
    takes_mode = {"mode": mode} if isinstance(model, CavMaeClassifier) else {}
    found = evaluate_classifier(
        lambda fbank, frames: model(fbank=fbank, frames=frames, **takes_mode),
        Evaluation(
            dataset=dataset,
            data=config.data,
            model=model.config,
            loss=source.loss or record.loss,
            num_classes=model.num_classes,
            device=device,
            num_frames=source.num_frames,
            pairs_frames=isinstance(model, CavMaeSyncClassifier),
            rank=rank,
            world_size=world_size,
            progress=source.progress and rank == 0,
        ),
    )
    metrics = {
        "command": "classify",
        "checkpoint": str(folder),
        "version": kdcmae_fast.__version__,
        "clips_of": _clips_of(config, source.split),
        "data_from": origin,
        "data": dataclasses.asdict(config.data),
        "seed": config.train.seed,
        "mode": mode,
        "loss": source.loss or record.loss,
        "headline": headline(found),
        "class_names": list(classes.names),
        **found,
    }
    if rank == 0:
        _write(metrics, output)
    return metrics


def headline(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures that a table of runs shows, under the names people know."""
    return {word: figures[name] for name, word in SHORT.items() if figures.get(name) is not None}


def classification_table(metrics: Mapping[str, Any]) -> str:
    """The figures of `classify` as lines for a terminal, with the classes it knows least."""
    lines = [f"{word:20} {value:.4f}" for word, value in metrics["headline"].items()]
    per_class = metrics.get("class_accuracy", metrics.get("class_AP", []))
    known = [
        (v, n) for v, n in zip(per_class, metrics["class_names"], strict=True) if v is not None
    ]
    if len(known) > WORST:
        worst = ", ".join(f"{name} {value:.3f}" for value, name in sorted(known)[:WORST])
        lines.append(f"{'lowest classes':20} {worst}")
    what = "accuracy" if "class_accuracy" in metrics else "average precision"
    lines.append(
        f"{metrics['num_clips']} clips ({metrics['clips_of']}), {metrics['num_frames']} frames "
        f"each, mode {metrics['mode']}; {what} over {metrics['classes_with_clips']} of "
        f"{len(metrics['class_names'])} classes"
    )
    return "\n".join(lines)


def _settings(folder: Path, source: ClassifySource) -> tuple[FinetuneRunConfig, str]:
    """Settings of the clips, and where they came from."""
    origin, found = "defaults", {}
    if source.recipe is not None:
        origin, found = source.recipe, read_yaml(source.recipe)
    else:
        for run in list(folder.resolve().parents)[:2]:  # RUN/model and RUN/epochs/3
            record = read_yaml(run / "config.json") if (run / "config.json").is_file() else {}
            if "deepspeed" in record:
                origin, found = str(run / "config.json"), record["config"]
                break
    settings: dict[str, Any] = {"data": found.get("data", {}), "train": {"steps": 1}}
    if "seed" in (found.get("train") or {}):
        settings["train"]["seed"] = found["train"]["seed"]
    for override in source.overrides:
        if not override.startswith(("data.", "train.seed=")):
            raise ValueError(
                f"argument {override}: only data.key=value and train.seed=value describe the clips "
                "(the model's own settings come with the checkpoint)"
            )
    overrides = list(source.overrides)
    if not settings["data"].get("path"):  # who only classifies has no clips to train on
        given = dict(override.partition("=")[::2] for override in overrides)
        if "data.eval_path" in given and "data.path" not in given:
            overrides.append(f"data.path={given['data.eval_path']}")
    if source.num_clips is not None:
        overrides.append(f"data.eval_clips={source.num_clips}")
    if source.batch_size is not None:
        overrides.append(f"data.eval_batch_size={source.batch_size}")
    return load_settings(FinetuneRunConfig, settings, overrides, origin=origin), origin


def _check(
    folder: Path, model: Classifier, classes: Classes, source: ClassifySource
) -> ClassifierRecord:
    """How the model was trained; ValueError where classes or mode are not the model's."""
    if len(classes.mids) != model.num_classes:
        raise ValueError(
            f"--checkpoint {folder} has a head of {model.num_classes} classes, data.label_csv has "
            f"{len(classes.mids)}: these are not the clips' classes"
        )
    record = read_record(folder)
    if record is None:  # of a published file
        if source.loss is None:
            raise ValueError(
                f"{folder} has no classifier.json; say --loss bce (any number of labels a clip) or "
                "--loss cross_entropy (one)"
            )
        trained = "multimodal"
        if isinstance(model, CavMaeSyncClassifier):
            trained = model.config.classifier_input
        record = ClassifierRecord(trained, source.loss, classes)
    if record.classes.mids != classes.mids:
        pairs = enumerate(zip(record.classes.mids, classes.mids, strict=True))
        number, (theirs, ours) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        raise ValueError(
            f"--checkpoint {folder}: its class {number} is {theirs}, that of data.label_csv is "
            f"{ours}; give the CSV it was trained with"
        )
    if source.mode not in (None, record.mode) and record.mode != "multimodal":
        raise ValueError(
            f"--mode {source.mode}: {folder} was trained on {record.mode} alone and can be given "
            "nothing else"
        )
    if source.mode not in (None, record.mode) and isinstance(model, CavMaeSyncClassifier):
        raise ValueError(
            f"--mode {source.mode}: the head of {folder} takes sound and frames together; "
            "CAV-MAE Sync has no inference with one of both"
        )
    return record


def open_eval_clips(
    config: FinetuneRunConfig, model: ModelConfig, *, train: bool = False
) -> ClipDataset:
    """The clips to evaluate on: those of data.eval_path, or held-out synthetic ones.

    model: the sizes. train: those of data.path, which were trained on.
    """
    data, seed = config.data, config.train.seed
    if data.source == "synthetic":
        return open_dataset(data, model, seed=seed, split="train" if train else "heldout")
    if not train and not data.eval_path:
        raise ValueError("data.eval_path='': give the clips to evaluate on")
    path = data.path if train else data.eval_path
    theirs = dataclasses.replace(data, path=path, label_csv=label_csv_of(data))
    return open_dataset(theirs, model, seed=seed)


def _clips_of(config: FinetuneRunConfig, split: str | None) -> str:
    if config.data.source == "synthetic":
        return f"synthetic, {split or 'heldout'}"
    return config.data.path if split == "train" else config.data.eval_path


def _place(device: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device, as the launcher says."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, pick_device(device)
    from kdcmae_fast.training.distributed import join_world

    world = join_world()
    return world.rank, world.size, world.device


def _write(metrics: dict[str, Any], output: str | Path | None) -> None:
    """metrics.json, and the confusion of the classes as a picture."""
    if output is None:
        return
    if "confusion" in metrics:
        from kdcmae_fast.evaluation.confusion import plot_confusion

        try:
            plot_confusion(metrics["confusion"], metrics["class_names"], Path(output) / CONFUSION)
            metrics["pictures"] = [{"file": CONFUSION, "title": "True and predicted classes"}]
        except ModuleNotFoundError as error:
            metrics["no_picture"] = str(error)
    write_metrics(metrics, output)
