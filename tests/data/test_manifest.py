"""The JSON list, label CSV, sound files and JPEG frames."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import ClipError, open_dataset
from kdcmae_fast.data.manifest import read_label_csv, read_manifest
from kdcmae_fast.data.media import Window, fit_picture, nearest_frame, read_picture

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

MODEL = ModelConfig(audio_length=128, img_size=32)
EVEN_SHORT = [int(k) for k in "120112121212221102212210"]  # of 24 epochs, see below
EVEN_LONG = [int(k) for k in "221222212112122212211111"]
CSV = 'index,mid,display_name\n0,/m/09x0r,"Speech, loud"\n1,vgg_7,dog\n'


@pytest.fixture
def tree(tmp_path, real_like_sound):
    """Two clips: a 1 s wav and a 3 s stereo flac at 44.1 kHz, with three frames each."""
    rows = []
    for name, kind, rate, seconds, labels in (
        ("one", "wav", 16_000, 1.0, "/m/09x0r"),
        ("two 2", "flac", 44_100, 3.0, "vgg_7,/m/09x0r"),
    ):
        sound = real_like_sound(seconds, rate)
        sound = np.stack([sound, -0.5 * sound], 1) if kind == "flac" else sound
        soundfile.write(tmp_path / f"{name}.{kind}", sound, rate)
        for k in range(3):
            (tmp_path / f"frame_{k}").mkdir(exist_ok=True)
            Image.new("RGB", (80, 40), (60 * k, 0, 0)).save(tmp_path / f"frame_{k}" / f"{name}.jpg")
        rows.append(
            {"video_id": name, "wav": str(tmp_path / f"{name}.{kind}"),
             "video_path": str(tmp_path) + "/", "labels": labels}
        )  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "labels.csv").write_text(CSV)
    return tmp_path


def open_tree(tree: Path, **changes):
    settings = {
        "source": "manifest",
        "path": str(tree / "list.json"),
        "label_csv": str(tree / "labels.csv"),
        "num_frames": 3,
    }
    return open_dataset(DataConfig(**(settings | changes)), MODEL, seed=0)


def test_clips(tree):
    dataset = open_tree(tree)
    assert [dataset.video_id(i) for i in range(len(dataset))] == ["one", "two 2"]
    first, second = dataset.read(0, 0), dataset.read(1, 0)
    assert (first.label, second.label) == (0, 1)
    assert len(first.waveform) == 16_000
    assert len(second.waveform) == pytest.approx(400 + 127 * 160, abs=2)
    assert first.frame.shape == (3, 32, 32) and first.frame.dtype == torch.uint8
    reds = {
        round(dataset.read(0, epoch).frame[0].float().mean().item() / 60) for epoch in range(20)
    }
    assert reds == {0, 1, 2}
    assert torch.equal(dataset.read(1, 5).waveform, open_tree(tree).read(1, 5).waveform)
    assert open_tree(tree, label_csv="").read(1, 0).label == -1


def reds(dataset, index: int, epochs: int = 24) -> list[int]:
    """Which frame each epoch takes of the 3 s clip or the other."""
    frames = (dataset.read(index, epoch).frame[0].float().mean() for epoch in range(epochs))
    return [round(frame.item() / 60) for frame in frames]


def with_times(tree: Path, *times: list[float]) -> None:
    rows = json.loads((tree / "list.json").read_text())["data"]
    for row, own in zip(rows, times, strict=True):
        row["frame_times"] = own
    (tree / "list.json").write_text(json.dumps({"data": rows}))


def test_without_frame_times_frames_are_evenly_over_the_sound(tree):
    """As it was before lists had any: the choices of 24 epochs, taken from that code."""
    dataset = open_tree(tree)
    assert reds(dataset, 0) == EVEN_SHORT and reds(dataset, 1) == EVEN_LONG
    with_times(tree, [k / 3 for k in range(3)], [0.0, 1.0, 2.0])  # the same, said in the list
    assert reds(open_tree(tree), 0) == EVEN_SHORT and reds(open_tree(tree), 1) == EVEN_LONG


def test_frame_times_of_the_list_say_which_frames_are_in_a_window(tree):
    """Of 3 s a clip takes 1.295 s: frames shown at its ends are never in one window."""
    ramp = np.arange(48_000) / 60_000  # 0.8 after 3 s: its first sample tells where a window starts
    soundfile.write(tree / "two 2.flac", ramp, 16_000)
    times = [0.1, 0.2, 2.9]
    with_times(tree, [0.0, 0.5], times)
    dataset = open_tree(tree)
    assert set(reds(dataset, 0)) == {0, 1}  # the list names two frames of the three
    taken = reds(dataset, 1)
    seconds = (400 + 127 * 160) / 16_000
    for epoch, k in enumerate(taken):
        start = dataset.read(1, epoch).waveform[0].item() * 60_000 / 16_000
        inside = [i for i in range(3) if start <= times[i] < start + seconds]
        middle = start + seconds / 2
        nearest = min(range(3), key=lambda i: abs(times[i] - middle))
        assert k in (inside or [nearest]), (epoch, start)
    assert set(taken) == {0, 1, 2} and taken != EVEN_LONG
    assert dataset.read_frames(1).times.tolist() == pytest.approx(times)
    assert open_tree(tree, num_frames=2).read(1, taken.index(2)).frame[0].float().mean() > 100


def test_channels(tree):
    first = open_tree(tree).read(1, 0).waveform
    mean = open_tree(tree, channel="mean").read(1, 0).waveform
    torch.testing.assert_close(mean, 0.25 * first, atol=1e-4, rtol=1e-3)


def test_frames_are_taken_within_the_window():
    rng = np.random.default_rng(0)
    ten, close = np.arange(10.0), np.arange(10) * 0.3
    assert {nearest_frame(ten, Window(3.0, 2.5), rng) for _ in range(60)} == {3, 4, 5}
    assert {nearest_frame(ten, Window(0.0, 10.0), rng) for _ in range(99)} == set(range(10))
    assert nearest_frame(ten, Window(5.2, 0.5), rng) == 5  # none inside: the nearest
    assert {nearest_frame(close, Window(0.0, 3.0), rng) for _ in range(99)} == set(range(10))


def test_pictures(tmp_path):
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 30:70] = 200  # the middle 40 columns
    assert (fit_picture(pixels, 20)[:, :, 1:-1] > 150).all()
    assert fit_picture(pixels.transpose(1, 0, 2).copy(), 20).shape == (3, 20, 20)
    assert fit_picture(pixels[:20, :20], 33).shape == (3, 33, 33)
    grey = tmp_path / "grey.png"
    Image.new("LA", (9, 9), (120, 255)).save(grey)
    assert read_picture(str(grey), 4).shape == (3, 4, 4)


def test_unusable_clips(tree):
    dataset = open_tree(tree)

    def reason(index: int) -> str:
        with pytest.raises(ClipError) as caught:
            dataset.read(index, 0)
        assert caught.value.video_id == dataset.video_id(index)
        return caught.value.reason

    for k in range(3):
        (tree / f"frame_{k}" / "one.jpg").unlink()
    assert "one.jpg: No such file" in reason(0)
    for k in range(3):
        (tree / f"frame_{k}" / "one.jpg").write_bytes(b"\xff\xd8\xff no picture")
    assert "cannot decode the picture" in reason(0)
    (tree / "one.wav").write_bytes(b"")
    assert "one.wav: empty file (0 bytes)" in reason(0)
    (tree / "one.wav").write_bytes(b"RIFF nothing")
    assert "cannot decode the sound" in reason(0)
    soundfile.write(tree / "one.wav", np.zeros(16_000), 16_000)
    assert "digital silence" in reason(0)
    soundfile.write(tree / "one.wav", np.full(16_000, 0.25), 16_000)
    assert "digital silence" in reason(0)  # a constant is silence too
    soundfile.write(tree / "one.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    assert "not numbers" in reason(0)
    soundfile.write(tree / "one.wav", np.random.default_rng(0).normal(size=5000) * 0.1, 16_000)
    assert "sound is 0.31 s long, less than 0.4 s" in reason(0)
    flac = (tree / "two 2.flac").read_bytes()
    (tree / "two 2.flac").write_bytes(flac[: len(flac) // 5])
    assert "decode" in reason(1) or "truncated" in reason(1)
    (tree / "two 2.flac").unlink()
    assert "two 2.flac: No such file" in reason(1)


def entry(**changes) -> dict:
    row = {"video_id": "a", "wav": "/x/a.wav", "video_path": "/x", "labels": "vgg_7"}
    return {key: value for key, value in (row | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "under 'data'"),
        (json.dumps({"data": []}), "under 'data'"),
        (json.dumps({"data": [entry(), 5]}), "entry 1: must be an object"),
        (json.dumps({"data": [entry(wav=None)]}), "entry 0: 'wav' must be text, got None"),
        (json.dumps({"data": [entry(labels=3)]}), "'labels' must be text, got 3"),
        (json.dumps({"data": [entry(labels="vgg_9")]}), r"\(a\): label 'vgg_9' is not in the"),
        (json.dumps({"data": [entry(wav="<YOUR_PATH>/a.wav")]}), "placeholder <YOUR_PATH>"),
    ],
)
def test_manifest_errors(tmp_path, content, message):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(str(path), {"vgg_7": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index,mid\n0,a\n", "no column display_name"),
        ("index,mid,display_name\n0,a,x\none,b,y\n", "line 3: .* index='one'"),
        ("index,mid,display_name\n0,a,x\n1,a,y\n", "line 3: .* mid='a'"),
        ("", "no column"),
    ],
)
def test_label_csv_errors(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_label_csv(str(path))


def test_missing_files_and_wrong_choices(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_manifest(str(tmp_path / "no.json"), None)
    with pytest.raises(ValueError, match="No such file"):
        read_label_csv(str(tmp_path / "no.csv"))
    with pytest.raises(ValueError, match="split='heldout' is for synthetic"):
        open_dataset(DataConfig(source="manifest", path="x.json"), MODEL, seed=0, split="heldout")
    with pytest.raises(ValueError, match="split='test'"):
        open_dataset(DataConfig(), MODEL, seed=0, split="test")
