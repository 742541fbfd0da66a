"""Sounds without pictures: lists and folders of them, and the lists of spoken digits."""

import json

import numpy as np
import pytest
import soundfile
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.config_file import load_config
from kdcmae_fast.data import ClipError, FrontEnd, open_dataset
from kdcmae_fast.data.datasets import write_lists
from kdcmae_fast.data.loader import collate
from kdcmae_fast.data.manifest import label_names
from kdcmae_fast.data.resample import resample

MODEL = ModelConfig(modalities="audio", audio_length=64)


def write_sound(path, seconds: float, rate: int = 8000, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = 0.1 * np.random.default_rng(seed).normal(size=round(seconds * rate)).astype(np.float32)
    soundfile.write(path, sound, rate, subtype="FLOAT")
    return sound


def open_sounds(path, label_csv="", model: ModelConfig = MODEL, seed: int = 0):
    return open_dataset(
        DataConfig(source="sounds", path=str(path), label_csv=str(label_csv)), model, seed=seed
    )


@pytest.fixture
def digits(tmp_path):
    for digit in (0, 3):
        for speaker in ("ann", "bob"):
            for take in (0, 4, 5, 12):
                path = tmp_path / "fsdd" / f"{digit}_{speaker}_{take}.wav"
                write_sound(path, 0.2 + 0.01 * take, seed=digit + take)
    return tmp_path / "fsdd"


def test_lists_of_digits_split_by_take(digits, tmp_path):
    metrics = write_lists("fsdd", digits, tmp_path / "lists")
    assert {part: count["clips"] for part, count in metrics["lists"].items()} == {
        "test": 8, "train": 8,
    }  # fmt: skip
    train = open_sounds(tmp_path / "lists/train.json", tmp_path / "lists/labels.csv")
    test = open_sounds(tmp_path / "lists/test.json", tmp_path / "lists/labels.csv")
    names = [test.video_id(index) for index in range(len(test))]
    assert sorted(names) == sorted(
        f"{d}_{s}_{t}" for d in (0, 3) for s in ("ann", "bob") for t in (0, 4)
    )
    assert not {train.video_id(index) for index in range(8)} & set(names)
    for index, name in enumerate(names):
        assert test.read(index, 0).label == int(name[0])
    assert label_names(str(tmp_path / "lists/labels.csv"))[3] == "three"


def test_a_name_that_is_no_digit(digits, tmp_path):
    write_sound(digits / "hello.wav", 0.5)
    with pytest.raises(ValueError, match=r"hello.wav: expected a name like 7_george_12.wav"):
        write_lists("fsdd", digits, tmp_path / "lists")


def test_a_clip_is_the_resampled_sound_and_no_picture(digits):
    dataset = open_sounds(digits)
    clip = dataset.read(3, 0)
    assert clip.video_id == "0_ann_5.wav" and clip.label == -1
    sound, rate = soundfile.read(digits / clip.video_id, dtype="float32")
    expected = resample(torch.from_numpy(sound), rate)
    assert clip.waveform.equal(expected) and len(expected) == round(0.25 * 16_000)
    assert tuple(clip.frame.shape) == (3, 0, 0)
    batch = FrontEnd(DataConfig(), MODEL)(collate([clip, dataset.read(0, 0)]))
    assert tuple(batch.fbank.shape) == (2, 64, 128) and tuple(batch.frames.shape) == (2, 3, 0, 0)


def test_a_long_sound_gets_another_window_each_epoch(tmp_path):
    whole = write_sound(tmp_path / "a.wav", 4.0, rate=16_000)
    dataset = open_sounds(tmp_path)
    first, again, other = (dataset.read(0, epoch).waveform for epoch in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    starts = [np.flatnonzero(whole[: -len(first)] == window[0].item()) for window in (first, other)]
    assert all(len(start) == 1 for start in starts)


def test_what_is_no_sound(tmp_path):
    write_sound(tmp_path / "short.wav", 0.05)
    write_sound(tmp_path / "word.wav", 0.15)
    (tmp_path / "text.wav").write_text("no sound")
    dataset = open_sounds(tmp_path)
    assert [dataset.video_id(index) for index in range(3)] == ["short.wav", "text.wav", "word.wav"]
    with pytest.raises(ClipError, match="0.05 s long, less than 0.1 s"):
        dataset.read(0, 0)
    with pytest.raises(ClipError, match="cannot decode the sound"):
        dataset.read(1, 0)
    assert len(dataset.read(2, 0).waveform) == 2400


def test_settings_that_cannot_be(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no sound files"):
        open_sounds(tmp_path / "empty")
    with pytest.raises(ValueError, match="give a JSON list as data.path"):
        open_sounds(digits, "labels.csv")
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"data": [{"video_id": "a", "wav": "<root>/a.wav"}]}))
    with pytest.raises(ValueError, match="placeholder"):
        open_sounds(path)
    with pytest.raises(ValueError, match="contrast_over=step: there is no contrastive term"):
        load_config({"train": {"steps": 1}},
                    ["model.modalities=audio", "train.contrast_over=step"])  # fmt: skip
