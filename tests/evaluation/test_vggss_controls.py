"""The published rules on the real VGG-SS annotations, which are not part of this project.

KDCMAE_VGGSS=/path/to/vggss.json pytest tests/evaluation/test_vggss_controls.py
"""

import os
from pathlib import Path

import pytest
import vggss_controls
from vggss_controls import BEST

from kdcmae_fast.data.datasets.boxes import ClipBoxes, read_vggss_boxes
from kdcmae_fast.evaluation.localization_controls import DISC, SQUARE, WHOLE
from kdcmae_fast.evaluation.localization_scores import truth_map

FILE = os.environ.get("KDCMAE_VGGSS")
TABLE = {  # percent AP50 and AUC; computed apart from this code, from the annotations alone
    "union": {WHOLE: (21.95, 31.25), SQUARE: (31.87, 36.93), DISC: (34.02, 37.44),
              BEST: (50.54, 49.47)},
    "first": {DISC: (32.90, 36.11), BEST: (47.60, 47.45)},
}  # fmt: skip


@pytest.mark.skipif(not FILE, reason="VGG-SS's annotations: set KDCMAE_VGGSS to vggss.json")
def test_controls_of_the_real_annotations():
    clips = read_vggss_boxes(Path(FILE))
    assert (len(clips), sum(len(clip.boxes) for clip in clips)) == (5158, 5941)
    empty = {rule: sum(not truth_map(clip, rule).any() for clip in clips) for rule in TABLE}
    assert empty == {"union": 2, "first": 16}
    for rule, expected in TABLE.items():
        found = vggss_controls.controls(clips, rule)
        assert {n: (found[n]["ap50"], found[n]["auc"]) for n in expected} == expected


def test_controls_of_two_clips():
    clips = [
        ClipBoxes("whole", ((0.0, 0.0, 1.0, 1.0),), 1.0),
        ClipBoxes("corner", ((0.0, 0.0, 0.25, 0.25), (0.0, 0.0, 0.5, 1.0)), 1.0),
    ]
    found = vggss_controls.controls(clips, "union")
    assert found[WHOLE] == {"ap50": 100.0, "auc": 76.25}  # cIoUs 1 and 0.5
    assert found[BEST] == {"ap50": 100.0, "auc": 76.25}  # 0.5 and 1
    first = vggss_controls.controls(clips, "first")
    assert first[WHOLE]["ap50"] == 50.0 and first[DISC]["auc"] < found[DISC]["auc"]
