"""Scores of localisation: the constants of the published rules, brute force, bad input."""

from itertools import combinations

import numpy as np
import pytest

from kdcmae_fast.data.datasets.boxes import ClipBoxes
from kdcmae_fast.evaluation import ciou_auc
from kdcmae_fast.evaluation.localization_controls import (
    centred_disc,
    centred_square,
    random_map,
    shape_controls,
)
from kdcmae_fast.evaluation.localization_scores import (
    SIZE,
    best_possible,
    ciou,
    curve_area,
    half_mask,
    score_map,
    success_curve,
    summarize,
    truth_map,
)

ANCHOR = ClipBoxes("a", ((10, 10, 110, 110), (20, 20, 120, 120), (150, 150, 200, 200)), 224.0)


def test_consensus_anchor():
    truth = truth_map(ANCHOR, "consensus")
    assert (truth == 1).sum() == 8100 and (truth == 0.5).sum() == 6300
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[:112] = True
    assert ciou(mask, truth) == pytest.approx(0.380379, abs=5e-7)


def test_half_of_the_picture():
    assert half_mask(np.zeros((SIZE, SIZE))).sum() == 50_176
    nothing = half_mask(np.full((SIZE, SIZE), np.nan))
    assert nothing.sum() == 0 and ciou(nothing, truth_map(ANCHOR)) == 0
    assert half_mask(centred_disc()).sum() == 25_100
    assert half_mask(centred_square()).sum() == 25_600
    values = np.random.default_rng(0).random((SIZE, SIZE))
    mask = half_mask(values)
    assert mask.sum() == 25_088
    assert np.array_equal(mask, values >= np.sort(values.ravel())[25_088])


def test_boxes_become_maps():
    flickr = ClipBoxes("f", ((10, 0, 128, 255),), 256.0, (0,))
    rows, columns = np.nonzero(truth_map(flickr, "union"))
    assert (columns.min(), columns.max() + 1, rows.max() + 1) == (8, 112, 223)  # floor(224 v / 256)
    two = ClipBoxes("v", ((0.1, 0.1, -2.88e16, 0.9), (0.5, 0.5, 1.0, 1.0)), 1.0)
    assert truth_map(two, "first").sum() == 0 and truth_map(two, "union").sum() == 112 * 112
    assert ciou(half_mask(centred_disc()), truth_map(two, "first")) == 0
    overlapping = ClipBoxes("o", ((0, 0, 1, 1), (0, 0, 1, 0.5)), 1.0)
    assert truth_map(overlapping, "union").max() == 1
    assert truth_map(overlapping, "consensus")[[0, -1], 0].tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="rule='both'"):
        truth_map(two, "both")


def test_ciou_is_what_its_definition_says():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((5, 7)) < 0.5
        truth = rng.choice([0, 0, 0.5, 1], (5, 7))
        above = below = 0.0
        for m, g in zip(mask.ravel(), truth.ravel(), strict=True):
            above += g if m else 0
            below += g + (1 if m and g == 0 else 0)
        assert ciou(mask, truth) == pytest.approx(above / below if below else 0)
    assert ciou(np.zeros((2, 2)), np.zeros((2, 2))) == 0


def test_best_half():
    rng = np.random.default_rng(2)
    for _ in range(20):
        truth = rng.choice([0, 0.5, 1], (2, 4), p=(0.5, 0.2, 0.3))
        masks = (np.isin(np.arange(8), some).reshape(2, 4) for some in combinations(range(8), 4))
        assert best_possible(truth) == pytest.approx(max(ciou(m, truth) for m in masks))
    box = truth_map(ClipBoxes("b", ((0, 0, 0.25, 0.5),), 1.0))
    assert best_possible(box) == pytest.approx(box.sum() / 25_088)
    assert best_possible(np.ones((SIZE, SIZE))) == pytest.approx(0.5)


def test_success_curve_and_its_area():
    values = [0.0, 0.2, 0.5, 0.97]
    thresholds = [0.05 * k for k in range(21)]
    rates = [sum(v >= t for v in values) / 4 for t in thresholds]
    assert success_curve(values).tolist() == rates and rates[0] == 1
    assert curve_area(values) == pytest.approx(np.trapezoid(rates, thresholds))
    many = np.random.default_rng(3).random(5000)
    assert curve_area(many) == pytest.approx(many.mean(), abs=0.004)
    assert curve_area([1.0]) == pytest.approx(1)


def test_scores_that_know_the_size():
    truth = truth_map(ClipBoxes("b", ((0.1, 0.2, 0.4, 0.6),), 1.0))
    perfect = score_map(truth + 0.001 * centred_disc() / SIZE, truth)
    assert perfect.size_aware == 1 and perfect.pointing == 1 and perfect.range_iou == 1
    assert perfect.ciou == pytest.approx(best_possible(truth), abs=1e-3)
    opposite = score_map(-truth, truth)
    assert opposite.ciou < 1e-6 + truth.sum() / truth.size and opposite.pointing == 0
    whole = score_map(np.ones((SIZE, SIZE)), truth)
    share = truth.mean()
    assert whole == pytest.approx((share, share, share, share), rel=1e-5)
    none = score_map(np.full((SIZE, SIZE), np.nan), truth)
    assert none == (0, 0, 0, 0)
    empty = score_map(np.ones((SIZE, SIZE)), np.zeros((SIZE, SIZE)))
    assert empty == (0, 0, 0, 0)


def test_many_clips():
    disc = centred_disc()
    boxes = [ANCHOR, ClipBoxes("b", ((60, 60, 160, 160),), 224.0)]
    found = ciou_auc(np.stack([disc, disc]), boxes)
    each = [ciou(half_mask(disc), truth_map(b)) for b in boxes]
    assert found["mean_ciou"] == pytest.approx(np.mean(each))
    assert found["ap50"] == np.mean([c >= 0.5 for c in each]) and found["pointing"] == 0.5 + 0.5 * (
        truth_map(ANCHOR)[111, 111] > 0
    )
    with pytest.raises(ValueError, match="2 maps and boxes of 1 clips"):
        ciou_auc(np.stack([disc, disc]), boxes[:1])
    with pytest.raises(ValueError, match="must be"):
        ciou_auc(disc, boxes)
    with pytest.raises(ValueError, match="scores is empty"):
        summarize([])


def test_controls_are_the_same_in_every_run():
    assert list(shape_controls(3)) == ["centred disc", "centred square", "whole picture", "random"]
    assert np.array_equal(random_map(3), random_map(3))
    assert not np.array_equal(random_map(3), random_map(4))
    assert random_map(3).shape == (SIZE, SIZE) and random_map(3).min() >= 0
    assert centred_disc()[0, 0] == pytest.approx(-np.hypot(111.5, 111.5))
    assert centred_square()[0, 5] == -111.5
