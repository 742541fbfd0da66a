"""Synthetic clips of events: picture and sound change together, every half second or so."""

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import kaldi_fbank, open_dataset
from kdcmae_fast.data.events import EVENT_SECONDS

MODEL = ModelConfig(audio_length=32, img_size=64)
DATA = DataConfig(events=True, clip_seconds=4.0, num_frames=16, num_clips=50)


@pytest.fixture(scope="module")
def clips():
    return open_dataset(DATA, MODEL, seed=0)


def test_events_fill_the_clip(clips):
    for index in range(20):
        events = clips.events(index)
        assert events[0].start == 0 and events[-1].end == 4.0
        for one, two in zip(events, events[1:], strict=False):
            assert one.end == two.start and one.scene.label != two.scene.label
        seconds = [event.end - event.start for event in events]
        assert min(seconds) >= EVENT_SECONDS[0] - 1e-9
        assert max(seconds[:-1]) <= EVENT_SECONDS[1] and seconds[-1] <= sum(EVENT_SECONDS)
    kinds = {event.scene.label for index in range(20) for event in clips.events(index)}
    assert len(kinds) == 8


def test_sound_changes_where_an_event_ends_and_nowhere_else(clips):
    within, across = [], []
    for index in range(10):
        wave = clips.waveform(index)
        assert wave.shape == (64_000,) and wave.dtype == torch.float32 and wave.abs().max() < 1
        rows = kaldi_fbank(wave[None])[0]

        def change(time: float, rows=rows) -> float:
            """From just before `time` to just after it, of the fbank; 4 rows are 40 ms."""
            middle = round(time * 100)
            return float((rows[middle + 4] - rows[middle - 7]).abs().mean())

        for event in clips.events(index)[:-1]:
            across.append(change(event.end))
            within.append(change((event.start + event.end) / 2))
    assert min(across) > 1.2 > max(within), (min(across), max(within))


def test_pictures_are_those_of_the_event(clips):
    clip = clips.read_frames(3)
    assert clip.times.tolist() == pytest.approx([0.125 + 0.25 * k for k in range(16)])
    for time, frame in zip(clip.times, clip.frames, strict=True):
        (event,) = (e for e in clips.events(3) if e.start <= time < e.end)
        assert clips.scenes_at(3, [float(time)]) == [event.scene]
        # Saturated colour is the sounding object's alone.
        spread = frame.float().amax(0) - frame.float().amin(0)
        x0, y0, x1, y1 = event.scene.box(float(time), 64)
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
        if inside.sum() > 30:
            assert spread[inside].quantile(0.9) > 1.5 * spread[~inside].median()


def test_reproducible_and_heldout(clips):
    again, heldout = (open_dataset(DATA, MODEL, seed=0, split=s) for s in ("train", "heldout"))
    assert torch.equal(again.waveform(7), clips.waveform(7))
    assert torch.equal(again.read(7, 2).frame, clips.read(7, 2).frame)
    assert not torch.equal(heldout.waveform(7), clips.waveform(7)) and len(heldout) == 1000
    clip = heldout.read(1, 0)
    assert clip.label == clip.classes[0] and len(clip.classes) > 1
    assert set(clip.classes) == {event.scene.label for event in heldout.events(1)}


def test_length_is_free_of_events(clips):
    plain = open_dataset(DataConfig(clip_seconds=2.5), MODEL, seed=0)
    assert len(plain.waveform(0)) == 40_000 and plain.read(0, 0).classes == ()
    assert plain.frame_times()[-1] == pytest.approx(2.375)
