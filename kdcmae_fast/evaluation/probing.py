"""`probe`: how far simple classifiers get on a model's frozen features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.evaluation.features import ClipFeatures, extract_features, require_finite
from kdcmae_fast.evaluation.folds import Fold, check_folds
from kdcmae_fast.evaluation.probe_classifiers import (
    Classifier,
    Floats,
    ProbeResult,
    fit_probe,
    fits_of,
)
from kdcmae_fast.evaluation.probe_clips import ProbeClips, check_probe, class_names, probe_clips
from kdcmae_fast.evaluation.processes import launched_processes
from kdcmae_fast.evaluation.source import (
    EvaluationSource,
    Opened,
    listed_bad,
    modalities_of,
    write_metrics,
)
from kdcmae_fast.messages import require_folder

Modality = Literal["audio", "video", "both"]


def probe(
    source: EvaluationSource,
    *,
    modality: Modality | None = None,
    classifier: Classifier = "linear",
    folds: int | None = None,
    test_path: str | None = None,
    test_clips: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Train a simple classifier on frozen features of labelled clips, and test it on others.

    source: the model and the clips to train on (`num_clips` of them). Synthetic clips are tested on
        the held-out ones, others on the list `test_path`; `test_clips` of them (None: all).
    folds: draw that many stratified folds from the source's clips instead. With {fold} in data.path
        and in `test_path` the folds are those lists, for 1, 2, ... (as `kdcmae datasets` writes
        them for ESC-50, UCF101 and HMDB51); then `folds` may say how many there must be.
    modality: features to take, "both" of them side by side (None: those that model and clips have).
    classifier: "linear", "svm" or "knn", see `fit_probe`, whose hyper-parameter is selected on
        clips held out from the training part. seed: of that choice and of drawn folds.
    output: folder for metrics.json (None: writes nothing).

    Returns what metrics.json holds, on all processes of a launcher: they share the extraction of
    the features, and the first one trains and writes.

    Errors: ValueError for clips without labels, with several, folds that do not fit.
    """
    if output is not None:
        require_folder(output)
    processes = launched_processes()
    found = probe_clips(source, folds=folds, test_path=test_path, test_clips=test_clips)
    check_probe(found, seed)
    opened = found.opened
    modalities = _modalities(opened, modality)
    features = extract_features(
        opened.model,
        found.clips,
        opened.data,
        batch_size=source.batch_size,
        progress=source.progress,
        processes=processes,
        modalities=modalities,
    )

    def probed() -> dict[str, Any]:
        metrics = {
            "command": "probe",
            **opened.described,
            "clips_of": found.train_of,
            "tested_on": found.test_of,
            "modality": "both" if len(modalities) == 2 else modalities[0],
            **_probed(found, features, modalities, classifier, seed, source.progress),
            **listed_bad(features.bad),
        }
        write_metrics(metrics, output)
        return metrics

    return processes.on_first(probed)


def probe_features(
    features: Floats,
    labels: NDArray[np.int64],
    folds: list[Fold],
    *,
    classifier: Classifier = "linear",
    names: list[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Figures of a probe on features that are there already.

    features: (N, D). labels: (N,) class numbers 0 ... C - 1; tensors on the CPU will do. folds: who
        trains and who is tested.
    names: of the C classes (None: their numbers). progress: a bar on stderr.

    Returns the figures of metrics.json: accuracy and balanced accuracy (the mean over the classes
    tested), both means over folds; chance (1 / C); majority, the accuracy of always naming the most
    frequent training class; confusion (C, C), true class by predicted, over all folds; and for
    each fold its own figures, the value selected and the validation curve.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    count = int(labels.max()) + 1
    names = [str(k) for k in range(count)] if names is None else names
    check_folds(folds, labels, names)
    confusion = np.zeros((count, count), dtype=np.int64)
    rows = []
    with _bar(progress, len(folds) * fits_of(classifier), classifier) as tried:
        for fold in folds:
            result = fit_probe(
                features[fold.train],
                labels[fold.train],
                features[fold.test],
                classifier=classifier,
                seed=seed,
                tried=tried,
            )
            own = np.zeros_like(confusion)
            np.add.at(own, (labels[fold.test], result.predictions), 1)
            confusion += own
            majority = np.bincount(labels[fold.train], minlength=count).argmax()
            rows.append(_row(fold, result, own, int(majority)))
    figures = ("accuracy", "balanced_accuracy", "majority")
    means = {name: float(np.mean([row[name] for row in rows])) for name in figures}
    return {
        "classifier": classifier,
        "num_classes": count,
        **means,
        "chance": 1 / count,
        "headline": {
            "accuracy": means["accuracy"],
            "balanced accuracy": means["balanced_accuracy"],
            "chance": 1 / count,
        },
        "num_features": features.shape[1],
        "selection_seed": seed,
        "folds": rows,
        "class_names": names,
        "confusion": confusion.tolist(),
    }


def probe_table(metrics: Mapping[str, Any]) -> str:
    """The figures of `probe` for a terminal."""
    rows = metrics["folds"]
    lines = [f"{'fold':6}{'train':>8}{'test':>8}{'accuracy':>10}{'balanced':>10}  selected"]
    for number, row in enumerate(rows, 1):
        lines.append(
            f"{number:<6}{row['train_clips']:>8}{row['test_clips']:>8}{row['accuracy']:>10.1%}"
            f"{row['balanced_accuracy']:>10.1%}  {row['parameter']}={row['selected']:g} on "
            f"{row['validation_clips']} validation clips"
            + ("" if row["converged"] else " (the fit reached its limit of iterations)")
        )
    if len(rows) > 1:
        means = f"{metrics['accuracy']:>10.1%}{metrics['balanced_accuracy']:>10.1%}"
        lines.append(f"{'mean':22}{means}")
    lines.append(
        f"{metrics['classifier']} on {metrics['modality']} features: accuracy is "
        f"{metrics['accuracy'] / metrics['chance']:.1f} times chance (1 of "
        f"{metrics['num_classes']} classes); always the most frequent class: "
        f"{metrics['majority']:.1%}"
    )
    return "\n".join(lines)


def _probed(
    found: ProbeClips,
    features: ClipFeatures,
    modalities: tuple[str, ...],
    classifier: Classifier,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """The figures of `probe_features` on the clips that could be read."""
    require_finite(features)
    labels, classes = _labels(features)
    return probe_features(
        np.concatenate([getattr(features, name).numpy() for name in modalities], axis=1),
        labels,
        found.usable(features.sample_ids.numpy(), labels, seed),
        classifier=classifier,
        names=class_names(found.opened, classes),
        seed=seed,
        progress=progress,
    )


def _row(
    fold: Fold, result: ProbeResult, confusion: NDArray[np.int64], majority: int
) -> dict[str, Any]:
    tested = confusion.sum(axis=1)
    recalls = confusion.diagonal()[tested > 0] / tested[tested > 0]
    return {
        "accuracy": float(confusion.trace() / confusion.sum()),
        "balanced_accuracy": float(recalls.mean()),
        "majority": float(tested[majority] / tested.sum()),
        "train_clips": len(fold.train),
        "test_clips": len(fold.test),
        "validation_clips": result.num_validation,
        "parameter": result.parameter,
        "selected": result.value,
        "validation_curve": [{"value": value, "accuracy": acc} for value, acc in result.curve],
        "converged": result.converged,
    }


def _modalities(opened: Opened, modality: Modality | None) -> tuple[str, ...]:
    """What to encode; ValueError where the model or the clips do not have it."""
    sounds = opened.data.source == "sounds"
    if modality is None:
        found = list(modalities_of(opened))
    else:
        found = ["audio", "video"] if modality == "both" else [modality]
    for name in found:
        if name not in ("audio", "video"):
            raise ValueError(f"modality={name!r} must be 'audio', 'video' or 'both'")
    if not found or ("video" in found and sounds):
        raise ValueError(
            "--modality: data.source=sounds has no pictures, and the probe needs video"
        )
    opened.model.require(*found)
    return tuple(found)


def _labels(features: ClipFeatures) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class numbers from 0 of the clips that could be read, and the datasets' numbers of them."""
    found = features.labels.numpy()
    if (found < 0).any():
        first = features.video_ids[int(np.argmax(found < 0))]
        raise ValueError(
            f"{int((found < 0).sum())} of {len(found)} clips have no label, the first is {first}; "
            "a probe needs a list with labels (data.source=manifest, shards or sounds, "
            "data.label_csv=CSV)"
        )
    classes, labels = np.unique(found, return_inverse=True)
    return labels.astype(np.int64), classes


class _bar:  # noqa: N801  # used as a function
    """A progress bar of so many fits on stderr, where it is wanted and tqdm is installed."""

    def __init__(self, shown: bool, total: int, name: str) -> None:
        self._tqdm: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self._tqdm = tqdm(total=total, unit="fit", desc=name, dynamic_ncols=True)

    def __enter__(self) -> Any:
        return self._tqdm.update if self._tqdm is not None else (lambda: None)

    def __exit__(self, *_: object) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
