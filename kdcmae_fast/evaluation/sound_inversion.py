"""From a log-mel filterbank back to sound that one can listen to.

A filterbank has neither the phase of the sound nor all of its spectrum: 128 filters over 257 bins.
Both are filled in by what fits best. The mel energies become a power spectrum by the
expectation-maximisation of non-negative least squares for relative errors (Richardson 1972, Lucy
1974; the Kullback-Leibler updates of non-negative matrix factorisation), which keeps quiet partials
beside loud ones; phases by Griffin and Lim (1984) with the momentum of Perraudin et al. (2013).

Written for the frames of `data.fbank`, 25 ms without padding at the ends and pre-emphasised, which
a general inversion (librosa's, with centred frames and other filters) does not have.
"""

import math
import wave
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.data.clip import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE
from kdcmae_fast.data.fbank import LOG_FLOOR, mel_filters

LOW_FREQ = 20.0  # Hz, where the mel filters begin; they end at half the sampling rate
PREEMPHASIS = 0.97
FFT_SIZE = 512
MEL_UPDATES = 50
MOMENTUM = 0.99
EDGE = 0.05  # least sum of squared windows divided by: the ends of a clip have next to none
TAIL = 1024  # samples after which the de-emphasis filter has died away (0.97 ** 1024 = 3e-14)


def fbank_to_waveform(fbank: Tensor, *, iterations: int = 64, seed: int = 0) -> Tensor:
    """Sound whose `kaldi_fbank` is close to `fbank`; equal calls give equal sound.

    fbank: (B, R, F) or (R, F), log-mel of 10 ms rows as `kaldi_fbank` computes it at 16 kHz
        (natural log of waveforms in [-1, 1], not normalised); -inf or NaN for no energy at all.
    iterations: of Griffin-Lim. seed: of the phases it starts from.
    Returns (B, N) or (N,) float32 on the CPU, N = 400 + 160 (R - 1) samples, not clipped.

    Errors: ValueError for another shape or no rows.
    """
    if fbank.dim() not in (2, 3) or 0 in fbank.shape[-2:]:
        raise ValueError(
            f"fbank must be (B, R, F) or (R, F) with at least one row, got {tuple(fbank.shape)}"
        )
    if iterations < 0:
        raise ValueError(f"iterations={iterations} must be at least 0")
    rows = fbank.detach().float().cpu()
    batch = rows if rows.dim() == 3 else rows[None]
    power = _power_spectrum(batch.nan_to_num(nan=-math.inf, neginf=-math.inf).exp())
    sound = _undo_preemphasis(_griffin_lim(power.sqrt(), iterations, seed))
    return sound if fbank.dim() == 3 else sound[0]


def write_wav(path: str | Path, waveform: Tensor) -> Path:
    """(N,) at 16 kHz as 16-bit mono, making its folder; past [-1, 1] all of it is turned down."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    loudest = float(waveform.abs().max()) if len(waveform) else 0.0
    samples = (waveform / max(1.0, loudest) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.numpy(force=True).astype("<i2").tobytes())
    return path


def _power_spectrum(energies: Tensor) -> Tensor:
    """Mel energies (B, R, F) -> powers (B, R, 257) >= 0 whose mel energies come close to them."""
    filters = mel_filters(SAMPLE_RATE, energies.shape[-1], LOW_FREQ, SAMPLE_RATE / 2, torch.float32)
    # Nothing is known of what the filterbank raised to its floor, or of a filter without bins.
    known = (energies > 1.001 * LOG_FLOOR) & (filters.sum(0) > 0)
    energies = energies.where(known, 0)
    share = filters.mT / filters.sum(1).clamp(min=1e-6)
    power = energies @ share
    for _ in range(MEL_UPDATES):
        power = power * ((energies / (power @ filters).clamp(min=1e-20)) @ share)
    return power


def _griffin_lim(magnitude: Tensor, iterations: int, seed: int) -> Tensor:
    """Magnitudes (B, R, 257) of windowed frames -> (B, N), the sound that comes closest."""
    window = torch.hann_window(FRAME_LENGTH, periodic=False)
    clips, rows, _ = magnitude.shape
    start = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(seed))
    spectrum = torch.polar(magnitude, (2 * math.pi * start).expand_as(magnitude).contiguous())
    norm = _overlap_add(window.square().expand(1, rows, -1)).clamp(min=EDGE)
    previous = torch.zeros_like(spectrum)
    for _ in range(iterations):
        frames = _sound_of(spectrum, window, norm).unfold(1, FRAME_LENGTH, FRAME_SHIFT)
        found = torch.fft.rfft(frames * window, FFT_SIZE)
        ahead = found + MOMENTUM * (found - previous)
        previous = found
        power = torch.view_as_real(ahead).square().sum(-1)
        spectrum = ahead * (magnitude * power.clamp(min=1e-30).rsqrt())
    return _sound_of(spectrum, window, norm)


def _sound_of(spectrum: Tensor, window: Tensor, norm: Tensor) -> Tensor:
    """The sound whose windowed frames are closest to these, in least squares."""
    frames = torch.fft.irfft(spectrum, FFT_SIZE)[..., :FRAME_LENGTH]
    return _overlap_add(frames * window) / norm


def _overlap_add(frames: Tensor) -> Tensor:
    """(B, R, 400) -> (B, N): the parts of 10 ms of all frames, each at its place."""
    clips, rows, length = frames.shape
    parts = -(-length // FRAME_SHIFT)
    pieces = F.pad(frames, (0, parts * FRAME_SHIFT - length)).unflatten(2, (parts, FRAME_SHIFT))
    out = frames.new_zeros(clips, rows + parts - 1, FRAME_SHIFT)
    for part in range(parts):
        out[:, part : part + rows] += pieces[:, :, part]
    return out.flatten(1)[:, : length + (rows - 1) * FRAME_SHIFT]


def _undo_preemphasis(sound: Tensor) -> Tensor:
    """y[n] = x[n] + 0.97 y[n - 1], by its frequency response."""
    length = sound.shape[1] + TAIL
    angle = torch.arange(length // 2 + 1, dtype=torch.float64) * (2 * math.pi / length)
    response = 1 - PREEMPHASIS * torch.polar(torch.ones_like(angle), -angle)
    spectrum = torch.fft.rfft(sound.double(), length) / response
    return torch.fft.irfft(spectrum, length)[:, : sound.shape[1]].float()
