"""The model folder that a fine-tuning run starts from: its settings beneath the recipe's."""

from collections.abc import Sequence
from pathlib import Path

from kdcmae_fast.config_file import load_settings, read_yaml
from kdcmae_fast.data.classes import Classes
from kdcmae_fast.evaluation.classifier_record import ClassifierRecord
from kdcmae_fast.finetune_config import FinetuneRunConfig

# Settings of a model that what starts from it must share. An audio_length of one's own is fine:
# position tables are made for it.
TRUNK = (
    "num_mel_bins", "img_size", "patch_size", "pixel_mean", "pixel_std", "embed_dim",
    "modality_depth", "shared_depth", "num_heads", "mlp_ratio", "cls_token", "num_registers",
    "shared_chain",
)  # fmt: skip
SYNC = "cav_mae_sync"


def with_start_model(
    config: FinetuneRunConfig, recipe: Path, arguments: Sequence[str]
) -> FinetuneRunConfig:
    """The settings of `recipe` and `arguments` above those of `config.train.init_from`.

    A published file tells its sizes by its weights, and is left to `convert.init_model`. Raises
    ValueError for a model folder of another kind, or where the recipe says otherwise of the trunk.
    """
    folder = config.train.init_from
    file = Path(folder) / "config.json"
    if not folder or not file.is_file():
        return config
    record = read_yaml(file)  # JSON is YAML
    found = record.get("config")
    if not isinstance(found, dict) or not isinstance(record.get("name"), str):
        return config  # no model folder, as reading it will tell
    _check_kind(config.name, record["name"], folder)
    beneath = {name: found[name] for name in (*TRUNK, "audio_length") if name in found}
    config = load_settings(FinetuneRunConfig, recipe, arguments, start_model=beneath)
    for name in TRUNK:
        ours = getattr(config.model, name)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if name in found and ours != found[name]:
            raise ValueError(
                f"model.{name}={ours}: train.init_from={folder} has {found[name]}; leave it out of "
                "the recipe (it comes with the model), or start from another model"
            )
    return config


def check_head(folder: str, head: ClassifierRecord | None, classes: Classes) -> None:
    """ValueError where the model folder that a run starts from has a head for other classes."""
    file = Path(folder) / "config.json"
    record = read_yaml(file) if file.is_file() else {}  # reading the weights will tell
    count = record.get("num_classes", len(classes.mids))
    if count != len(classes.mids):
        raise ValueError(
            f"train.init_from={folder} has a head of {count} classes, data.label_csv has "
            f"{len(classes.mids)}; start from the pretrained model, whose head is new"
        )
    if head is not None and head.classes.mids != classes.mids:
        pairs = zip(head.classes.mids, classes.mids, strict=True)
        number, (theirs, ours) = next((n, p) for n, p in enumerate(pairs) if p[0] != p[1])
        raise ValueError(
            f"train.init_from={folder} was trained with other classes: its class {number} is "
            f"{theirs}, that of data.label_csv is {ours}"
        )


def _check_kind(name: str, start: str, folder: str) -> None:
    if start.startswith(SYNC) != name.startswith(SYNC):
        fitting = "cav_mae_sync_classifier" if start.startswith(SYNC) else "cav_mae_classifier"
        raise ValueError(
            f"train.init_from={folder} holds a {start}, which {name} cannot start from; set "
            f"name={fitting}"
        )
