"""Band-limited resampling of waveforms: a windowed sinc, evaluated only where it is not zero."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

PHASES = 32  # output samples per group; more make the matrices larger but emptier


class _Group(NamedTuple):
    """Filters of consecutive output samples.

    start: first input sample they need, relative to the first of the period. weights: (input
    samples, output samples).
    """

    start: int
    weights: Tensor


def resample(
    waveforms: Tensor,
    rate: int,
    new_rate: int = 16_000,
    *,
    lowpass_width: int = 6,
    rolloff: float = 0.99,
) -> Tensor:
    """(..., N) at `rate` Hz -> (..., ceil(N * new_rate / rate)) at `new_rate` Hz.

    lowpass_width: zero crossings of the sinc on each side, under a Hann window.
    rolloff: cut-off frequency as a share of the lower of the two Nyquist frequencies.
    float32 or float64. The method of torchaudio's `resample` with the same defaults: output sample
    m is the sum over n of x[n] c sinc(c (n - p)) cos^2(pi c (n - p) / (2 lowpass_width)) with
    p = m rate / new_rate, c = rolloff min(rate, new_rate) / rate.
    """
    if rate < 1 or new_rate < 1 or lowpass_width < 1 or not 0 < rolloff <= 1:
        raise ValueError(
            f"rate={rate}, new_rate={new_rate} and lowpass_width={lowpass_width} must be at "
            f"least 1 and rolloff={rolloff} in (0, 1]"
        )
    if rate == new_rate:
        return waveforms
    common = math.gcd(rate, new_rate)
    repeats = math.ceil(PHASES * common / new_rate)  # periods taken as one, so groups are filled
    rate, new_rate = rate // common * repeats, new_rate // common * repeats
    groups, reach = _filters(rate, new_rate, lowpass_width, rolloff, waveforms.dtype)
    length = math.ceil(waveforms.shape[-1] * new_rate / rate)
    periods = math.ceil(length / new_rate)  # of `rate` input and `new_rate` output samples
    right = periods * rate + 2 * reach - waveforms.shape[-1]
    padded = torch.nn.functional.pad(waveforms, (reach, max(0, right)))
    parts = []
    for start, weights in groups:
        inputs = padded[..., start + reach :].unfold(-1, len(weights), rate)[..., :periods, :]
        parts.append(inputs @ weights.to(waveforms.device))
    return torch.cat(parts, -1).flatten(-2)[..., :length]


@functools.lru_cache(maxsize=8)
def _filters(
    rate: int, new_rate: int, lowpass_width: int, rolloff: float, dtype: torch.dtype
) -> tuple[list[_Group], int]:
    """The filters of one period in groups, and how far they reach to each side, in samples."""
    cutoff = rolloff * min(rate, new_rate) / rate  # of the input's Nyquist frequency
    reach = math.ceil(lowpass_width / cutoff)
    groups = []
    for first in range(0, new_rate, PHASES):
        outputs = torch.arange(first, min(first + PHASES, new_rate), dtype=torch.float64)
        places = outputs * rate / new_rate
        start = int(places[0]) - reach
        inputs = torch.arange(start, int(places[-1]) + reach + 2, dtype=torch.float64)
        turns = (cutoff * (inputs[:, None] - places)).clamp_(-lowpass_width, lowpass_width)
        hann = torch.cos(turns * (math.pi / (2 * lowpass_width))) ** 2
        groups.append(_Group(start, (cutoff * torch.sinc(turns) * hann).to(dtype)))
    return groups, reach
