"""`read_frames`: all sound and several frames of a clip, at the frames' own times, everywhere."""

import json

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import ClipError, SyntheticClips, open_dataset
from kdcmae_fast.data.fbank import num_fbank_frames
from kdcmae_fast.data.shards import PreparedClip, finish_dataset, write_shard

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

MODEL = ModelConfig(audio_length=32, img_size=32)  # segments of 0.32 s
CSV = "index,mid,display_name\n0,/m/a,First\n1,/m/b,Second\n"


def level(clip: int, frame: int) -> int:
    """Grey of a clip's frame; tells which one was read."""
    return 40 * clip + 10 * frame


def levels(frames: torch.Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 5) * 5 for frame in frames]


def tone(seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype("f4")


@pytest.fixture
def manifest(tmp_path):
    """Two clips of 2 s at 44.1 kHz and 3 s at 16 kHz, with eight frames each."""
    rows = []
    for number, (seconds, rate) in enumerate([(2.0, 44_100), (3.0, 16_000)]):
        wav = tmp_path / f"clip{number}.wav"
        soundfile.write(wav, tone(seconds, rate), rate)
        for k in range(8):
            (tmp_path / f"frame_{k}").mkdir(exist_ok=True)
            grey = (level(number, k),) * 3
            Image.new("RGB", (32, 32), grey).save(tmp_path / f"frame_{k}" / f"clip{number}.jpg")
        labels = "/m/b,/m/a" if number else "/m/a"
        rows.append({"video_id": f"clip{number}", "wav": str(wav),
                     "video_path": str(tmp_path), "labels": labels})  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "labels.csv").write_text(CSV)

    def opened(**settings):
        data = DataConfig(source="manifest", path=str(tmp_path / "list.json"),
                          label_csv=str(tmp_path / "labels.csv"), **settings)  # fmt: skip
        return open_dataset(data, MODEL, seed=0)

    return opened


def test_cav_mae_layout(manifest, tmp_path):
    clips = manifest(num_frames=8)
    first, second = clips.read_frames(0), clips.read_frames(1)
    assert (first.video_id, first.index, first.label) == ("clip0", 0, 0)
    assert second.classes == (1, 0)
    assert first.frames.shape == (8, 3, 32, 32) and first.frames.dtype == torch.uint8
    assert levels(first.frames) == [level(0, k) for k in range(8)]
    assert first.times.dtype == np.float64
    np.testing.assert_allclose(first.times, np.arange(8) * 2.0 / 8)
    # 44.1 kHz becomes 16 kHz: two seconds are 198 rows and the tone stays where it was.
    assert len(first.waveform) == 32_000 and num_fbank_frames(len(first.waveform)) == 198
    want = torch.from_numpy(tone(2.0, 16_000))
    assert (first.waveform - want)[200:-200].abs().max() < 2e-3
    assert len(second.waveform) == 48_000
    half = clips.read_frames(1, 4)  # every second one, at its own time
    assert levels(half.frames) == [level(1, k) for k in (0, 2, 4, 6)]
    np.testing.assert_allclose(half.times, [0, 0.75, 1.5, 2.25])
    some = clips.read_frames(1, 4, only=[3, 1])
    assert levels(some.frames) == [level(1, 6), level(1, 2)] and some.times.tolist() == [2.25, 0.75]
    message = r"num_frames=16: .*clip0 has 8 frames; set data.num_frames=8, or extract 16"
    with pytest.raises(ValueError, match=message):
        clips.read_frames(0, 16)
    with pytest.raises(ValueError, match=message):
        manifest(num_frames=16).read_frames(0)
    with pytest.raises(ValueError, match=r"only=\[8\]: need frames of 0 ... 7"):
        clips.read_frames(0, only=[8])
    (tmp_path / "frame_5" / "clip0.jpg").unlink()  # others have it: this clip is damaged
    with pytest.raises(ClipError, match=r"clip0: .*frame_5/clip0.jpg: No such file"):
        clips.read_frames(0)


def test_shards(tmp_path):
    import io

    def jpeg(number: int) -> bytes:
        data = io.BytesIO()
        Image.new("RGB", (32, 32), (number,) * 3).save(data, "JPEG")
        return data.getvalue()

    times = [0.1 + 0.21 * k for k in range(6)]
    inputs = [
        PreparedClip(f"c{n}", "x", 0.0, 2.0, [jpeg(level(n, k)) for k in range(6)], times,
                     tone(2.0, 16_000), labels=("/m/b",))
        for n in range(2)
    ]  # fmt: skip
    write_shard(tmp_path, 0, inputs, first=0)
    finish_dataset(tmp_path, 1, {})
    (tmp_path / "labels.csv").write_text(CSV)
    clips = open_dataset(DataConfig(source="shards", path=str(tmp_path)), MODEL, seed=0)
    clip = clips.read_frames(1)
    assert (clip.video_id, clip.index, clip.label, clip.classes) == ("c1", 1, 1, (1,))
    assert levels(clip.frames) == [level(1, k) for k in range(6)]
    np.testing.assert_allclose(clip.times, times, atol=1e-6)
    assert clip.times.dtype == np.float64 and len(clip.waveform) == 32_000
    third = clips.read_frames(0, 3, only=[2])
    assert levels(third.frames) == [level(0, 4)]
    np.testing.assert_allclose(third.times, times[4:5], atol=1e-6)
    with pytest.raises(ValueError, match=r"num_frames=16: .*clip c0 has 6 frames"):
        clips.read_frames(0, 16)


def test_videos(tmp_path, make_video):
    pytest.importorskip("av")
    make_video(tmp_path / "a.mp4", seconds=3.0)  # frame i is grey 20 + 7 i, shown at i / 10 s
    clips = open_dataset(
        DataConfig(source="folder", path=str(tmp_path), num_frames=6), MODEL, seed=0
    )
    clip = clips.read_frames(0)
    # All of the video, not the 0.3 s that one segment needs.
    assert len(clip.waveform) == pytest.approx(48_000, abs=1500) and clip.frames.shape[0] == 6
    wanted = (np.arange(6) + 0.5) / 6 * len(clip.waveform) / 16_000
    assert ((wanted - clip.times >= 0) & (wanted - clip.times < 0.1001)).all()
    np.testing.assert_allclose(clip.times * 10, np.round(clip.times * 10), atol=1e-6)
    shown = (clip.frames[:, :, 8:24, 20:28].float().mean((1, 2, 3)).numpy() - 20) / 7
    np.testing.assert_allclose(shown, clip.times * 10, atol=0.7)
    some = clips.read_frames(0, only=[4, 0])
    assert torch.equal(some.frames, clip.frames[[4, 0]])
    assert some.times.tolist() == clip.times[[4, 0]].tolist()
    assert len(clips.read_frames(0, 16).frames) == 16  # a video has any number


def test_a_long_video_is_read_in_windows(tmp_path, make_video):
    pytest.importorskip("av")
    make_video(tmp_path / "a.mp4", seconds=14.0, rate=16_000)
    clips = open_dataset(
        DataConfig(source="folder", path=str(tmp_path), num_frames=4), MODEL, seed=0
    )
    start = clips.read_frames(0)
    assert len(start.waveform) == 400 + 1023 * 160 and start.times[0] == pytest.approx(1.2)
    epochs = [clips.read_frames(0, epoch=epoch) for epoch in (0, 0, 1)]
    assert torch.equal(epochs[0].waveform, epochs[1].waveform)
    assert not torch.equal(epochs[0].waveform, epochs[2].waveform)
    assert all(0 <= clip.times[0] <= 1.3 for clip in epochs)


def test_synthetic():
    clips = SyntheticClips(3, seed=0, img_size=32, clip_seconds=2.0, num_frames=5)
    clip = clips.read_frames(1)
    assert clip.times.tolist() == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8])
    assert torch.equal(clip.frames, clips.frames(1, clip.times.tolist()))
    assert torch.equal(clip.waveform, clips.waveform(1)) and clip.label == clips.read(1, 0).label
    some = clips.read_frames(1, 16, only=[3])
    assert some.times.tolist() == [2.0 * 3.5 / 16] and len(some.frames) == 1
    with pytest.raises(ValueError, match="num_frames=0 must be at least 1"):
        clips.read_frames(1, 0)
