"""Probes and localisations on two processes: every file and figure as on one, each written once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcmae_fast.data import BadClip
from kdcmae_fast.data.bad import TooManyBadClips
from kdcmae_fast.evaluation.processes import SharedBadClips

WORKER = str(Path(__file__).with_name("shared_worker.py"))
LAUNCHER = [
    "-m", "torch.distributed.run", "--nproc_per_node", "2",
    "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
]  # fmt: skip
LOCALIZED = ("localize", "localize_little")


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """{"one", "two"} -> (folder, stdout, stderr) of the worker on so many processes."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("shared")
    # as many threads as the launcher gives: sums of other parts are rounded otherwise
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {
        name: subprocess.Popen(
            [sys.executable, *launcher, WORKER, str(model_folder), str(root / name)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for name, launcher in (("one", []), ("two", LAUNCHER))
    }  # fmt: skip
    found = {}
    try:
        for name, process in running.items():
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, out[-3000:] + err[-3000:]
            found[name] = (root / name, out, err)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("case", [*LOCALIZED, "probe", "probe_folds"])
def test_every_file_has_the_same_bytes(runs, case):
    one, two = (files_of(runs[name][0] / case) for name in ("one", "two"))
    assert "metrics.json" in one and one.keys() == two.keys()
    assert json.loads(two["metrics.json"]) == json.loads(one["metrics.json"])  # says where it fails
    assert [name for name in one if one[name] != two[name]] == []


def test_one_process_wrote_all_that_there_is_to_compare(runs):
    folder = runs["one"][0]
    metrics = json.loads((folder / "localize" / "metrics.json").read_text())
    names = [f"synthetic_heldout_{k:06d}" for k in (0, 2, 3, 4, 6)]
    assert [clip["clip"] for clip in metrics["clips"]] == names
    assert [bad["video_id"][-1] for bad in metrics["bad_clips"]] == ["1", "5"]
    for kind, ending in (("pictures", "png"), ("videos", "mp4")):
        shown = [f"{n:03d}_{name}.{ending}" for n, name in enumerate(names[:3])]
        assert [item["file"] for item in metrics[kind]] == shown
    with np.load(folder / "localize" / "maps.npz") as maps:
        assert maps.files == names
    probed = json.loads((folder / "probe" / "metrics.json").read_text())
    assert (probed["folds"][0]["train_clips"], probed["folds"][0]["test_clips"]) == (38, 22)
    assert len(probed["bad_clips"]) == 4
    drawn = json.loads((folder / "probe_folds" / "metrics.json").read_text())
    assert np.sum(drawn["confusion"]) == 98 and len(drawn["folds"]) == 2


def test_the_first_process_prints_for_all(runs):
    (one, out, _), (two, printed, _) = runs["one"], runs["two"]
    assert "-- controls:" in out and "times chance" in out
    assert printed.replace(str(two), str(one)) == out


def test_too_many_bad_clips_are_the_same_error(runs):
    lines = errors(runs["one"])[:2]  # of localize and of retrieve
    for line in lines:
        assert "2 bad clips among 6 tried of 1000, more than data.max_bad_share=0.003" in line
    assert errors(runs["two"])[:2] == lines


def test_what_the_first_process_finds_alone_is_told_once(runs):
    one, two = errors(runs["one"]), errors(runs["two"])
    assert "is tested, but has no training clip" in one[2] and two == one
    # the verdict on bad clips is everybody's, this is not
    assert [line for line in runs["two"][2].splitlines() if "error on rank" in line] == [
        line.replace("error:", "error on rank 1:") for line in one[:2]
    ]


def errors(run) -> list[str]:
    """What the first process said on stderr."""
    return [line for line in run[2].splitlines() if line.startswith("error: ")]


def test_every_process_gets_what_the_first_one_has(runs):
    one, two = runs["one"][0], runs["two"][0]
    texts = [path.read_text() for path in (one / "returned_0.json", *two.glob("returned_*"))]
    assert len(texts) == 3 and len(set(texts)) == 1


class SecondHalves:
    """Processes that all have read their batches when asked."""

    size = 2

    def __init__(self, batches) -> None:
        self.batches = batches

    def gather_lists(self, items):
        return self.batches


def test_the_verdict_on_bad_clips_is_that_of_one_process():
    """2000 clips, 1 % may be bad: of the first 500 that is 5, but 10 once 1000 are read."""
    few = [BadClip(str(place), "short") for place in range(8)]
    for places, stopped in ((range(0, 8), True), (range(1000, 1008), False)):
        bad = dict(zip(places, few, strict=True))
        batches = [range(start, min(start + 3, 2000)) for start in range(0, 2000, 3)]
        found = [(batch, [bad[k] for k in batch if k in bad]) for batch in batches]

        def alone(found=found):
            verdict = SharedBadClips(2000, 2000, 0.01)
            for batch, clips in found:
                verdict.add(batch, clips)
            return verdict.gathered()

        def shared(found=found):
            verdict = SharedBadClips(
                2000, 2000, 0.01, SecondHalves([(batch.stop, clips) for batch, clips in found])
            )
            for batch, clips in found[:300]:
                verdict.add(batch, clips)
            return verdict.gathered()

        for judge in (alone, shared):
            if not stopped:
                assert judge() == few
                continue
            with pytest.raises(TooManyBadClips, match="6 bad clips among 6 tried of 2000"):
                judge()
