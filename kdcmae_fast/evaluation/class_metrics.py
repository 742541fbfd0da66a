"""Metrics of classification, streamed over batches and ranks; scikit-learn's and torchmetrics'.

N clips, C classes. Each rank adds the clips it has seen; `compute` brings them together, so that
every clip counts once however the clips were dealt out.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

TOP = 5


class ClassMetrics(Protocol):
    """A metric that grows."""

    def update(self, sample_ids: Tensor, probabilities: Tensor, classes: Tensor) -> None: ...

    def compute(self) -> dict[str, Any]: ...


def require_metrics() -> None:
    """ModuleNotFoundError, saying how to install them, where the metrics libraries are not."""
    try:
        import sklearn.metrics  # noqa: F401
        import torchmetrics  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the evaluation needs {error.name}; `pip install kdcmae-fast[eval]`", name=error.name
        ) from error


def class_metrics(loss: str, num_classes: int, device: torch.device) -> ClassMetrics:
    """What suits a model trained with `loss`: one label a clip (cross_entropy), or many (bce)."""
    require_metrics()
    return SingleLabel(num_classes, device) if loss == "cross_entropy" else MultiLabel(num_classes)


class SingleLabel:
    """Accuracy of clips with one label, as counts: nothing is kept of a clip.

    compute: `top1`, `top5` (where there are five classes), `mean_class_accuracy` (of the classes
    that have clips), `chance` (one of C), `confusion` (C rows of true, C columns of predicted
    classes) and `class_accuracy` (None where a class has no clip).
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        self.num_classes = num_classes
        self.confusion = MulticlassConfusionMatrix(num_classes).to(device)
        self.top = None
        if num_classes >= TOP:
            self.top = MulticlassAccuracy(num_classes, top_k=TOP, average="micro").to(device)

    def update(self, sample_ids: Tensor, probabilities: Tensor, classes: Tensor) -> None:
        """probabilities (B, C), classes (B, K) of which the first is the label."""
        self.confusion.update(probabilities, classes[:, 0])
        if self.top is not None:
            self.top.update(probabilities, classes[:, 0])

    def compute(self) -> dict[str, Any]:
        """The figures over all ranks, on every rank."""
        with warnings.catch_warnings():  # a rank may have had no clip at all
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            table: NDArray[np.int64] = self.confusion.compute().cpu().numpy()
            top = None if self.top is None else float(self.top.compute())
        clips = table.sum(axis=1)
        right = np.diagonal(table)
        accuracy = [int(r) / int(n) if n else None for r, n in zip(right, clips, strict=True)]
        found = [value for value in accuracy if value is not None]
        figures: dict[str, Any] = {"top1": int(right.sum()) / int(clips.sum())}
        if top is not None:  # a share in float32: back to the count
            figures["top5"] = round(top * int(clips.sum())) / int(clips.sum())
        return {
            **figures,
            "mean_class_accuracy": math.fsum(found) / len(found),
            "chance": 1 / self.num_classes,
            "classes_with_clips": len(found),
            "class_accuracy": accuracy,
            "confusion": table.tolist(),
        }


class MultiLabel:
    """Ranking of the clips by each class, for clips with any number of labels.

    Keeps (N, C) probabilities: ranking is over all clips at once. compute: `mAP`, `AUC` (means over
    the classes that some clips have and some have not, in float64), `d_prime` = sqrt(2) times the
    normal quantile of the AUC, `classes_with_clips`, and `class_AP`, `class_AUC` (None where not
    defined).
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._rows: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def update(self, sample_ids: Tensor, probabilities: Tensor, classes: Tensor) -> None:
        """probabilities (B, C), classes (B, K), filled up with -1."""
        wide = torch.zeros(len(classes), self.num_classes + 1, dtype=torch.bool)
        wide.scatter_(1, torch.where(classes < 0, self.num_classes, classes).cpu(), True)
        has = wide[:, : self.num_classes].numpy()
        self._rows.append((sample_ids.cpu().numpy(), probabilities.float().cpu().numpy(), has))

    def compute(self) -> dict[str, Any]:
        """The figures over all ranks, on every rank."""
        parts = _gather(self._rows)
        ids, scores, has = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(ids, kind="stable")  # the same sums whatever rank a clip was on
        return ranking_figures(scores[order], has[order])


def ranking_figures(scores: NDArray[Any], has: NDArray[Any]) -> dict[str, Any]:
    """mAP, AUC and d' of scores (N, C) against labels (N, C), as `MultiLabel` describes them."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores = scores.astype(np.float64)
    precision: list[float | None] = []
    area: list[float | None] = []
    for score, truth in zip(scores.T, has.T, strict=True):
        defined = bool(truth.any()) and not bool(truth.all())
        precision.append(float(average_precision_score(truth, score)) if truth.any() else None)
        area.append(float(roc_auc_score(truth, score)) if defined else None)
    if not any(value is not None for value in precision):
        raise ValueError("no clip has a label: nothing to evaluate")
    auc = _mean(area)
    return {
        "mAP": _mean(precision),
        "AUC": auc,
        "d_prime": None if auc is None else d_prime(auc),
        "chance": float(has.mean()),
        "classes_with_clips": sum(value is not None for value in precision),
        "class_AP": precision,
        "class_AUC": area,
    }


def d_prime(auc: float) -> float | None:
    """How far apart two normal distributions of equal width lie whose AUC this is.

    None where that is infinitely far, at 0 and 1.
    """
    distance = math.sqrt(2) * float(torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)))
    return distance if math.isfinite(distance) else None


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def _gather(rows: list[Any]) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
