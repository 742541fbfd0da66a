"""Kaldi-compatible log-mel filterbank of a whole batch, on any device.

The features of CAV-MAE (arXiv 2210.07839): 25 ms frames every 10 ms, snip-edges, symmetric Hann
window, per-frame DC removal, pre-emphasis, power spectrum, triangular mel filters, natural log.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_FLOOR = torch.finfo(torch.float32).eps  # filter energies below it are raised to it
CPU_ROWS = 1024  # fbank rows computed together on a CPU
MEL_BLOCKS = 4  # groups of mel filters multiplied apart on a CPU


def num_fbank_frames(num_samples: int, sample_rate: int = 16_000) -> int:
    """Rows the filterbank of `num_samples` samples has; 0 for less than one 25 ms frame."""
    length, shift = _frame_sizes(sample_rate)
    return max(0, 1 + (num_samples - length) // shift)


def remove_mean(waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Subtract each clip's own mean, taken over its true length; the padding stays 0.

    waveforms: (B, N), zero beyond `lengths`. lengths: (B,) int64, or None when all are N.
    """
    if lengths is None:
        return waveforms - waveforms.mean(1, keepdim=True)
    mean = waveforms.sum(1, keepdim=True) / lengths.clamp(min=1).unsqueeze(1)
    outside = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths.unsqueeze(1)
    return (waveforms - mean).masked_fill_(outside, 0)


def kaldi_fbank(
    waveforms: Tensor,
    lengths: Tensor | None = None,
    *,
    sample_rate: int = 16_000,
    num_mel_bins: int = 128,
    low_freq: float = 20.0,
    high_freq: float | None = None,
    preemphasis: float = 0.97,
    num_rows: int | None = None,
    center: bool = False,
) -> Tensor:
    """Log-mel filterbanks (B, frames, num_mel_bins) of a batch of waveforms.

    waveforms: (B, N) float32 or float64 in [-1, 1].
    lengths: (B,) int64, samples that belong to each clip; rows with samples beyond it are 0.
        None: all N do.
    sample_rate: Hz. low_freq, high_freq: range of the mel filters in Hz (None: Nyquist).
    preemphasis: each sample loses this share of the one before it.
    num_rows: rows of the result, cut or filled up with zeros (None: as many as there are).
    center: subtract each clip's own mean first, as `remove_mean` does.
    Frames: 1 + (N - 25 ms) // 10 ms. Raises ValueError for clips shorter than one frame.
    """
    _check(waveforms, sample_rate, num_mel_bins)
    length, shift = _frame_sizes(sample_rate)
    top = sample_rate / 2 if high_freq is None else high_freq
    dtype, device = waveforms.dtype, waveforms.device
    # One product on a GPU; on a CPU several, which skip most of the filters' zeros.
    blocks = MEL_BLOCKS if device.type == "cpu" else 1
    filters = _filter_blocks(sample_rate, num_mel_bins, low_freq, top, dtype, device, blocks)
    window = torch.hann_window(length, periodic=False, dtype=dtype, device=device)
    found = num_fbank_frames(waveforms.shape[1], sample_rate)
    num_rows = found if num_rows is None else num_rows
    kept = min(found, num_rows)
    fbank = waveforms.new_empty(waveforms.shape[0], num_rows, num_mel_bins)
    fbank[:, kept:] = 0
    # On a CPU a few clips at a time stay in its cache: twice as fast as the batch at once.
    step = max(1, CPU_ROWS // found) if device.type == "cpu" else max(1, waveforms.shape[0])
    lengths = None if lengths is None else lengths.to(device)
    if lengths is not None and device.type == "cpu" and bool((lengths == waveforms.shape[1]).all()):
        lengths = None  # nothing to mask; on a GPU the question would cost more than the masking
    for first in range(0, waveforms.shape[0], step):
        clips = slice(first, first + step)
        part = waveforms[clips]
        if center:
            part = remove_mean(part, None if lengths is None else lengths[clips])
        _log_mel(part, window, shift, preemphasis, filters, fbank[clips, :kept])
    if lengths is not None:
        rows = (lengths - length).div(shift, rounding_mode="floor") + 1
        outside = torch.arange(kept, device=device) >= rows.unsqueeze(1)
        fbank[:, :kept].masked_fill_(outside.unsqueeze(2), 0)
    return fbank


def _log_mel(
    waveforms: Tensor,
    window: Tensor,
    shift: int,
    preemphasis: float,
    filters: tuple["FilterBlock", ...],
    out: Tensor,
) -> None:
    """(b, N) -> out (b, frames, mel bins); the roundings are those of the per-frame definition."""
    length, rows = len(window), out.shape[1]
    frames = waveforms.unfold(1, length, shift)[:, :rows]
    centered = frames - frames.mean(2, keepdim=True)
    padded = waveforms.new_zeros(*frames.shape[:2], _fft_size(length))
    # The window is 0 at a frame's first sample, which has no predecessor: it stays 0.
    signal = padded[..., 1:length]
    torch.sub(centered[..., 1:], centered[..., :-1], alpha=preemphasis, out=signal)
    signal.mul_(window[1:])
    parts = torch.view_as_real(torch.fft.rfft(padded)).square_()
    power = (parts[..., 0] + parts[..., 1]).flatten(0, 1)
    energies = power.new_empty(len(power), out.shape[2])
    for block in filters:
        torch.mm(power[:, block.bins], block.weights, out=energies[:, block.filters])
    torch.clamp(energies.view_as(out), min=LOG_FLOOR, out=out).log_()


class FilterBlock(NamedTuple):
    """Neighbouring mel filters: their columns, the FFT bins they touch, (bins, filters) weights."""

    filters: slice
    bins: slice
    weights: Tensor


@functools.lru_cache(maxsize=16)
def _filter_blocks(
    sample_rate: int,
    num_mel_bins: int,
    low_freq: float,
    high_freq: float,
    dtype: torch.dtype,
    device: torch.device,
    num_blocks: int,
) -> tuple[FilterBlock, ...]:
    """`mel_filters` in blocks of neighbours, each without the FFT bins that none of it weighs."""
    whole = mel_filters(sample_rate, num_mel_bins, low_freq, high_freq, dtype)
    size = -(-num_mel_bins // num_blocks)
    blocks = []
    for first in range(0, num_mel_bins, size):
        columns = slice(first, min(first + size, num_mel_bins))
        touched = whole[:, columns].any(1).nonzero()
        bins = slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 1)
        blocks.append(FilterBlock(columns, bins, whole[bins, columns].contiguous().to(device)))
    return tuple(blocks)


@functools.lru_cache(maxsize=16)
def mel_filters(
    sample_rate: int, num_mel_bins: int, low_freq: float, high_freq: float, dtype: torch.dtype
) -> Tensor:
    """Triangular mel filters (fft_size / 2 + 1, num_mel_bins), mel = 1127 ln(1 + f / 700).

    The triangles are straight in mel, not in Hz, as Kaldi's; the Nyquist bin weighs 0. Computed in
    `dtype`, because Kaldi's are float32 and that shows at the feet of the triangles.
    """
    if not 0 <= low_freq < high_freq <= sample_rate / 2:
        raise ValueError(
            f"low_freq={low_freq}, high_freq={high_freq}: need 0 <= low < high <= "
            f"{sample_rate / 2} Hz, half of sample_rate={sample_rate}"
        )
    half = _fft_size(_frame_sizes(sample_rate)[0]) // 2
    frequency = torch.arange(half, dtype=dtype) * (sample_rate / (2 * half))
    mel = (1127 * (1 + frequency / 700).log()).unsqueeze(1)
    lowest = 1127 * math.log1p(low_freq / 700)
    width = (1127 * math.log1p(high_freq / 700) - lowest) / (num_mel_bins + 1)
    left, center, right = (
        lowest + (torch.arange(num_mel_bins, dtype=dtype) + i) * width for i in range(3)
    )
    rise, fall = (mel - left) / (center - left), (right - mel) / (right - center)
    triangles = torch.minimum(rise, fall).clamp_(min=0)
    return torch.cat([triangles, triangles.new_zeros(1, num_mel_bins)])


def mel_edges(num_mel_bins: int, sample_rate: int = 16_000, low_freq: float = 20.0) -> list[float]:
    """Hz between which each mel bin counts most: num_mel_bins + 1 edges from 0 to half the rate.

    Halfway in mel between the middles of neighbouring filters; the filters reach to Nyquist.
    """
    lowest, highest = (1127 * math.log1p(f / 700) for f in (low_freq, sample_rate / 2))
    width = (highest - lowest) / (num_mel_bins + 1)
    between = [lowest + (i + 0.5) * width for i in range(1, num_mel_bins)]
    return [0.0, *(700 * math.expm1(mel / 1127) for mel in between), sample_rate / 2]


def _frame_sizes(sample_rate: int) -> tuple[int, int]:
    """Samples in 25 ms and in 10 ms."""
    return sample_rate * 25 // 1000, sample_rate // 100


def _fft_size(frame_length: int) -> int:
    return 2 ** math.ceil(math.log2(frame_length))


def _check(waveforms: Tensor, sample_rate: int, num_mel_bins: int) -> None:
    if waveforms.dim() != 2 or waveforms.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"waveforms must be (B, N) float32 or float64, got {tuple(waveforms.shape)} "
            f"{waveforms.dtype}"
        )
    if sample_rate < 1000 or num_mel_bins < 1:
        raise ValueError(
            f"sample_rate={sample_rate} must be at least 1000 Hz and "
            f"num_mel_bins={num_mel_bins} at least 1"
        )
    length = _frame_sizes(sample_rate)[0]
    if waveforms.shape[1] < length:
        raise ValueError(
            f"waveforms have {waveforms.shape[1]} samples: one 25 ms frame at {sample_rate} Hz "
            f"needs {length}; drop clips that short"
        )
