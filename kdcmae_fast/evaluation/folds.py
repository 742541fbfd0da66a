"""Which clips a probe trains on and which it is tested on. N labelled clips, numbered from 0."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Fold(NamedTuple):
    """Clips to train on and clips to test on, (n,) and (m,) numbers, none in both."""

    train: Indices
    test: Indices


def stratified_split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[Indices, Indices]:
    """Numbers of the clips kept and of those held out: `share` of each class, drawn from `seed`.

    labels: (N,). At least one clip of every class is held out and at least one kept; ValueError
    naming the class where there are fewer than two.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1")
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for label in np.unique(labels):
        numbers = rng.permutation(np.flatnonzero(labels == label))
        if len(numbers) < 2:
            raise ValueError(
                f"class {label} has {len(numbers)} clip: two are needed to hold one out"
            )
        count = min(max(round(share * len(numbers)), 1), len(numbers) - 1)
        held.append(numbers[:count])
        kept.append(numbers[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def stratified_folds(labels: NDArray[np.int64], num_folds: int, seed: int) -> list[Fold]:
    """Every clip in the test part of one fold, every class spread evenly over the folds.

    Each class is shuffled (from `seed`) and dealt out in turn, the classes one after another.
    """
    if num_folds < 2:
        raise ValueError(f"folds={num_folds} must be at least 2")
    rng = np.random.default_rng(seed)
    dealt = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    )
    fold_of = np.empty(len(labels), dtype=np.int64)
    fold_of[dealt] = np.arange(len(labels)) % num_folds
    return [
        Fold(np.flatnonzero(fold_of != k), np.flatnonzero(fold_of == k)) for k in range(num_folds)
    ]


def check_folds(
    folds: Sequence[Fold], labels: NDArray[np.int64], class_names: Sequence[str]
) -> None:
    """ValueError for a fold no probe can be made of: one line that says which, and the class.

    labels: (N,) class numbers from 0. class_names: their names.
    """
    for number, fold in enumerate(folds, 1):
        where = f"fold {number} of {len(folds)}" if len(folds) > 1 else "the split"
        for part, indices in (("train on", fold.train), ("test on", fold.test)):
            if not len(indices):
                raise ValueError(f"{where} has no clips to {part}")
        if both := np.intersect1d(fold.train, fold.test).tolist():
            raise ValueError(f"{where}: {len(both)} clips are both trained and tested on")
        counts = Counter(labels[fold.train].tolist())
        for label in np.unique(labels[fold.test]).tolist():
            if label not in counts:
                raise ValueError(
                    f"{where}: class {class_names[label]!r} is tested, but has no training clip"
                )
        for label, count in sorted(counts.items()):
            if count < 2:
                raise ValueError(
                    f"{where}: class {class_names[label]!r} has one training clip; at least two "
                    "are needed (one to select the hyper-parameter): leave the class out"
                )
        if len(counts) < 2:
            raise ValueError(f"{where} has clips of one class only: there is nothing to tell apart")
