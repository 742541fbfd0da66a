"""What is heard in the WAVE files of inpainting: the level, pitch and tremolo of the clip.

Measured on the files against the synthetic clips' own truth, by Fourier transforms of NumPy.
"""

import wave

import numpy as np
import pytest
import torch

from kdcmae_fast.data.fbank import kaldi_fbank
from kdcmae_fast.data.synthetic import _PARTIALS, CLASS_NAMES, HELDOUT_START, SyntheticClips
from kdcmae_fast.evaluation.inpainted_sounds import write_sounds
from kdcmae_fast.evaluation.views import reconstruct_views
from kdcmae_fast.kernels import complementary_masks
from kdcmae_fast.kernels.tokens import patchify

RATE, WINDOW = 16_000, 4096  # samples; a pitch is heard in a quarter of a second
ROWS = 128  # 1.28 s


@pytest.fixture(scope="module")
def clips():
    return SyntheticClips(40, seed=0, img_size=32, clip_seconds=1.3, first=HELDOUT_START)


@pytest.fixture(scope="module")
def chosen(clips):
    """The first held-out clip of every class."""
    labels = [clips.truth(index).label for index in range(len(clips))]
    return [labels.index(label) for label in range(len(CLASS_NAMES))]


def read(path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert file.getframerate() == RATE
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767


def level(sound: np.ndarray) -> float:
    """dB below full scale."""
    return 10 * np.log10(np.square(sound).mean() + 1e-12)


def cents_off(sound: np.ndarray, scene) -> float:
    """The pitch whose partials, of the class, stand out most, against the true one.

    Median over the clip of the distance in hundredths of a semitone.
    """
    heard = np.geomspace(100, 2100, 2400)
    partials = _PARTIALS[scene.label]
    found = []
    for start in range(0, len(sound) - WINDOW, WINDOW):
        part = sound[start : start + WINDOW] * np.hanning(WINDOW)
        spectrum = np.sqrt(np.abs(np.fft.rfft(part, 8 * WINDOW)))
        score = np.zeros_like(heard)
        for multiple, amplitude in partials:
            below = heard * multiple < 7800
            bins = np.round(heard[below] * multiple * 8 * WINDOW / RATE).astype(int)
            score[below] += amplitude**0.5 * spectrum[bins]
        true = scene.pitch((start + WINDOW / 2) / RATE)
        found.append(abs(1200 * np.log2(heard[score.argmax()] / true)))
    return float(np.median(found))


def tremolo(sound: np.ndarray) -> float:
    """Hz at which the level goes up and down."""
    loudness = np.sqrt(np.convolve(np.square(sound), np.ones(160) / 160, "same")[::80])
    loudness = (loudness - loudness.mean()) * np.hanning(len(loudness))
    spectrum = np.abs(np.fft.rfft(loudness, 2**14))
    rates = np.arange(len(spectrum)) * (RATE / 80) / 2**14
    inside = (rates > 1.2) & (rates < 20)
    return float(rates[inside][spectrum[inside].argmax()])


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean difference of log-mel bins."""
    mels = [kaldi_fbank(torch.tensor(s, dtype=torch.float32)[None]) for s in (first, second)]
    return (mels[0] - mels[1]).abs().mean().item()


def write(clips, index, folder, guess, *, norm_pix=True):
    """The sounds of a clip of which `guess` of its true patches is the reconstruction, by name."""
    waveform = clips.waveform(index)
    fbank = kaldi_fbank(waveform[None])[0, :ROWS].mT[None, None]
    target = patchify(fbank, 16)
    if norm_pix:
        spread = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(-1, keepdim=True)) / spread
    plan = complementary_masks(torch.tensor([index]), (8, 8), 0.75, num_views=1)
    views = reconstruct_views(fbank, guess(target), plan, patch_size=16, norm_pix=norm_pix)
    rows = fbank.shape[-1]
    files = write_sounds(folder, "clip", views, 0, waveform, rows=rows, norm_pix=norm_pix)
    names = [file.file.removeprefix("clip_").removesuffix(".wav") for file in files]
    return {name: read(folder / file.file) for name, file in zip(names, files, strict=True)}


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_a_perfect_reconstruction_sounds_like_the_clip(clips, chosen, tmp_path, label):
    index = chosen[label]
    scene = clips.truth(index)
    sounds = write(clips, index, tmp_path, lambda target: target)
    original = sounds["original"]
    assert len({len(sound) for sound in sounds.values()}) == 1
    np.testing.assert_allclose(original, clips.waveform(index)[: len(original)], atol=4e-5)
    assert cents_off(original, scene) < 8  # the yardstick itself
    for name in ("original_inverted", "reconstructed"):
        sound = sounds[name]
        assert abs(level(sound) - level(original)) < 0.3
        assert np.abs(sound).max() < 0.999  # nothing is turned down or cut off
        assert cents_off(sound, scene) < 20
        assert tremolo(sound) == pytest.approx(tremolo(original), abs=0.2)
        assert distance(sound, original) < 0.35
    masked = sounds["masked"]
    assert level(masked) < level(original) - 1
    assert distance(masked, original) > 2


def test_what_the_model_made_of_it_is_heard(clips, chosen, tmp_path):
    """Twice the amplitude in every masked patch, where the level is the model's to guess."""
    index = chosen[0]
    louder = 2 * np.log(2)  # of the power's logarithm
    sounds = write(clips, index, tmp_path, lambda target: target + louder, norm_pix=False)
    gained = level(sounds["reconstructed"]) - level(sounds["original"])
    assert 3 < gained <= 6.1  # 6 dB where masked, 0 where visible
    given = write(clips, index, tmp_path, lambda target: 0 * target)
    # Flat patches at their true mean logarithm: no pitch, and softer than the sound.
    assert cents_off(given["reconstructed"], clips.truth(index)) > 50
    assert level(given["reconstructed"]) < level(given["original"]) - 3
