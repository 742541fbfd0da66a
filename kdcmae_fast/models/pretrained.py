"""Weights on disk: one folder with model.safetensors and config.json."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcmae_fast import __version__
from kdcmae_fast.config import ModelConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MOST_SIZES = 5  # mis-sized tensors that an error lists


class PretrainedModel(nn.Module):
    """A model that writes itself to a folder: its `name`, `config`, perhaps `num_classes`."""

    name: str
    config: ModelConfig

    def save_pretrained(
        self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write `folder`/model.safetensors and config.json, each replaced at once or not at all.

        state_dict: weights to write instead of the module's own, for engines that keep them
            sharded; its keys and sizes must be this model's.
        """
        state = self.state_dict()
        if state_dict is not None:
            check_keys(state, state_dict, "state_dict")
            state = dict(state_dict)
        record: dict[str, object] = {"name": self.name, "version": __version__}
        if hasattr(self, "num_classes"):
            record["num_classes"] = self.num_classes
        record["config"] = dataclasses.asdict(self.config)
        path = Path(folder)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        text = json.dumps(record, indent=2) + "\n"
        replace_file(path / WEIGHTS, lambda temporary: save_file(tensors, temporary))
        replace_file(path / CONFIG, lambda temporary: temporary.write_text(text))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, then move it there in one step; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the weights of a model folder; ValueError naming what is wrong."""
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            hint = f"; {path / 'model'} is one" if (path / "model" / WEIGHTS).is_file() else ""
            raise ValueError(f"{path} is not a model folder: it has no {name}{hint}")
    try:
        record = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"name", "config"} <= set(record):
        raise ValueError(f"{path / CONFIG} must have the keys name and config")
    try:
        return record, load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from None


def check_keys(model: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """ValueError that lists the keys that `state` lacks, has too many, or (a few) mis-sizes."""
    problems = []
    missing = [key for key in model if key not in state]
    unknown = [key for key in state if key not in model]
    sizes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(model[key].shape)}"
        for key in model
        if key in state and state[key].shape != model[key].shape
    ]
    if len(sizes) > MOST_SIZES:  # a model of another width mis-sizes nearly all of them
        sizes[MOST_SIZES:] = [f"and {len(sizes) - MOST_SIZES} more"]
    for label, keys in (("missing", missing), ("unknown", unknown), ("wrong sizes", sizes)):
        if keys:
            problems.append(f"{label}: {', '.join(keys)}")
    if problems:
        raise ValueError(f"{what} does not fit the model; {'; '.join(problems)}")


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Strict load, ValueError listing every key that does not fit; the model keeps its dtype."""
    check_keys(model.state_dict(), state, what)
    model.load_state_dict(dict(state))


def common_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype of all tensors; fp32 where they differ."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
