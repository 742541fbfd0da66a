"""Simple classifiers on frozen features: linear, linear SVM, k nearest neighbours.

A probe sees training features, training labels and test features, never the labels of the test:
its hyper-parameter is selected on clips held out from the training part. N training clips, M test
clips, D features.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.evaluation.folds import stratified_split

Classifier = Literal["linear", "svm", "knn"]
Floats = NDArray[np.floating]

# What is tried, from the strongest regularisation to the weakest: of equals the first is taken.
CANDIDATES: dict[str, tuple[float, ...]] = {
    "linear": (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),  # C of the logistic regression
    "svm": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),  # C of LinearSVC, as XKD (arXiv 2211.13929) tries
    "knn": (50, 20, 10, 5, 3, 1),  # k
}
PARAMETERS = {"linear": "C", "svm": "C", "knn": "k"}
VALIDATION_SHARE = 0.2  # of each class of the training part
MAX_ITERATIONS = 1000


class ProbeResult(NamedTuple):
    """What a probe says of the test clips, and how it was chosen.

    predictions: (M,) labels. parameter: its name, "C" or "k". value: the one selected. curve:
    accuracy on the validation clips of every value tried. num_validation: how many clips those
    were. converged: whether the last fit ended before its limit of iterations.
    """

    predictions: NDArray[np.int64]
    parameter: str
    value: float
    curve: tuple[tuple[float, float], ...]
    num_validation: int
    converged: bool


def fit_probe(
    train: Floats,
    labels: NDArray[np.int64],
    test: Floats,
    *,
    classifier: Classifier = "linear",
    candidates: Sequence[float] | None = None,
    seed: int = 0,
    tried: Callable[[], object] = lambda: None,
) -> ProbeResult:
    """Select the hyper-parameter, train on all of the training part, predict the test part.

    train: (N, D). labels: (N,), at least two of each class. test: (M, D).
    classifier: "linear" (multinomial logistic regression), "svm" (linear, one class against the
        rest) or "knn" (majority among the k most similar by cosine). Features are standardised by
        mean and deviation of the clips that are fitted.
    candidates: values of C or k (None: `CANDIDATES`), tried in turn on `VALIDATION_SHARE` of each
        class, drawn from `seed`; of equally good ones the first is taken.
    tried: called after each fit, for a progress bar.

    Errors: ValueError for features that are not finite, for one class, for a class of one clip.
    """
    _check(train, labels, test)
    _require_sklearn()
    kept, held = stratified_split(labels, VALIDATION_SHARE, seed)
    values = list(CANDIDATES[classifier] if candidates is None else candidates)
    if classifier == "knn":  # more neighbours than clips there are not
        values = [k for k in values if k <= len(kept)] or [len(kept)]
    curve = []
    for value in values:
        model = _fitted(classifier, value, train[kept], labels[kept], seed)
        curve.append((value, float((model.predict(train[held]) == labels[held]).mean())))
        tried()
    best = max(curve, key=lambda point: point[1])[0]
    model = _fitted(classifier, best, train, labels, seed)
    tried()
    iterations = np.max(getattr(model[-1], "n_iter_", 0))
    return ProbeResult(
        model.predict(test),
        PARAMETERS[classifier],
        best,
        tuple(curve),
        len(held),
        bool(iterations < MAX_ITERATIONS),
    )


def fits_of(classifier: Classifier) -> int:
    """How often `fit_probe` calls `tried` with its own candidates, at most."""
    return len(CANDIDATES[classifier]) + 1


def _fitted(
    classifier: Classifier, value: float, features: Floats, labels: NDArray[np.int64], seed: int
) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    if classifier == "linear":
        estimator = LogisticRegression(C=value, max_iter=MAX_ITERATIONS)
    elif classifier == "svm":
        estimator = LinearSVC(C=value, max_iter=MAX_ITERATIONS, random_state=seed)
    elif classifier == "knn":
        estimator = KNeighborsClassifier(int(value), metric="cosine", algorithm="brute")
    else:
        raise ValueError(f"classifier={classifier!r} must be one of {', '.join(CANDIDATES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by `converged`
        return make_pipeline(StandardScaler(), estimator).fit(features, labels)


def _check(train: Floats, labels: NDArray[np.int64], test: Floats) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train and test must be (N, D) and (M, D), got {train.shape} and {test.shape}"
        )
    if labels.shape != train.shape[:1]:
        raise ValueError(f"labels must be ({len(train)},), got {labels.shape}")
    for name, features in (("train", train), ("test", test)):
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: features of {_bad_rows(features)} clips are not finite")
    if len(np.unique(labels)) < 2:
        raise ValueError("labels: all clips are of one class")


def _bad_rows(features: Floats) -> int:
    return int((~np.isfinite(features)).any(axis=1).sum())


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a probe needs scikit-learn; `pip install kdcmae-fast[eval]`", name=error.name
        ) from error
