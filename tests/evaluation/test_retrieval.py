"""Retrieval: every aggregation against a loop, both directions, processes, examples, memory."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

from kdcmae_fast.cli import main
from kdcmae_fast.data import ClipError
from kdcmae_fast.data.fbank import kaldi_fbank
from kdcmae_fast.data.segments import segment_starts, timed_segment_starts
from kdcmae_fast.data.synthetic import SyntheticClips
from kdcmae_fast.evaluation import (
    ClipFeatures,
    extract_features,
    extract_frame_features,
    retrieval_scores,
    retrieve,
)
from kdcmae_fast.evaluation import retrieval as retrieval_module
from kdcmae_fast.evaluation.clips import collate_frames, encode_clip, encode_frames
from kdcmae_fast.evaluation.processes import Processes
from kdcmae_fast.evaluation.published_retrieval import PUBLISHED, published_table
from kdcmae_fast.evaluation.ranking import STRATEGIES, most_similar
from kdcmae_fast.evaluation.reading import read_frame_batches
from kdcmae_fast.evaluation.source import EvaluationSource

TIES = ("average", "optimistic", "published")
SECONDS = 3.0  # of the clips that Sync sees; its segments have 0.64 s


def by_loop(audio: np.ndarray, video: np.ndarray, strategy: str) -> np.ndarray:
    """(N, N) similarities of audio with video, one pair of clips after the other."""
    count, frames = len(audio), max(x.shape[1] if x.ndim == 3 else 1 for x in (audio, video))
    units = []
    for x in (audio, video):
        x = x.astype(np.float64)
        x = x if x.ndim == 3 else np.repeat(x[:, None], frames, 1)
        units.append(x / np.linalg.norm(x, axis=2, keepdims=True))
    scores = np.empty((count, count))
    for i in range(count):
        for j in range(count):
            cosines = [[float(x @ y) for y in units[1][j]] for x in units[0][i]]
            if strategy.startswith("diagonal"):
                cosines = [[cosines[k][k] for k in range(frames)]]
            values = [value for row in cosines for value in row]
            scores[i, j] = max(values) if strategy.endswith("max") else np.mean(values)
    return scores


def figures_by_loop(scores: np.ndarray, ties: str) -> dict[str, float]:
    """The published way and the two others, one query after the other; equal within 1e-10."""
    entries: list[float] = []
    for query, row in enumerate(scores):
        above = int((row > row[query] + 1e-10).sum())
        equal = int((np.abs(row - row[query]) <= 1e-10).sum())
        ranks = [above + 1 + i for i in range(equal)]
        entries += {"average": [np.mean(ranks)], "optimistic": ranks[:1], "published": ranks}[ties]
    ranked = np.array(entries)
    recalls = {f"R@{k}": float((ranked <= k).mean()) for k in (1, 5, 10)}
    return {**recalls, "median_rank": float(np.median(ranked))}


def tied_features(count: int, frames: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Related pairs, a third of the clips copies of another one."""
    shape = (count, 5) if frames is None else (count, frames, 5)
    video = torch.randn(shape)
    audio = video + torch.randn(shape)
    for side in (audio, video):
        side[1::3] = side[: len(side[1::3])]
    return audio, video


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("count", [13, 97])
def test_every_strategy_equals_the_loop_with_ties(strategy, ties, count):
    frames = 3 if count == 97 else 16
    audio, video = tied_features(count, frames)
    scores = retrieval_scores(audio, video, strategy=strategy, ties=ties, tile_size=8)
    matrix = by_loop(audio.numpy(), video.numpy(), strategy)
    for direction, seen in (("audio_to_video", matrix), ("video_to_audio", matrix.T)):
        found = getattr(scores, direction).named()
        expected = figures_by_loop(seen, ties)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert found["tied_queries"] > 0
        own = seen.diagonal()[:, None]
        best = (seen > own + 1e-10).sum(1) + 1
        np.testing.assert_array_equal(scores.ranks[direction].numpy(), best)
    swapped = retrieval_scores(video, audio, strategy=strategy, ties=ties)
    assert swapped.audio_to_video == scores.video_to_audio  # S(V->A) is S(A->V) transposed
    assert swapped.video_to_audio == scores.audio_to_video


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_vector_of_sound_meets_every_frame(strategy):
    audio, (_, video) = tied_features(11, None)[0], tied_features(11, 4)
    scores = retrieval_scores(audio, video, strategy=strategy)
    matrix = by_loop(audio.numpy(), video.numpy(), strategy)
    found = scores.audio_to_video.named()
    expected = figures_by_loop(matrix, "average")
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    rows, similarity = most_similar(video[:5], audio, 3, strategy=strategy)
    for query in range(5):
        np.testing.assert_allclose(
            similarity[query], np.sort(matrix[:, query])[::-1][:3], rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(matrix[rows[query], query], similarity[query], atol=1e-6)


def test_bad_arguments_are_named():
    a = torch.randn(6, 3, 4)
    with pytest.raises(ValueError, match="strategy='median' is not one of diagonal_mean"):
        retrieval_scores(a, a, strategy="median")
    with pytest.raises(ValueError, match=r"\(6, 3, 4\) and \(6, 2, 4\)"):
        retrieval_scores(a, a[:, :2])
    with pytest.raises(ValueError, match=r"\(6, 3, 4\) and \(6, 3\)"):
        retrieval_scores(a, a[:, :, 0])
    a[2, 1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"1 of 6 clips are not finite \(rows 2\)"):
        retrieval_scores(a, a.clone())


@pytest.fixture(scope="module")
def sync(make_model):
    return make_model("cav_mae_sync").eval()


@pytest.fixture
def long_clips(sync):
    """Clips several segments long; clips(bad=...)."""
    sizes = {"img_size": sync.config.img_size, "clip_seconds": SECONDS, "num_frames": 5}
    return SyntheticClips(30, seed=0, **sizes)


@pytest.mark.parametrize("time_base", ["true", "compatible"])
def test_frame_features_equal_one_frame_and_segment_at_a_time(sync, long_clips, data, time_base):
    data = dataclasses.replace(data, time_base=time_base)
    found = extract_frame_features(sync, long_clips, data, num_clips=3, num_frames=4, batch_size=2)
    assert found.audio.shape == found.video.shape == (3, 4, 16)
    assert found.sample_ids.tolist() == [0, 1, 2]
    for number in range(3):
        clip = long_clips.read_frames(number, 4)
        batch = collate_frames([clip])
        np.testing.assert_array_equal(found.times[number], clip.times)
        rows = 1024 if time_base == "compatible" else 298
        fbank = kaldi_fbank(batch.waveforms, num_mel_bins=32, num_rows=rows, center=True)
        fbank = (fbank - data.dataset_mean) / data.dataset_std
        starts = torch.tensor(segment_starts(4, 64))
        if time_base == "true":
            starts = timed_segment_starts(batch.times, 64, 298, padded_rows=rows)[0]
        for k, start in enumerate(starts.tolist()):
            with torch.no_grad():
                alone = sync.encode(fbank=fbank[:, start : start + 64], frames=batch.frames[:, k])
            torch.testing.assert_close(found.audio[number, k], alone.audio[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.video[number, k], alone.video[0], rtol=1e-4, atol=1e-5)


def test_distinct_segments_once_equal_the_full_run(sync):
    """16 frames of 10.24 s share 11 segments at the published sizes; here 4 frames share 2."""
    model = sync.double()
    fbank, frames = torch.randn(2, 160, 32).double(), torch.rand(2, 4, 3, 32, 32).double()
    starts = torch.tensor([[0, 0, 96, 96], [0, 48, 48, 96]])
    with torch.no_grad():
        once = encode_clip(model, fbank, frames, starts)
        for clip in range(2):
            for k in range(4):
                segment = fbank[clip, starts[clip, k] : starts[clip, k] + 64]
                alone = model.encode(fbank=segment[None]).audio[0]
                torch.testing.assert_close(once.audio[clip, k], alone, rtol=1e-9, atol=1e-9)
    sync.float()


def test_a_short_clip_s_frames_stay_in_its_sound(sync, data):
    """8 s of sound: the published time base puts late frames into the padding, the true not."""
    clips = SyntheticClips(2, seed=0, img_size=32, clip_seconds=0.9, num_frames=5)
    batch = collate_frames([clips.read_frames(0, 5)])
    as_published = dataclasses.replace(data, time_base="compatible")
    with torch.no_grad():
        true = encode_frames(sync, data, batch).audio[0]
        compatible = encode_frames(sync, as_published, batch).audio[0]
    silence = encode_frames(sync, data, batch._replace(waveforms=batch.waveforms * 0)).audio
    assert silence.isfinite().all()
    assert torch.equal(compatible[-1], compatible[-2])  # both hear nothing but padding
    assert not torch.allclose(true[-1], compatible[-1], atol=1e-3)


def test_clips_with_other_numbers_of_frames_are_left_out(sync, data, long_clips):
    class Odd(SyntheticClips):
        def read_frames(self, index, num_frames=None, **which):
            return super().read_frames(index, 3 if index == 2 else 5)

    clips = Odd(6, seed=0, img_size=32, clip_seconds=1.0)
    data = dataclasses.replace(data, max_bad_share=0.5)
    found = extract_frame_features(sync, clips, data, batch_size=2)
    assert found.sample_ids.tolist() == [0, 1, 3, 4, 5]
    assert found.bad[0].reason == "it has 3 frames, the first clip has 5"


def test_every_process_takes_the_number_of_frames_of_the_list_s_first_clip(data):
    """Else those of the second process would keep rows of another size than the first one's."""

    class Halves(SyntheticClips):
        def read_frames(self, index, num_frames=None, **which):
            if index == 0:
                raise ClipError("0", "the file ends early")
            return super().read_frames(index, 5 if index < 4 else 3)

    clips = Halves(8, seed=0, img_size=32, clip_seconds=1.0)
    kept, left_out = {}, {}
    for processes in (Processes(0, 1), Processes(0, 2), Processes(1, 2)):
        told = []
        batches = read_frame_batches(
            clips, num_clips=8, num_frames=None, batch_size=2, num_workers=0,
            tell=lambda _, bad, told=told: told.extend(bad), processes=processes,
        )  # fmt: skip
        kept[processes] = [clip.index for batch in batches for clip in batch]
        left_out[processes] = [clip.reason for clip in told]
    other = "it has 3 frames, the first clip has 5"
    assert list(kept.values()) == [[1, 2, 3], [1, 2, 3], []]
    assert left_out[Processes(1, 2)] == [other] * 4
    assert left_out[Processes(0, 1)] == ["the file ends early", *[other] * 4]


def test_retrieve_frame_by_frame(make_model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    make_model("cav_mae_sync").save_pretrained(folder)
    source = EvaluationSource(checkpoint=str(folder), num_clips=7, device="cpu")
    metrics = retrieve(source, strategy="all", num_frames=3)
    assert list(metrics["strategies"]) == list(STRATEGIES)
    assert metrics["strategy"] == "diagonal_mean"
    assert metrics["strategies"]["diagonal_mean"]["audio_to_video"] == metrics["audio_to_video"]
    assert metrics["frames"] == {
        "num_frames": 3, "audio": "a segment around each frame", "time_base": "true",
    }  # fmt: skip
    assert retrieve(source, num_frames=3)["audio_to_video"] == metrics["audio_to_video"]

    arguments = ["retrieve", "--checkpoint", str(folder), "--num-clips", "7", "--device", "cpu"]
    assert main([*arguments, "--strategy", "all", "--num-frames", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("diagonal_max") == 2
    assert "other clips, no comparison" in out
    assert "CAV-MAE Sync" in out


def test_every_frame_of_a_model_that_hears_clips_whole(model_folder):
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=7, device="cpu")
    metrics = retrieve(source, strategy="mean", num_frames=3)
    assert metrics["frames"] == {"num_frames": 3, "audio": "one vector per clip"}
    assert "frames" not in retrieve(source)


def test_the_published_figures_say_whose_clips_they_are():
    direction = {"R@1": 0.5, "R@5": 0.75, "R@10": 1.0}
    metrics = {"clips_of": "mine.json", "audio_to_video": direction, "video_to_audio": direction}
    table = published_table(metrics)
    assert table.count("other clips, no comparison") == 2
    assert "50.0 / 75.0 / 100.0" in table
    metrics["clips_of"] = "lists/vgg_test_5_per_class_for_retrieval_template.json"
    assert published_table(metrics).count("other clips, no comparison") == 1
    rows = [row for rows in PUBLISHED.values() for row in rows]
    assert sum(r.video_to_audio.at_1 + r.audio_to_video.at_1 for r in rows) == pytest.approx(
        39.5 + 33.5 + 37.5 + 34.9 + 16.1 + 14.7 + 9.5 + 8.3 + 18.8 + 14.8 + 15.1 + 12.8
        + 6.4 + 10.3 + 4.4 + 6.5 + 19.7 + 19.0 + 17.6 + 20.4 + 22.1 + 21.6 + 20.8 + 20.7
        + 35.2 + 27.9 + 27.9 + 23.2
    )  # fmt: skip
    assert sum(r.video_to_audio.at_10 or 0 for r in rows) == pytest.approx(
        74.6 + 74.3 + 49.3 + 45.9 + 50.1 + 44.0 + 28.3 + 39.7 + 52.6 + 52.9 + 67.6 + 61.8
    )


@pytest.mark.parametrize("strategy", [None, "diagonal_max"])
def test_examples_are_what_was_found(model_folder, tmp_path, monkeypatch, strategy):
    kept: list[ClipFeatures] = []
    find = retrieval_module.find_features

    def keeping(*given, **named):
        found = find(*given, **named)
        kept.append(found.features)
        return found

    monkeypatch.setattr(retrieval_module, "find_features", keeping)
    source = EvaluationSource(checkpoint=str(model_folder), num_clips=9, device="cpu")
    metrics = retrieve(source, strategy=strategy, examples=2, output=tmp_path)
    examples = json.loads((tmp_path / "metrics.json").read_text())["examples"]
    assert examples == metrics["examples"]
    assert [e["direction"] for e in examples] == ["audio_to_video"] * 2 + ["video_to_audio"] * 2
    matrix = by_loop(kept[0].audio.numpy(), kept[0].video.numpy(), strategy or "mean")
    names = list(kept[0].video_ids)
    for example in examples:
        query = names.index(example["query"]["video_id"])
        row = matrix[query] if example["direction"] == "audio_to_video" else matrix[:, query]
        assert example["rank_of_pair"] == (row > row[query] + 1e-10).sum() + 1
        assert [item["rank"] for item in example["found"]] == [1, 2, 3]
        found = [names.index(item["video_id"]) for item in example["found"]]
        np.testing.assert_allclose(row[found], np.sort(row)[::-1][:3], atol=1e-6)
        assert [item["is_pair"] for item in example["found"]] == [i == query for i in found]
        for item in (example["query"], *example["found"]):
            with Image.open(tmp_path / item["frame"]) as picture:
                assert picture.size == (32, 32)
            sound, rate = soundfile.read(tmp_path / item["sound"])
            assert (rate, len(sound)) == (16_000, 10_240)
    assert "examples" not in retrieve(source, examples=0, output=tmp_path / "none")
    assert not (tmp_path / "none" / "examples").exists()


def test_batches_are_the_same_clips_whatever_the_number_of_processes():
    for size in (1, 2, 3, 7, 50):
        shares = [Processes(rank, size).batches(13, 3) for rank in range(size)]
        assert [batch for share in shares for batch in share] == [
            range(0, 3), range(3, 6), range(6, 9), range(9, 12), range(12, 13),
        ]  # fmt: skip


def test_two_processes_equal_one(make_model, tmp_path, monkeypatch):
    """13 clips, of which two cannot be read, in batches of 3."""
    folder = tmp_path / "model"
    make_model("cav_mae_sync").save_pretrained(folder)
    worker = Path(__file__).with_name("retrieval_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(worker)]
    command += [str(folder), str(tmp_path / "two.json"), str(tmp_path / "two")]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    code = runpy.run_path(str(worker))
    for name in code["METHODS"]:
        monkeypatch.setattr(
            SyntheticClips, name, code["with_bad_clips"](getattr(SyntheticClips, name))
        )
    alone = code["both_ways"](str(folder), str(tmp_path / "one"))
    assert alone["one"]["num_clips"] == alone["four"]["num_clips"] == 11
    assert len(alone["four"]["bad_clips"]) == 2
    output, _ = running.communicate(timeout=180)
    assert running.returncode == 0, output[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == alone
    kept = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(kept) == 2
    for name in kept:
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for column, values in ours.items():
            torch.testing.assert_close(theirs[column], values, rtol=1e-6, atol=1e-6)


def test_memory_does_not_grow_with_the_square():
    """20011 clips: a matrix of all pairs would take 1.6 GB in fp32."""
    code = (
        "import resource, torch\n"
        "from kdcmae_fast.evaluation import retrieval_scores\n"
        "torch.manual_seed(0)\n"
        "video = torch.randn(20011, 1, 8)\n"
        "audio = video + torch.randn(20011, 1, 8)\n"
        "retrieval_scores(audio[:50], video[:50])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "scores = retrieval_scores(audio, video)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, scores.num_clips)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, count = map(int, done.stdout.split())
    assert count == 20011
    assert grown < 60_000  # KiB


def test_features_are_held_once_whatever_the_batches(model, clips, data):
    """One allocation for all clips, filled batch by batch."""
    found = extract_features(model, clips(), data, num_clips=5, batch_size=2)
    assert found.audio.untyped_storage().nbytes() == 5 * found.audio.shape[1] * 4
    found.audio.requires_grad_()  # not an inference tensor
