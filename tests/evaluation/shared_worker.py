"""Probes and localisations on however many processes: MODEL_FOLDER OUTPUT_FOLDER."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from kdcmae_fast.cli import main
from kdcmae_fast.data import ClipError
from kdcmae_fast.data.synthetic import SyntheticClips
from kdcmae_fast.evaluation import EvaluationSource, LocalizationSettings, localize, probe
from kdcmae_fast.training.distributed import leave

BAD = (1, 5)  # clips of every split that cannot be read
MAPS = "--references 4 --fuse ezvsl --prior colour --pictures 3 --video 3 --save-maps"
COMMANDS = {  # every one's arguments but for the checkpoint, the output and DATA
    # 3 batches: the first process has clips 0 and 2, the second one 3, 4 and 6
    "localize": f"localize --num-clips 7 --batch-size 3 {MAPS}",
    # one batch: the first process has nothing
    "localize_little": "localize --num-clips 3 --batch-size 3 --map cosine --pictures 1 --video 1",
    "probe": "probe --num-clips 40 --test-clips 24 --batch-size 7 --seed 1",
    "probe_folds": "probe --num-clips 100 --folds 2 --batch-size 100 --classifier svm",
}
DATA = ("data.max_bad_share=0.5", "data.num_workers=0")
FEW_BAD = ("data.max_bad_share=0.003", "data.num_workers=0")  # of 500: one


def with_bad_clips(method):
    """`method` of a dataset that cannot read some of its clips."""

    def read(self, index, *given, **named):
        if index in BAD:
            raise ClipError(self.video_id(index), "the file ends early")
        return method(self, index, *given, **named)

    return read


def work(folder: str, output: Path) -> None:
    """Every command, and what each process gets of the functions behind them."""
    common = ["--checkpoint", folder, "--device", "cpu"]
    for name, words in COMMANDS.items():
        command = [*words.split(), *common, "--output", str(output / name), *DATA]
        assert main(command) == 0
    localized = ["localize", *common, "--num-clips", "7", "--batch-size", "3", *FEW_BAD]
    assert main(localized) == 1
    # stops at the first batches, although 2 of all 1000 clips would be tolerated
    assert main(["retrieve", *common, "--batch-size", "3", *FEW_BAD]) == 1
    # found by the first process alone, after the features
    assert main(["probe", *common, "--num-clips", "3", "--test-clips", "24", *DATA]) == 1
    source = EvaluationSource(checkpoint=folder, overrides=DATA, num_clips=40, device="cpu")
    given = [
        localize(replace(source, num_clips=2), LocalizationSettings(map="cosine")),
        probe(source, classifier="knn", test_clips=5),
    ]
    rank = os.environ.get("RANK", "0")
    (output / f"returned_{rank}.json").write_text(json.dumps(given), encoding="utf-8")


if __name__ == "__main__":
    for name in ("read", "read_frames"):
        setattr(SyntheticClips, name, with_bad_clips(getattr(SyntheticClips, name)))
    Path(sys.argv[2]).mkdir(exist_ok=True)
    work(sys.argv[1], Path(sys.argv[2]))
    leave(0)
