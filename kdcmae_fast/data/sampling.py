"""How often each clip is drawn, so that rare labels are seen as often as common ones."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data.clip import ClipDataset


def sampling_weights(dataset: ClipDataset) -> NDArray[np.float64]:
    """(num_clips,) weights: those of the dataset's weight file if there is one, else by its labels.

    Raises ValueError when there is neither, or no clip has a positive weight.
    """
    path: Path | None = getattr(dataset, "weight_file", None)
    if path is not None and path.exists():
        weights = read_weights(path, len(dataset))
    elif hasattr(dataset, "label_sets"):
        weights = label_weights(dataset.label_sets())
    else:
        raise ValueError(
            f"data.sampling=balanced needs labels, and {type(dataset).__name__} has none; use a "
            "manifest or shards with labels"
        )
    if not weights.any():
        raise ValueError(
            "data.sampling=balanced: no clip has a label; set data.label_csv"
            + (f" or write {path}" if path is not None else "")
        )
    return weights


def label_weights(label_sets: Iterable[Sequence[Hashable]]) -> NDArray[np.float64]:
    """For each clip the sum over its labels of 1000 / (clips with that label + 0.01).

    The weights of CAV-MAE (arXiv 2210.07839). A clip without labels is never drawn.
    """
    sets = [tuple(labels) for labels in label_sets]
    counts = Counter(label for labels in sets for label in labels)
    return np.array([sum(1000 / (counts[label] + 0.01) for label in labels) for labels in sets])


def read_weights(path: Path, num_clips: int) -> NDArray[np.float64]:
    """One number per line and clip; ValueError naming the file and line for anything else."""
    weights = np.zeros(num_clips)
    lines = path.read_text(encoding="utf-8").split()
    if len(lines) != num_clips:
        raise ValueError(f"{path}: {len(lines)} weights for {num_clips} clips")
    for line, text in enumerate(lines):
        try:
            weights[line] = float(text)
        except ValueError:
            weights[line] = math.nan
        if not 0 <= weights[line] < math.inf:
            raise ValueError(f"{path}, line {line + 1}: {text!r} is not a weight of 0 or more")
    return weights
