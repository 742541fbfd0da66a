"""What maps that hear nothing score on VGG-SS: the anchors beside which a model's figures stand.

    python benchmarks/vggss_controls.py vggss.json [--results FILE]

No model, no pictures and no sounds are needed. docs/localization.md has the table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdcmae_fast.data.datasets.boxes import ClipBoxes, read_vggss_boxes
from kdcmae_fast.evaluation.localization_controls import RANDOM, shape_controls
from kdcmae_fast.evaluation.localization_scores import (
    SUCCESS,
    Truth,
    best_possible,
    ciou,
    curve_area,
    half_mask,
    truth_map,
)
from kdcmae_fast.training.provenance import git_commit, versions

BEST = "best half of the picture"
RULES: tuple[Truth, ...] = ("union", "first")  # EZ-VSL's and AVL's


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotations", type=Path, metavar="vggss.json")
    parser.add_argument("--results", type=Path, help="write the figures there")
    options = parser.parse_args()
    clips = read_vggss_boxes(options.annotations)
    found = {rule: controls(clips, rule) for rule in RULES}
    for rule, rows in found.items():
        print(f"{rule:30}  AP50    AUC  (percent)")
        for name, row in rows.items():
            print(f"  {name:28} {row['ap50']:5.2f}  {row['auc']:5.2f}")
    if options.results:
        record = {
            "what": "benchmarks/vggss_controls.py, percent",
            "commit": git_commit(),
            "versions": versions(),
            "clips": len(clips),
            "boxes": sum(len(clip.boxes) for clip in clips),
            "controls": found,
        }
        options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def controls(clips: Sequence[ClipBoxes], rule: Truth) -> dict[str, dict[str, float]]:
    """AP50 and AUC in percent, to two places, of each control and of the best mask there can be."""
    masks = {name: half_mask(m) for name, m in shape_controls(0).items() if name != RANDOM}
    cious: dict[str, list[float]] = {name: [] for name in (*masks, BEST)}
    for clip in clips:
        truth = truth_map(clip, rule)
        for name, mask in masks.items():
            cious[name].append(ciou(mask, truth))
        cious[BEST].append(best_possible(truth))
    return {
        name: {
            "ap50": round(100 * float((np.array(values) >= SUCCESS).mean()), 2),
            "auc": round(100 * curve_area(values), 2),
        }
        for name, values in cious.items()
    }


if __name__ == "__main__":
    main()
