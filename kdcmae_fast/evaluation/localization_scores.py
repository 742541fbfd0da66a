"""Scores of localisation maps against boxes, by the rules of EZ-VSL and AVL.

Localizing Visual Sounds the Easy Way (Mo & Morgado, arXiv 2203.09324) and its successor AVL
(doi 10.1145/3577190.3614144). N maps, S = 224 pixels a side, everything NumPy.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcmae_fast.data.datasets.boxes import ClipBoxes

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]
Truth = Literal["union", "first", "consensus"]

SIZE = 224  # pixels a side of the pictures that scores are computed on
THRESHOLDS = np.arange(21) * 0.05  # of the success curve, 0 to 1
SUCCESS = 0.5  # cIoU from which on a clip counts as localised
AGREEING = 2.0  # boxes over a pixel that make it certain (Flickr-SoundNet)


class MapScores(NamedTuple):
    """What one map is worth against one clip's truth.

    ciou: of the half of the picture where the map is highest (`half_mask`). size_aware: IoU of as
    many of its highest pixels as the truth has. pointing: 1 if its highest pixel is in the truth
    (a share where several are highest). range_iou: IoU of the pixels above half of its range.
    """

    ciou: float
    size_aware: float
    pointing: float
    range_iou: float


def truth_map(clip: ClipBoxes, rule: Truth = "union", size: int = SIZE) -> Map:
    """(size, size) in [0, 1]: how surely each pixel belongs to what sounds.

    rule: "union" of the boxes (EZ-VSL on VGG-SS), the "first" box alone (AVL on VGG-SS), or
        "consensus" (both on Flickr-SoundNet): half per box over a pixel, at most 1. Boxes count,
        not annotators: two of one annotator are enough.
    """
    if rule not in get_args(Truth):
        raise ValueError(f"rule={rule!r} must be one of {', '.join(get_args(Truth))}")
    boxes = clip.pixels(size)
    covered = np.zeros((size, size), dtype=np.float32)
    for x0, y0, x1, y1 in boxes[:1] if rule == "first" else boxes:
        covered[y0:y1, x0:x1] += 1
    return np.minimum(covered / AGREEING if rule == "consensus" else covered, 1)


def half_mask(values: ArrayLike) -> Mask:
    """The half of the picture where a map is highest: at least its upper median.

    Exactly half of the pixels but for ties at the median: a constant map selects all of them. A map
    of NaN selects none.
    """
    return _highest(np.asarray(values), np.size(values) // 2)


def ciou(mask: ArrayLike, truth: ArrayLike) -> float:
    """Consensus IoU: sum(M G) / (sum(G) + pixels of M where G is 0); 0 where there is no truth."""
    chosen, given = np.asarray(mask, dtype=bool), np.asarray(truth, dtype=np.float64)
    total = given.sum() + np.count_nonzero(chosen & (given == 0))
    return float(given[chosen].sum() / total) if total else 0.0


def score_map(values: ArrayLike, truth: ArrayLike) -> MapScores:
    """All scores of one map (S, S) against one truth (S, S)."""
    values, truth = np.asarray(values), np.asarray(truth)
    inside = truth > 0
    area = int(np.count_nonzero(inside))
    if not area or np.isnan(values).all():
        return MapScores(ciou(half_mask(values), truth), 0.0, 0.0, 0.0)
    top = values == np.nanmax(values)
    low, high = np.nanmin(values), np.nanmax(values)
    return MapScores(
        ciou(half_mask(values), truth),
        _iou(_highest(values, values.size - area), inside),
        float(inside[top].mean()),
        _iou(values >= (low + high) / 2, inside),
    )


def success_curve(cious: ArrayLike) -> NDArray[np.float64]:
    """(21,) share of clips with at least each threshold's cIoU."""
    values = np.asarray(cious, dtype=np.float64)
    return (values[None] >= THRESHOLDS[:, None]).mean(1)


def curve_area(cious: ArrayLike) -> float:
    """AUC: area under the success curve, by trapezoids; about the mean cIoU."""
    curve = success_curve(cious)
    return float(((curve[1:] + curve[:-1]) / 2 * np.diff(THRESHOLDS)).sum())


def summarize(scores: Sequence[MapScores]) -> dict[str, float]:
    """Figures of N clips: mean_ciou, ap50, auc, size_aware_iou, pointing, range_iou.

    ap50: the share of clips with cIoU >= 0.5, which the papers call CIoU.
    """
    if not scores:
        raise ValueError("scores is empty: there is nothing to average")
    columns = {name: np.array([getattr(s, name) for s in scores]) for name in MapScores._fields}
    return {
        "mean_ciou": float(columns["ciou"].mean()),
        "ap50": float((columns["ciou"] >= SUCCESS).mean()),
        "auc": curve_area(columns["ciou"]),
        "size_aware_iou": float(columns["size_aware"].mean()),
        "pointing": float(columns["pointing"].mean()),
        "range_iou": float(columns["range_iou"].mean()),
    }


def best_possible(truth: ArrayLike) -> float:
    """cIoU of the best mask of exactly half the picture: no map without ties can have more."""
    given = np.sort(np.asarray(truth, dtype=np.float64), axis=None)[::-1]
    half = given.size - given.size // 2
    total = given.sum() + np.count_nonzero(given[:half] == 0)
    return float(given[:half].sum() / total) if given.sum() else 0.0


def ciou_auc(
    maps: ArrayLike, boxes: Sequence[ClipBoxes], rule: Truth = "union"
) -> dict[str, float]:
    """`summarize` of N maps (N, S, S) against the boxes of N clips, in the same order."""
    maps = np.asarray(maps)
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2]:
        raise ValueError(f"maps must be (N, S, S), got {maps.shape}")
    if len(maps) != len(boxes):
        raise ValueError(f"there are {len(maps)} maps and boxes of {len(boxes)} clips")
    size = maps.shape[1]
    return summarize(
        [score_map(m, truth_map(b, rule, size)) for m, b in zip(maps, boxes, strict=True)]
    )


def _highest(values: NDArray[np.floating], rank: int) -> Mask:
    """Where a map is at least its value of that ascending rank; ties are all in, NaN is out."""
    threshold = np.partition(values, rank, axis=None)[rank]
    return np.asarray(values >= threshold)


def _iou(mask: Mask, inside: Mask) -> float:
    both, either = np.count_nonzero(mask & inside), np.count_nonzero(mask | inside)
    return both / either if either else 0.0
