"""Resampling: pure tones survive, what lies over the new Nyquist frequency does not."""

import math

import pytest
import torch

from kdcmae_fast.data.resample import resample


def tone(frequency: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * frequency * time)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 15_999])
def test_a_tone_stays_the_tone(rate):
    ours = resample(tone(1000, rate), rate)
    middle = slice(200, len(ours) - 200)
    assert (ours - tone(1000, 16_000, 1)[: len(ours)])[middle].abs().max() < 2e-3


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_no_aliases(rate):
    assert resample(tone(11_000, rate), rate)[200:-200].abs().max() < 5e-3


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
@pytest.mark.parametrize("n", [1, 2, 440, 441, 442, 1000])
def test_lengths_and_leading_axes(rate, n):
    waveforms = torch.randn(2, 3, n)
    ours = resample(waveforms, rate)
    assert ours.shape == (2, 3, math.ceil(n * 16_000 / rate))
    torch.testing.assert_close(ours[1, 2], resample(waveforms[1, 2], rate))


def test_is_the_definition():
    rate, new_rate, width, rolloff = 441, 160, 6, 0.99
    x = torch.randn(300, dtype=torch.float64)
    cutoff = rolloff * min(rate, new_rate) / rate
    places = torch.arange(math.ceil(300 * new_rate / rate), dtype=torch.float64) * rate / new_rate
    distance = cutoff * (torch.arange(300, dtype=torch.float64) - places[:, None])
    hann = torch.cos(math.pi * distance / (2 * width)) ** 2 * (distance.abs() <= width)
    expected = (x * cutoff * torch.sinc(distance) * hann).sum(1)
    torch.testing.assert_close(resample(x, rate, new_rate), expected)


def test_same_rate_is_untouched():
    x = torch.randn(10)
    assert resample(x, 16_000) is x


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": 8000, "rolloff": 0.0}])
def test_errors(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]}={list(options.values())[-1]}"):
        resample(torch.zeros(10), **options)
