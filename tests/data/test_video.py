"""Videos decoded on the fly: what is right comes out, what is wrong is named."""

import struct
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import ClipError, FrontEnd, make_loader, open_dataset
from kdcmae_fast.data.folder import VideoFolder
from kdcmae_fast.data.media import MediaOptions
from kdcmae_fast.data.resample import resample

pytest.importorskip("av")

OPTIONS = MediaOptions(
    audio_length=1024, img_size=64, num_frames=10, channel="first", reject_silence=True
)


def folder(path: Path, **changes) -> VideoFolder:
    return VideoFolder(str(path), MediaOptions(**(vars(OPTIONS) | changes)), seed=0)


def reason(dataset: VideoFolder, index: int = 0) -> str:
    with pytest.raises(ClipError) as caught:
        dataset.read(index, 0)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def frame_second(frame: torch.Tensor) -> float:
    """When the frame was shown, from its right half's level 20 + 7 i (10 frames a second)."""
    return (frame[:, 20:40, 40:60].float().mean().item() - 20) / 70


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_rates_and_layouts(tmp_path, make_video, rate, layout):
    make_video(tmp_path / "a.mp4", rate=rate, layout=layout, seconds=1.0)
    clip = folder(tmp_path).read(0, 0)
    assert len(clip.waveform) == pytest.approx(16_000, abs=1200)
    assert clip.frame.shape == (3, 64, 64) and clip.frame.dtype == torch.uint8
    time = np.arange(rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * (300 + 200 * time) * time)
    tone = resample(torch.from_numpy(tone), rate).float()
    part, whole = clip.waveform[2000:12_000], tone[2000:12_000]
    assert torch.nn.functional.cosine_similarity(part, whole, dim=0) > 0.98  # aligned, not late


@pytest.mark.parametrize(("channel", "amplitude"), [("first", 0.3), ("mean", 0.225)])
def test_channel(tmp_path, make_video, channel, amplitude):
    make_video(tmp_path / "a.mp4", seconds=1.0)
    clip = folder(tmp_path, channel=channel).read(0, 0)
    measured = clip.waveform[2000:14_000].std().item() * 2**0.5
    assert measured == pytest.approx(amplitude, rel=0.05)


def test_frame_and_sound_come_from_the_same_window(tmp_path, make_video):
    make_video(tmp_path / "a.mp4", seconds=3.0)
    dataset = folder(tmp_path, audio_length=100)  # 1.015 s of 3
    starts = set()
    for epoch in range(12):
        clip = dataset.read(0, epoch)
        assert len(clip.waveform) == pytest.approx(16_240, abs=2)
        # The tone's frequency is 300 + 400 t: its mean over the window tells where that lies.
        crossings = (clip.waveform[1:] * clip.waveform[:-1] < 0).sum().item()
        start = (crossings / 2 / 1.015 - 300) / 400 - 0.5
        second = frame_second(clip.frame)
        assert start - 0.2 < second < start + 1.2, (start, second)
        starts.add(round(start, 1))
    assert len(starts) > 4


def test_frame_times_cover_the_clip(tmp_path, make_video):
    make_video(tmp_path / "a.mp4", seconds=3.0)
    dataset = folder(tmp_path)
    seconds = sorted(frame_second(dataset.read(0, epoch).frame) for epoch in range(25))
    assert seconds[0] < 0.5 and seconds[-1] > 2.4
    assert torch.equal(dataset.read(0, 3).frame, folder(tmp_path).read(0, 3).frame)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "mov", "ts"])
def test_containers(tmp_path, make_video, kind):
    make_video(tmp_path / f"a.{kind}", seconds=2.0)
    clip = folder(tmp_path, audio_length=100).read(0, 1)
    assert len(clip.waveform) == pytest.approx(16_240, abs=2)
    assert 0 <= frame_second(clip.frame) < 2


def test_rotation_is_honoured(tmp_path, make_video):
    file = make_video(tmp_path / "a.mp4", seconds=1.0, size=(64, 64))
    upright = folder(tmp_path).read(0, 0).frame.float()
    assert upright[..., :28].mean() < 0.7 * upright[..., 36:].mean()  # the left half is dark
    content = bytearray(file.read_bytes())
    track = content.index(b"tkhd") + 4 + 40  # display matrix of the first track: the video
    quarter_turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)  # clockwise
    content[track : track + 36] = struct.pack(">9i", *quarter_turn)
    file.write_bytes(content)
    turned = folder(tmp_path).read(0, 0).frame.float()
    assert turned[:, :28].mean() < 0.7 * turned[:, 36:].mean()  # now it is the top
    assert turned[..., :28].mean() == pytest.approx(turned[..., 36:].mean().item(), rel=0.05)


def test_folder_lists_videos_of_subfolders_in_order(tmp_path, make_video):
    (tmp_path / "b c").mkdir()
    (tmp_path / "notes.txt").write_text("no video")
    for name in ("z.mp4", "b c/ü 1.MP4", "a.mp4"):
        make_video(tmp_path / name, seconds=0.6)
    dataset = folder(tmp_path)
    assert [dataset.video_id(i) for i in range(3)] == ["a.mp4", "b c/ü 1.MP4", "z.mp4"]
    assert [dataset.read(i, 0).label for i in range(len(dataset))] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sound": None}, "no audio stream"),
        ({"picture": False}, "no video stream"),
        ({"sound": "silence"}, "digital silence"),
        ({"seconds": 0.3}, "less than 0.4 s"),
    ],
)
def test_unusable_videos(tmp_path, make_video, options, expected):
    make_video(tmp_path / "a.mp4", **options)
    assert expected in reason(folder(tmp_path))


def test_silence_is_accepted_when_asked_for(tmp_path, make_video):
    make_video(tmp_path / "a.mp4", sound="silence", seconds=0.6)
    clip = folder(tmp_path, reject_silence=False).read(0, 0)
    assert clip.waveform.abs().max() < 1e-4


def test_damaged_files(tmp_path, make_video):
    whole = make_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])  # the index at the end is gone
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes(bytes(range(256)) * 20)
    dataset = folder(tmp_path)
    assert "truncated or damaged" in reason(dataset, 0)
    assert "0 bytes" in reason(dataset, 1)
    assert "cannot decode" in reason(dataset, 2)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_truncated_behind_an_intact_index(tmp_path, make_video, name):
    front = {"movflags": "faststart"} if name.endswith("mp4") else {}
    file = make_video(tmp_path / name, options=front)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 6 // 10])
    assert "truncated or damaged" in reason(folder(tmp_path))


class Counting:
    """A container that counts what is decoded of each kind of stream."""

    def __init__(self, container, counts: dict[str, float]) -> None:
        self.container, self.counts = container, counts

    def __enter__(self):
        self.container.__enter__()
        return self

    def __exit__(self, *error):
        return self.container.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.container, name)

    def decode(self, stream):
        return self.counted(stream, self.container.decode(stream))

    def demux(self, stream):
        for packet in self.container.demux(stream):
            yield SimpleNamespace(
                decode=lambda packet=packet: list(self.counted(stream, packet.decode()))
            )

    def counted(self, stream, frames):
        for frame in frames:
            amount = frame.samples / frame.sample_rate if stream.type == "audio" else 1
            self.counts[stream.type] = self.counts.get(stream.type, 0) + amount
            yield frame


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_only_the_needed_seconds_and_frames_are_decoded(tmp_path, make_video, monkeypatch, name):
    """Of two minutes: the window's sound, and one group of pictures (12 frames) at most."""
    import av

    make_video(tmp_path / name, seconds=120.0, rate=16_000, layout="mono")
    dataset = folder(tmp_path, audio_length=300)  # 3.015 s
    open_, counts = av.open, {}
    monkeypatch.setattr(av, "open", lambda *a, **k: Counting(open_(*a, **k), counts))
    for epoch in range(6):
        counts.clear()
        clip = dataset.read(0, epoch)
        assert len(clip.waveform) == pytest.approx(3.015 * 16_000, abs=2)
        assert 3 < counts["audio"] < 3.015 + 0.5
        assert 1 <= counts["video"] <= 12 + 2


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        folder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no videos .*mp4"):
        folder(tmp_path)


def test_a_folder_through_loader_and_front_end(tmp_path, make_video):
    for name in ("a.mp4", "b.mp4"):
        make_video(tmp_path / name, seconds=1.0)
    make_video(tmp_path / "silent.mp4", seconds=1.0, sound="silence")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:5000])
    data = DataConfig(source="folder", path=str(tmp_path), num_workers=1)
    model = ModelConfig(audio_length=128, img_size=32)
    dataset = open_dataset(data, model, seed=0)
    loader = make_loader(dataset, data=data, seed=0, micro_batch_size=2)
    named = {}
    for raw in islice(loader, 6):
        batch = FrontEnd(data, model)(raw)
        assert batch.fbank.shape == (2, 128, 128) and batch.fbank.isfinite().all()
        assert batch.frames.shape == (2, 3, 32, 32)
        assert {dataset.video_id(i) for i in raw.sample_ids.tolist()} <= {"a.mp4", "b.mp4"}
        named |= {bad.video_id: bad.reason for bad in raw.bad}
    assert set(named) == {"silent.mp4", "cut.mp4"} and named["silent.mp4"] == "digital silence"
