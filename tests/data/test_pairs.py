"""Frames and the sound around them, from real files to a model's batch (CAV-MAE Sync)."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.config_file import load_config
from kdcmae_fast.data import FrontEnd, frontend, kaldi_fbank, make_loader, manifest, open_dataset
from kdcmae_fast.data.pairs import check_stored_frames, drawn_frames
from kdcmae_fast.data.segments import segment_starts
from kdcmae_fast.models.masking import draw_plans

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

T, RATE = 8, 16_000
MODEL = ModelConfig(audio_length=32, num_mel_bins=32, img_size=32, mask_ratio=0.5)
SECONDS = (2.0, 3.0, 2.5, 2.0, 3.0, 2.5)  # of six clips


def grey(clip: int, frame: int) -> int:
    return 40 * clip + 5 * frame


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Six clips of noise with eight frames each, which tell clip and number by their grey."""
    root, rows = tmp_path_factory.mktemp("clips"), []
    for k in range(T):
        (root / f"frame_{k}").mkdir()
    for clip, seconds in enumerate(SECONDS):
        sound = np.random.default_rng(clip).normal(size=round(seconds * RATE)) * 0.1
        soundfile.write(root / f"{clip}.wav", sound, RATE)
        for k in range(T):
            Image.new("RGB", (32, 32), (grey(clip, k),) * 3).save(root / f"frame_{k}/{clip}.jpg")
        rows.append({"video_id": str(clip), "wav": f"{root}/{clip}.wav", "video_path": str(root)})
    (root / "list.json").write_text(json.dumps({"data": rows}))
    return root


def settings(tree, **changes) -> DataConfig:
    given = {"source": "manifest", "path": str(tree / "list.json"), "num_frames": T,
             "num_workers": 0}  # fmt: skip
    return DataConfig(**(given | changes))


def raw_batches(data, steps, *, n=3, size=3, **place):
    dataset = open_dataset(data, MODEL, seed=5)
    loader = make_loader(
        dataset, data=data, seed=5, micro_batch_size=size, frames_per_clip=n, **place
    )
    return list(islice(loader, steps))


def test_rows_are_frames_of_the_clips_side_by_side(tree):
    data = settings(tree)
    (raw,) = raw_batches(data, 1)
    batch = FrontEnd(data, MODEL)(raw)
    assert batch.fbank.shape == (9, 32, 32) and batch.frames.shape == (9, 3, 32, 32)
    for clip in range(3):
        numbers = raw.numbers[clip].tolist()
        assert len(set(numbers)) == 3  # distinct
        index = int(raw.sample_ids[clip])
        for place, number in enumerate(numbers):
            row = 3 * clip + place
            assert abs(float(batch.frames[row].float().mean()) - grey(index, number)) < 3
            assert int(batch.sample_ids[row]) == index * T + number
            assert raw.times[clip, place] == pytest.approx(number * SECONDS[index] / T)
    assert len(set(batch.sample_ids.tolist())) == 9
    plan = draw_plans(MODEL, batch.sample_ids, step=0)["audio"].token_of_rank
    assert len({tuple(row) for row in plan.tolist()}) == 9  # a mask of its own for each row


@pytest.mark.parametrize("time_base", ["true", "compatible"])
def test_segments_are_cut_from_the_fbank_of_the_whole_clip(tree, time_base):
    data = settings(tree, time_base=time_base)
    (raw,) = raw_batches(data, 1)
    batch = FrontEnd(data, MODEL)(raw)
    for clip in range(3):
        sound = raw.waveforms[clip, : int(raw.lengths[clip])]
        whole = kaldi_fbank(sound[None], num_mel_bins=32, center=True)[0]
        real = len(whole)
        assert real == 1 + (len(sound) - 400) // 160
        whole = torch.nn.functional.pad(whole, (0, 0, 0, 1024 - real))
        for place in range(3):
            if time_base == "compatible":
                start = segment_starts(T, 32)[int(raw.numbers[clip, place])]
            else:
                start = round(100 * float(raw.times[clip, place])) - 16
                start = max(0, min(start, real - 32))
            want = (whole[start : start + 32] - data.dataset_mean) / data.dataset_std
            torch.testing.assert_close(batch.fbank[3 * clip + place], want, atol=1e-4, rtol=1e-4)


def test_published_time_base_puts_late_frames_of_a_short_clip_into_padding(tree):
    """Two seconds of sound end at row 198; frame 7 of 8 is taken to be at row 896."""
    numbers, times = torch.full((1, 1), 7), torch.full((1, 1), 1.75, dtype=torch.float64)
    sound = torch.randn(1, 2 * RATE) * 0.1
    found = {
        name: FrontEnd(settings(tree, time_base=name), MODEL).segments(sound, None, numbers, times)
        for name in ("compatible", "true")
    }
    padding = 5.081 / 4.4849
    assert torch.allclose(found["compatible"], torch.tensor(padding))
    assert found["true"].std() > 0.1


def test_each_clip_is_read_and_transformed_once(tree, monkeypatch):
    data = settings(tree)
    read, transformed = [], []
    read_sound, fbank = manifest.read_sound, kaldi_fbank
    monkeypatch.setattr(
        manifest, "read_sound", lambda path, *rest: read.append(path) or read_sound(path, *rest)
    )
    monkeypatch.setattr(
        frontend, "kaldi_fbank", lambda x, *a, **k: transformed.append(len(x)) or fbank(x, *a, **k)
    )
    (raw,) = raw_batches(data, 1, n=T)
    FrontEnd(data, MODEL)(raw)
    assert len(read) == len(set(read)) == 3 and transformed == [3]


def test_ranks_and_resuming_see_the_same_clips_and_frames(tree):
    data = settings(tree)

    def ids(raws) -> list[list[int]]:
        return [FrontEnd(data, MODEL)(raw).sample_ids.tolist() for raw in raws]

    want = ids(raw_batches(data, 5, size=2))
    ranks = [ids(raw_batches(data, 5, size=1, rank=r, world_size=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == want
    assert ids(raw_batches(data, 2, size=2, start_sample=6)) == want[3:]
    of_clip = [set(row[:3]) for row in want]
    assert of_clip[0] != of_clip[3]


def test_draws_follow_from_the_key_alone():
    def draw(n, epoch=0, index=1):
        return drawn_frames(index, epoch, seed=0, num_frames=16, frames_per_clip=n).tolist()

    assert draw(16) != sorted(draw(16)) == list(range(16))
    assert draw(4) == draw(16)[:4] and draw(4) != draw(4, epoch=1) != draw(4, index=2)
    first = [draw(1, epoch)[0] for epoch in range(400)]
    assert set(first) == set(range(16))


def test_augmentation_is_of_segments(tree):
    data = settings(tree, mixup=1.0, noise=True, time_mask=16, freq_mask=8)
    (raw,) = raw_batches(data, 1)
    plain = raw._replace(augment=None)
    batch, unchanged = FrontEnd(data, MODEL)(raw), FrontEnd(data, MODEL)(plain)
    assert batch.fbank.shape == unchanged.fbank.shape
    assert not torch.allclose(batch.fbank, unchanged.fbank)
    mixed = raw.augment.mixed
    share = mixed.weights.view(-1, 1, 1, 1, 1)
    want = share * raw.frames[mixed.rows].float() + (1 - share) * mixed.frames.float()
    rows = batch.frames.unflatten(0, (3, 3))[mixed.rows]
    torch.testing.assert_close(rows.float(), want.round(), atol=1.0, rtol=0)


def test_ten_frames_are_not_sixteen(tree, tmp_path):
    with pytest.raises(ValueError, match=r"num_frames=16: the clips have 8 frames; set data.num"):
        check_stored_frames(open_dataset(settings(tree, num_frames=16), MODEL, seed=0), 16)
    check_stored_frames(open_dataset(settings(tree), MODEL, seed=0), T)
    check_stored_frames(
        open_dataset(DataConfig(clip_seconds=1.0), MODEL, seed=0), 99
    )  # synthetic: any number
    for k in range(10):
        (tmp_path / f"frame_{k}").mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / f"frame_{k}/0.jpg")
    row = {"video_id": "0", "wav": f"{tree}/0.wav", "video_path": str(tmp_path)}
    (tmp_path / "list.json").write_text(json.dumps({"data": [row]}))
    ten = open_dataset(settings(tmp_path, num_frames=16), MODEL, seed=0)
    message = r"num_frames=16: the clips have 10 frames, as CAV-MAE's .* --preset cav_mae_sync"
    with pytest.raises(ValueError, match=message):
        check_stored_frames(ten, 16)


def test_a_clip_with_too_few_frames_is_a_bad_clip(tree, tmp_path):
    rows = json.loads((tree / "list.json").read_text())["data"]
    rows[0]["frame_times"] = [0.0, 0.5, 1.0]  # three only
    (tmp_path / "list.json").write_text(json.dumps({"data": rows}))
    data = settings(tmp_path, max_bad_share=1.0)
    raws = raw_batches(data, 3, size=2)
    bad = {(clip.video_id, clip.reason) for raw in raws for clip in raw.bad}
    assert {name for name, _ in bad} == {"0"} and "No such file" in bad.pop()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.audio_length=100"], r"audio_length=100: expected a multiple of patch_size=16"),
        (["model.audio_length=40", "model.patch_size=8"],
         r"model.audio_length=40: expected a multiple of 16 rows"),
        (["model.audio_length=1040", "data.time_base=compatible"],
         r"model.audio_length=1040: longer than the 1024 rows"),
        (["model.frames_per_clip=11"], r"frames_per_clip=11: a clip has data.num_frames=10 frames"),
        (["model.frames_per_clip=2", "name=cav_mae"],
         r"model.frames_per_clip=2: only cav_mae_sync takes several frames"),
        (["data.time_base=false"], r'data.time_base="false": expected one of'),
        (["data.clip_seconds=0.1"], r"data.clip_seconds=0.1: expected a value of at least 0.4"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(arguments, message):
    recipe = {"name": "cav_mae_sync", "train": {"steps": 1}}
    with pytest.raises(ValueError, match=message):
        load_config(recipe, arguments)


def test_clips_shorter_than_a_segment():
    data = DataConfig(clip_seconds=0.5)
    with pytest.raises(ValueError, match=r"data.clip_seconds=0.5: shorter than the 0.64 s of"):
        open_dataset(data, ModelConfig(audio_length=64), seed=0)
