"""`build_model` and `from_pretrained`: models by name."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import pydantic

from kdcmae_fast.config import PRESETS, SYSTEMS, ModelConfig

from .cav_mae import CavMae
from .cav_mae_sync import CavMaeSync
from .classifier import CavMaeClassifier
from .pretrained import common_dtype, load_state, read_folder
from .sync_classifier import CavMaeSyncClassifier

Classifier = CavMaeClassifier | CavMaeSyncClassifier
Model = CavMae | Classifier

SYSTEM_CLASSES: dict[str, type[CavMae]] = {
    "cav_mae": CavMae,
    "kdc_mae": CavMae,
    "cav_mae_sync": CavMaeSync,
}
CLASSIFIER_CLASSES: dict[str, type[Classifier]] = {
    "cav_mae_classifier": CavMaeClassifier,
    "cav_mae_sync_classifier": CavMaeSyncClassifier,
}
MODELS = (*SYSTEMS, *CLASSIFIER_CLASSES)


def build_model(name: str, preset: str = "base", **overrides: Any) -> Model:
    """A freshly initialised model.

    name: `cav_mae`, `kdc_mae`, `cav_mae_sync`, or `cav_mae_classifier` or
        `cav_mae_sync_classifier`, which need `num_classes=`.
    preset: `tiny`, `small`, `base` or `large`, the sizes.
    overrides: fields of `ModelConfig`; `distill` may be a dict of the fields to change.

    Errors: ValueError naming what is unknown, of the wrong type or impossible.
    """
    check_name(name)
    num_classes = overrides.pop("num_classes", None)
    return model_from_config(name, model_config(name, preset, overrides), num_classes)


def check_name(name: str) -> None:
    """ValueError unless there is a model of this name."""
    if name not in MODELS:
        raise ValueError(f"name={name!r} is not one of {', '.join(MODELS)}")


def model_config(name: str, preset: str, overrides: Mapping[str, Any]) -> ModelConfig:
    """Settings of system `name` at the sizes of `preset`, with `overrides` on top."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")
    return merge_config({**system_settings(name), **PRESETS[preset]}, overrides)


def system_settings(name: str) -> Mapping[str, object]:
    """What sets model `name` apart under every preset: its system's settings."""
    return SYSTEMS[name.removesuffix("_classifier")]


def merge_config(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of `base` with `overrides` on top; checks names, types and values."""
    settings = {key: _plain(value) for key, value in base.items()}
    for key, value in overrides.items():
        value = _plain(value)
        if key == "distill" and isinstance(value, dict):
            value = {**settings.get("distill", {}), **value}
        settings[key] = value
    try:
        return _adapter().validate_json(json.dumps(settings, default=str))
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error)) from None


def model_from_config(name: str, config: ModelConfig, num_classes: int | None = None) -> Model:
    """A model of system `name` with exactly these settings."""
    check_name(name)
    if name not in CLASSIFIER_CLASSES:
        if num_classes is not None:
            kinds = " and ".join(CLASSIFIER_CLASSES)
            raise ValueError(f"num_classes={num_classes} does not apply to {name}, only {kinds}")
        return SYSTEM_CLASSES[name](config, name=name)
    if config.modalities != "both":
        raise ValueError(
            f"modalities={config.modalities}: {name} is built on both; a model of one is used as "
            "it is (`encode`, `kdcmae probe`)"
        )
    if num_classes is None:
        raise ValueError(f"num_classes is missing: {name} needs the number of classes")
    return CLASSIFIER_CLASSES[name](config, num_classes=num_classes)


def from_pretrained(folder: str | os.PathLike[str]) -> Model:
    """The model that `save_pretrained` wrote to `folder`, on the CPU, in the saved dtype.

    Errors: ValueError for a missing or damaged file, unknown settings, or weights that do not fit
    them (all such keys are listed).
    """
    record, state = read_folder(folder)
    try:
        config = merge_config({}, record["config"])
        model = model_from_config(record["name"], config, record.get("num_classes"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    model.to(common_dtype(state))
    load_state(model, state, str(folder))
    return model


def _plain(value: Any) -> Any:
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else value


@functools.cache
def _adapter() -> pydantic.TypeAdapter[ModelConfig]:
    return pydantic.TypeAdapter(ModelConfig)


def _explain(error: pydantic.ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # from __post_init__, names the field itself
        return f"{key}{'.' if key else ''}{problem['ctx']['error']}"
    if problem["type"] == "unexpected_keyword_argument":
        names = ", ".join(field.name for field in dataclasses.fields(ModelConfig))
        return f"{key}: unknown setting; the settings are {names}"
    return f"{key}={problem['input']!r}: {problem['msg']}"
