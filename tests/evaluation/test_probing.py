"""Classifiers on frozen features: as scikit-learn has it, and blind to the labels of tests."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from kdcmae_fast.evaluation import Fold, fit_probe, probe_features
from kdcmae_fast.evaluation.folds import check_folds, stratified_folds, stratified_split
from kdcmae_fast.evaluation.probe_classifiers import CANDIDATES, PARAMETERS

CLASSIFIERS = tuple(CANDIDATES)


def blobs(per_class: int, classes: int = 4, *, width: int = 12, spread: float = 1.6, seed: int = 0):
    """Overlapping clouds of features with scales of their own, and their labels, shuffled."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    features = centres[labels] + spread * rng.normal(size=(len(labels), width))
    return features * 10.0 ** rng.integers(-2, 3, width) + 5, labels


def by_hand(classifier: str, value: float, train, labels, test):
    """Standardise and fit with scikit-learn's classes, nothing of ours."""
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std
    if classifier == "linear":
        model = LogisticRegression(C=value, max_iter=1000)
    elif classifier == "svm":
        model = LinearSVC(C=value, max_iter=1000, random_state=3)
    else:
        model = KNeighborsClassifier(int(value), metric="cosine")
    return model.fit(train, labels).predict(test)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_equals_scikit_learn_run_by_hand(classifier):
    train, labels = blobs(30)
    test, _ = blobs(20, seed=1)
    found = fit_probe(train, labels, test, classifier=classifier, seed=3)
    kept, held = stratified_split(labels, 0.2, 3)
    values = [v for v in CANDIDATES[classifier] if classifier != "knn" or v <= len(kept)]
    curve = [
        (v, (by_hand(classifier, v, train[kept], labels[kept], train[held]) == labels[held]).mean())
        for v in values
    ]
    assert found.parameter == PARAMETERS[classifier] and found.num_validation == len(held) == 24
    assert [v for v, _ in found.curve] == values
    np.testing.assert_allclose([a for _, a in found.curve], [a for _, a in curve], atol=1e-12)
    assert found.value == max(curve, key=lambda point: point[1])[0]
    expected = by_hand(classifier, found.value, train, labels, test)
    np.testing.assert_array_equal(found.predictions, expected)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_test_labels_change_the_score_and_nothing_else(classifier):
    features, labels = blobs(30)
    fold = Fold(np.arange(80), np.arange(80, 120))
    honest = probe_features(features, labels, [fold], classifier=classifier)
    other = labels.copy()
    other[80:] = np.roll(np.random.default_rng(0).permutation(labels[80:]), 1)
    shuffled = probe_features(features, other, [fold], classifier=classifier)
    changing = {"accuracy", "balanced_accuracy", "majority"}
    kept = [
        {key: value for key, value in found["folds"][0].items() if key not in changing}
        for found in (honest, shuffled)
    ]
    assert kept[0] == kept[1]  # the value selected and its curve, too
    assert honest["accuracy"] > 0.6 > shuffled["accuracy"]
    columns = [np.sum(found["confusion"], axis=0) for found in (honest, shuffled)]
    np.testing.assert_array_equal(*columns)  # the predictions are the same


def test_figures_equal_scikit_learns():
    features, labels = blobs(25, classes=5)
    labels = np.where(labels == 4, 0, labels)  # class 0 twice as frequent
    folds = stratified_folds(labels, 3, seed=1)
    found = probe_features(features, labels, folds, classifier="linear", names=list("abcd"))
    confusion = np.zeros((4, 4), dtype=int)
    for fold, row in zip(folds, found["folds"], strict=True):
        said = fit_probe(features[fold.train], labels[fold.train], features[fold.test]).predictions
        truth = labels[fold.test]
        confusion += confusion_matrix(truth, said, labels=range(4))
        assert row["accuracy"] == pytest.approx((said == truth).mean())
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
        assert row["majority"] == pytest.approx((truth == 0).mean())
    assert found["confusion"] == confusion.tolist() and confusion.sum() == 125
    assert found["class_names"] == ["a", "b", "c", "d"] and found["chance"] == 0.25
    assert found["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in found["folds"]]))
    assert found["headline"] == {
        "accuracy": found["accuracy"],
        "balanced accuracy": found["balanced_accuracy"],
        "chance": 0.25,
    }


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_features_of_noise_give_chance(classifier):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 480)
    folds = stratified_folds(labels, 3, seed=0)
    found = probe_features(rng.normal(size=(480, 16)), labels, folds, classifier=classifier)
    assert abs(found["accuracy"] - 0.25) < 4 * (0.25 * 0.75 / 480) ** 0.5


def test_the_scale_of_a_feature_does_not_matter():
    train, labels = blobs(20)
    test, _ = blobs(10, seed=1)
    scale = 10.0 ** np.arange(-3, 9)
    first, second = (fit_probe(train * s, labels, test * s, classifier="knn") for s in (1.0, scale))
    np.testing.assert_array_equal(first.predictions, second.predictions)


def test_of_equal_values_the_strongest_regularisation():
    features = np.repeat(np.eye(3) * 100, 10, axis=0)
    found = fit_probe(features, np.repeat(np.arange(3), 10), features, candidates=(1e-2, 1.0, 10.0))
    assert [accuracy for _, accuracy in found.curve] == [1, 1, 1] and found.value == 1e-2


def test_a_weak_selection_would_show():
    """The value selected is as good as the best by cross-validation, within noise."""
    features, labels = blobs(60, spread=2.5, width=40)
    found = fit_probe(features, labels, features[:1])
    scaled = (features - features.mean(0)) / features.std(0)
    scores = {
        value: cross_val_score(LogisticRegression(C=value, max_iter=1000), scaled, labels).mean()
        for value in CANDIDATES["linear"]
    }
    assert scores[found.value] > max(scores.values()) - 0.05


def test_split_takes_a_share_of_every_class():
    labels = np.array([0] * 10 + [1] * 2 + [2] * 41)
    kept, held = stratified_split(labels, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(53))
    assert np.bincount(labels[held]).tolist() == [2, 1, 8]
    assert held.tolist() == stratified_split(labels, 0.2, seed=0)[1].tolist()
    assert held.tolist() != stratified_split(labels, 0.2, seed=1)[1].tolist()
    with pytest.raises(ValueError, match="class 7 has 1 clip"):
        stratified_split(np.array([1, 1, 7]), 0.2, 0)


def test_drawn_folds_cover_every_clip_once_and_every_class_evenly():
    labels = np.random.default_rng(0).permutation(np.array([0] * 10 + [1] * 7 + [2] * 23))
    folds = stratified_folds(labels, 4, seed=0)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(40))
    for fold in folds:
        assert sorted([*fold.train, *fold.test]) == list(range(40))
        expected = np.bincount(labels) / 4
        assert (np.abs(np.bincount(labels[fold.test], minlength=3) - expected) < 1).all()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, 2, 3], [], "the split has no clips to test on"),
        ([0, 1, 2, 3], [3, 4], "1 clips are both trained and tested on"),
        ([0, 1, 2], [4], "class 'b' has one training clip"),
        ([0, 1, 2, 3], [4, 5], "class 'c' is tested, but has no training clip"),
        ([0, 1], [6], "clips of one class only"),
    ],
)
def test_folds_no_probe_can_be_made_of(train, test, message):
    labels = np.array([0, 0, 1, 1, 1, 2, 0])
    fold = Fold(np.array(train, dtype=np.int64), np.array(test, dtype=np.int64))
    with pytest.raises(ValueError, match=message) as caught:
        check_folds([fold], labels, ["a", "b", "c"])
    assert "\n" not in str(caught.value)


def test_features_that_are_not_numbers_are_refused():
    features, labels = blobs(5)
    bad = features.copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="train: features of 1 clips are not finite"):
        fit_probe(bad, labels, features)
