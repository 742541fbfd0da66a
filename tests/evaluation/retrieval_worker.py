"""Retrieval on however many processes: MODEL_FOLDER METRICS_JSON FEATURES_FOLDER."""

import json
import sys
from typing import Any

from kdcmae_fast.data import ClipError
from kdcmae_fast.data.synthetic import SyntheticClips
from kdcmae_fast.evaluation import EvaluationSource, retrieve
from kdcmae_fast.training.distributed import leave

METHODS = ("read", "read_frames")


def with_bad_clips(method):
    """`method` of a dataset that cannot read its clips 1 and 11."""

    def read(self, index, *given, **named):
        if index in (1, 11):
            raise ClipError(self.video_id(index), "the file ends early")
        return method(self, index, *given, **named)

    return read


def both_ways(folder: str, features: str) -> dict[str, Any]:
    """Metrics with one frame and with four; features kept in a folder."""
    source = EvaluationSource(
        checkpoint=folder,
        num_clips=13,
        batch_size=3,
        device="cpu",
        overrides=("data.max_bad_share=0.5", "data.num_workers=0"),
    )
    found = {
        "one": retrieve(source, strategy="mean", num_frames=1, features=features),
        "four": retrieve(source, strategy="all", num_frames=4, features=features),
    }
    for result in found.values():
        assert result.pop("features").startswith("features kept in ")
    return found


if __name__ == "__main__":
    for name in METHODS:
        setattr(SyntheticClips, name, with_bad_clips(getattr(SyntheticClips, name)))
    metrics = both_ways(sys.argv[1], sys.argv[3])
    with open(sys.argv[2], "w", encoding="utf-8") as file:  # every process has the same
        json.dump(metrics, file)
    leave(0)
