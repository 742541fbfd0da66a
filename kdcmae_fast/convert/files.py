"""Reading and writing files of published weights: tensors only, no code from the file runs."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcmae_fast.models.pretrained import replace_file

PREFIX = "module."  # of a DataParallel wrapper, under which the published files were saved
WRAPPERS = ("model", "state_dict")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Name -> tensor of a .pth (tensors only, `weights_only=True`) or .safetensors file.

    A wrapping {"model": ...} or {"state_dict": ...} and the prefix `module.` are removed.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    if file.suffix == ".safetensors":
        try:
            return _strip(load_file(file), file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    if file.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{file} must end in .safetensors or one of {', '.join(TORCH_SUFFIXES)}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        # Its text advises to load without the check that keeps the file's code from running.
        raise ValueError(
            f"{file} does not load as plain tensors ({type(error).__name__}): it is damaged, no "
            "torch file, or holds more than tensors"
        ) from None
    return _strip(_unwrap(content), file)


def write_tensors(path: str | os.PathLike[str], state: dict[str, Tensor]) -> None:
    """Write published names: .pth with the prefix `module.`, .safetensors without; atomically."""
    file = Path(path)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if file.suffix == ".safetensors":
        replace_file(file, lambda temporary: save_file(state, temporary))
    elif file.suffix in TORCH_SUFFIXES:
        prefixed = OrderedDict((PREFIX + key, tensor) for key, tensor in state.items())
        replace_file(file, lambda temporary: torch.save(prefixed, temporary))
    else:
        raise ValueError(f"{file} must end in .safetensors or one of {', '.join(TORCH_SUFFIXES)}")


def _unwrap(content: Any) -> Any:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            return content[wrapper]
    return content


def _strip(content: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} holds no weights: expected names and tensors")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{file} has entries that are no tensors: {', '.join(others)}")
    return {str(key).removeprefix(PREFIX): value for key, value in content.items()}
