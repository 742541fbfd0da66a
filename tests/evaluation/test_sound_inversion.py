"""Sound from filterbanks: its own filterbank is close to the one given."""

import wave

import pytest
import torch

from kdcmae_fast.data.fbank import LOG_FLOOR, kaldi_fbank, mel_edges
from kdcmae_fast.evaluation import fbank_to_waveform
from kdcmae_fast.evaluation.sound_inversion import write_wav

TIME = torch.arange(12_345) / 16_000  # an odd length


def tone(hertz: float) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hertz * TIME)


def loudness(sound: torch.Tensor) -> float:
    return sound.square().mean().sqrt().item()


def chirp() -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * (300 * TIME + 2000 * TIME**2))


def harmonics() -> torch.Tensor:
    return sum(tone(220.0 * k) / k for k in range(1, 12)) * (1 + torch.sin(30 * TIME)) / 3


@pytest.fixture(scope="module")
def noise():
    return 0.1 * torch.randn(12_345, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["chirp", "harmonics", "noise"])
def test_the_filterbank_of_the_sound_is_close_to_the_one_given(kind, noise):
    waveform = {"chirp": chirp(), "harmonics": harmonics(), "noise": noise}[kind]
    fbank = kaldi_fbank(waveform[None])
    sound = fbank_to_waveform(fbank)
    assert sound.shape == (1, 400 + 160 * (fbank.shape[1] - 1))
    error = (kaldi_fbank(sound) - fbank).abs()
    # Natural log: 0.3 is a factor of 1.35 in power; the filterbanks themselves spread over 3 to 5.
    assert error.mean() < 0.3
    assert error.median() < 0.1
    assert loudness(sound) == pytest.approx(loudness(waveform), rel=0.05)
    guessed = fbank_to_waveform(fbank, iterations=0)
    assert error.mean() < 0.5 * (kaldi_fbank(guessed) - fbank).abs().mean()


@pytest.mark.parametrize("hertz", [60, 150, 440, 1000, 2500, 4000, 6000, 7500])
def test_a_tone_stays_within_a_mel_bin(hertz):
    sound = fbank_to_waveform(kaldi_fbank(tone(hertz)[None])[0])
    peak = torch.fft.rfft(sound, 2**18).abs().argmax().item() * 16_000 / 2**18
    bins = [sum(edge <= f for edge in mel_edges(128)) for f in (hertz, peak)]
    assert abs(bins[0] - bins[1]) <= 1
    assert loudness(sound) == pytest.approx(0.3 / 2**0.5, rel=0.1)


def test_a_batch_is_its_clips_and_equal_calls_give_equal_sound(noise):
    fbank = torch.cat([kaldi_fbank(x[None]) for x in (chirp(), noise)])
    sound = fbank_to_waveform(fbank)
    assert torch.equal(sound, fbank_to_waveform(fbank))
    torch.testing.assert_close(sound[1], fbank_to_waveform(fbank[1]), rtol=1e-2, atol=1e-3)
    assert not torch.equal(sound, fbank_to_waveform(fbank, seed=1))


def test_silence_is_silent_and_a_row_is_enough():
    floor = torch.full((7, 128), LOG_FLOOR).log()
    assert fbank_to_waveform(floor).abs().max() == 0
    assert fbank_to_waveform(torch.full((3, 128), float("nan"))).abs().max() == 0
    assert fbank_to_waveform(torch.full((1, 128), float("-inf"))).tolist() == [0.0] * 400
    gap = kaldi_fbank(tone(440)[None])[0].clone()
    gap[20:40] = float("nan")
    sound = fbank_to_waveform(gap)
    assert sound[25 * 160 : 35 * 160].abs().max() < 0.01 < sound[: 15 * 160].abs().max()
    assert fbank_to_waveform(torch.randn(2, 1, 32)).isfinite().all()  # some filters have no bin


@pytest.mark.parametrize("shape", [(128,), (0, 128), (2, 3, 4, 128)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"fbank must be \(B, R, F\) or \(R, F\) with at least"):
        fbank_to_waveform(torch.zeros(shape))


def test_wave_files(tmp_path):
    path = write_wav(tmp_path / "new" / "x.wav", torch.tensor([0.5, -0.25, 0.0]))
    write_wav(tmp_path / "loud.wav", torch.tensor([2.0, -4.0, 0.0]))
    write_wav(tmp_path / "none.wav", torch.zeros(0))

    def samples(path) -> list[int]:
        with wave.open(str(path)) as file:
            assert file.getparams()[:3] == (1, 2, 16_000)
            return torch.frombuffer(bytearray(file.readframes(9)), dtype=torch.int16).tolist()

    assert samples(path) == [16384, -8192, 0]
    assert samples(tmp_path / "loud.wav") == [16384, -32767, 0]
