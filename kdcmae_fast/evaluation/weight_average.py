"""The arithmetic mean of model folders, such as those of a run's epochs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcmae_fast.evaluation.classifier_record import CLASSIFIER, read_record
from kdcmae_fast.models import from_pretrained
from kdcmae_fast.models.pretrained import CONFIG, WEIGHTS, read_folder


def average_weights(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> Path:
    """Write the mean of all tensors of model folders to the model folder `output`.

    Summed in float64 in the order given, rounded once to the first one's dtype. Raises ValueError
    naming the folder whose model or classes are not those of the first, or that has values that
    are not finite.
    """
    if not folders:
        raise ValueError("there are no model folders to average; name at least one")
    first = Path(folders[0])
    record: dict[str, Any] = {}
    sums: dict[str, Tensor] = {}
    for folder in map(Path, folders):
        found, state = read_folder(folder)
        if folder == first and not record:
            record, sums = found, {key: tensor.double() for key, tensor in state.items()}
            dtypes = {key: tensor.dtype for key, tensor in state.items()}
        else:
            _check_same(folder, first, found, record)
            for key in sums:
                sums[key] += state[key]
        broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(f"{folder / WEIGHTS}: {broken[0]} has values that are not finite")
    mean: dict[str, Tensor] = {
        key: (total / len(folders)).to(dtypes[key]) for key, total in sums.items()
    }
    model = from_pretrained(first)
    model.save_pretrained(output, state_dict=mean)
    classifier = read_record(first)
    if classifier is not None:
        classifier.write(output)
    return Path(output)


def epoch_folders(run: str | os.PathLike[str], first: int, last: int) -> list[Path]:
    """RUN/epochs/<first> ... <last>; FileNotFoundError naming the first that is not there."""
    folders = [Path(run) / "epochs" / str(epoch) for epoch in range(first, last + 1)]
    for folder in folders:
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{folder} is no model folder; train.keep_epochs=true of `kdcmae finetune` writes "
                "one for every epoch"
            )
    return folders


def _check_same(folder: Path, first: Path, found: Any, expected: Any) -> None:
    for key in ("name", "num_classes", "config"):
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{folder} is not of the same model as {first}: {key} in {CONFIG} differs"
            )
    if read_record(folder) != read_record(first):
        raise ValueError(f"{folder} is not of the same model as {first}: {CLASSIFIER} differs")
