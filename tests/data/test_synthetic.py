"""Synthetic clips: reproducible, and their sound and picture obey the stated truth."""

import numpy as np
import pytest
import torch

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data import SyntheticClips, open_dataset, shapes, synthetic
from kdcmae_fast.data.shapes import SHAPES, draw
from kdcmae_fast.data.synthetic import CLASS_NAMES, MAX_HUE, PITCH, RADIUS, TREMOLO

MODEL = ModelConfig(audio_length=256, img_size=64)


@pytest.fixture(scope="module")
def clips() -> SyntheticClips:
    return SyntheticClips(300, seed=3, img_size=96, clip_seconds=2.56)


def envelope(waveform: np.ndarray, step: int = 80) -> np.ndarray:
    """Peak of each 5 ms."""
    return np.abs(waveform[: len(waveform) // step * step].reshape(-1, step)).max(1)


def test_read_is_reproducible_and_in_range(clips):
    clip = clips.read(5, 0)
    again = SyntheticClips(300, seed=3, img_size=96, clip_seconds=2.56).read(5, 0)
    assert torch.equal(clip.waveform, again.waveform) and torch.equal(clip.frame, again.frame)
    assert clip.waveform.shape == (40_960,) and clip.waveform.dtype == torch.float32
    assert clip.frame.shape == (3, 96, 96) and clip.frame.dtype == torch.uint8
    assert 0.01 < clip.waveform.abs().max() < 1
    assert (clip.index, clip.video_id) == (5, clips.video_id(5))


def test_epochs_draw_other_frames_of_the_same_clip(clips):
    times = {clips.frame_time(5, epoch) for epoch in range(30)}
    assert len(times) > 5 and times <= set(clips.frame_times())
    assert torch.equal(clips.read(5, 0).waveform, clips.read(5, 1).waveform)
    expected = clips.frames(5, [clips.frame_time(5, 7)])[0]
    assert torch.equal(clips.read(5, 7).frame, expected)


def test_seeds_clips_and_splits_differ():
    data = DataConfig(num_clips=20)
    train, heldout = (open_dataset(data, MODEL, seed=0, split=s) for s in ("train", "heldout"))
    other = open_dataset(data, MODEL, seed=1)
    waves = [train.read(0, 0), train.read(1, 0), heldout.read(0, 0), other.read(0, 0)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(waves[i].waveform, waves[j].waveform)
    assert len(train) == 20 and len(heldout) >= 100
    assert not {train.video_id(i) for i in range(20)} & {heldout.video_id(i) for i in range(20)}


def test_ranges_are_used(clips):
    scenes = [clips.truth(i) for i in range(300)]
    assert {scene.class_name for scene in scenes} == set(CLASS_NAMES)
    pitches = [scene.base_pitch for scene in scenes]
    assert min(pitches) >= PITCH[0] and max(pitches) <= PITCH[1] and max(pitches) > 4 * min(pitches)
    tremolos = [scene.tremolo for scene in scenes]
    assert min(tremolos) >= TREMOLO[0] and max(tremolos) <= TREMOLO[1]
    assert max(scene.hue for scene in scenes) <= MAX_HUE
    assert {scene.radius < sum(RADIUS) / 2 for scene in scenes} == {True, False}


def measured_pitch(piece: np.ndarray, low: float, high: float) -> float:
    """Base pitch in Hz of a piece of sound, by autocorrelation between two bounds."""
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 16)) ** 2
    correlation = np.fft.irfft(spectrum)
    lags = np.arange(int(16_000 / high), int(16_000 / low) + 2)
    return 16_000 / float(lags[correlation[lags].argmax()])


def test_pitch_is_the_stated_one(clips):
    checked = 0
    for i in range(60):
        scene = clips.truth(i)
        if scene.class_name not in ("circle", "square", "triangle", "crescent"):
            continue  # the other timbres have partials below the base pitch or none at it
        wave = clips.waveform(i).numpy()
        strong = envelope(wave).reshape(-1, 16)[1:-1].min(1).argmax() + 1
        piece = wave[strong * 1280 : (strong + 1) * 1280]
        true = scene.pitch((strong + 0.5) * 0.08)
        measured = measured_pitch(piece, true / 1.4, true * 1.4)
        assert measured == pytest.approx(true, rel=0.06), (i, scene.class_name)
        checked += 1
    assert checked > 15


def test_tremolo_is_the_stated_one(clips):
    for i in range(12):
        scene = clips.truth(i)
        beat = envelope(clips.waveform(i).numpy())
        times = (np.arange(len(beat)) + 0.5) * 0.005
        beat = beat / scene.level(times)
        spectrum = np.abs(np.fft.rfft((beat - beat.mean()) * np.hanning(len(beat)), 1 << 13))
        rates = np.fft.rfftfreq(1 << 13, 0.005)
        inside = (rates > 1) & (rates < 20)
        assert rates[inside][spectrum[inside].argmax()] == pytest.approx(scene.tremolo, abs=0.4), i


def test_place_sets_level_and_bend(clips):
    scene = clips.truth(0)
    times = np.linspace(0, 2.5, 50)
    x, y = scene.position(times)
    assert np.array_equal(np.argsort(x), np.argsort(scene.level(times)))  # right is loud
    assert np.array_equal(np.argsort(-y), np.argsort(scene.pitch(times)))  # up is high


def test_timbres_of_classes_differ(clips):
    """The share of energy in partials tells classes apart at the same pitch."""
    from kdcmae_fast.data.synthetic import _wavetable

    spectra = []
    for label in range(len(CLASS_NAMES)):
        spectrum = np.abs(np.fft.rfft(_wavetable(label, 300.0)))[:120]
        spectra.append(spectrum / np.linalg.norm(spectrum))
    likeness = np.array(spectra) @ np.array(spectra).T - np.eye(len(spectra))
    assert likeness.max() < 0.95


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_extent_is_the_drawn_box(shape):
    canvas = np.zeros((200, 200, 3), dtype=np.float32)
    draw(canvas, shape, (90.0, 110.0), 60.0, np.ones(3, dtype=np.float32))
    rows, columns = (np.flatnonzero((canvas[..., 0] > 0.5).any(axis)) for axis in (1, 0))
    drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    stated = [c + 60 * e for c, e in zip((90, 110) * 2, shape.extent, strict=True)]
    assert np.abs(np.subtract(drawn, stated)).max() <= 2.0


def test_box_covers_the_sounding_shape(clips, monkeypatch):
    def frames(index: int, color: tuple[float, float, float]) -> np.ndarray:
        monkeypatch.setattr(synthetic.colorsys, "hsv_to_rgb", lambda *hsv: color)
        return clips.frames(index, [0.2, 1.9]).numpy().astype(int)

    monkeypatch.setattr(synthetic, "GLOW", (0.0, 0.0))
    monkeypatch.setattr(shapes, "OPACITY", 0.5)  # so that the colour shows through the pattern
    for i in range(40):
        scene = clips.truth(i)
        # Only the source takes on the colour.
        changed = np.abs(frames(i, (1.0, 1.0, 1.0)) - frames(i, (0.0, 0.0, 0.0))).max(1) > 60
        for time, mask in zip([0.2, 1.9], changed, strict=True):
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = scene.box(time, 96)
            drawn = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.subtract(drawn, (x0, y0, x1, y1))).max() <= 2.0, (i, drawn)


def test_light_is_strong_where_the_sound_is_loud(clips):
    def vividness(index: int) -> float:
        corner = clips.frames(index, [0.5])[0].float()
        return float((corner.amax(0) - corner.amin(0)).quantile(0.2) / 255)

    loud, soft = [], []
    for i in range(100):
        place = float(clips.truth(i).position(0.5)[0])
        (loud if place > 0.6 else soft if place < 0.4 else []).append(vividness(i))
    assert np.mean(loud) > 1.5 * np.mean(soft)


def test_distractors_move_and_pictures_change(clips):
    first, second = clips.frames(2, [0.1, 1.3])
    assert (first != second).float().mean() > 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_clips": 0}, "num_clips=0"), ({"clip_seconds": 0.1}, "clip_seconds=0.1")],
)
def test_errors(change, message):
    settings = {"num_clips": 4, "seed": 0, "img_size": 32, "clip_seconds": 1.0} | change
    with pytest.raises(ValueError, match=message):
        SyntheticClips(**settings)


def test_index_out_of_range(clips):
    with pytest.raises(IndexError, match="clip 300 of 300"):
        clips.read(300, 0)
