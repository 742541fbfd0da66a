"""Augmentation as CAV-MAE (arXiv 2210.07839) does it, for a whole batch on its device.

In this order: mix-up of waveforms, frames and labels; filterbank; frequency and time masks
(SpecAugment, arXiv 1904.08779); normalisation; noise; circular roll in time. What happens to a clip
is drawn where it is read, from (seed, epoch, clip) alone: ranks and batch sizes do not change it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.clip import Clip
from kdcmae_fast.data.fbank import remove_mean

MIX_BETA = 10.0  # both parameters of the Beta distribution of a mix-up's weight
NOISE_LEVEL = 0.1  # highest amplitude of the noise, in normalised units

# Columns of a clip's draws, each uniform in [0, 1).
FREQ_WIDTH, FREQ_START, TIME_WIDTH, TIME_START, NOISE, ROLL, NUM_DRAWS = range(7)


class ClipDraws(NamedTuple):
    """One clip's part of `Augment`. weight: of the clip in its mix, 1 when it is not mixed."""

    values: NDArray[np.float64]
    key: int
    weight: float
    partner: Clip | None = None


class Mixed(NamedTuple):
    """The M clips of a batch that are mixed with another, and those others.

    rows: (M,) int64 places in the batch. weights: (M,) float32, of the batch's own clip.
    waveforms, lengths, frames, classes: of the others, as in RawBatch.
    """

    rows: Tensor
    weights: Tensor
    waveforms: Tensor
    lengths: Tensor
    frames: Tensor
    classes: Tensor


class Augment(NamedTuple):
    """What is to be done to the B clips of a batch.

    draws: (B, NUM_DRAWS) float32 in [0, 1). keys: (B,) int32, of each clip's noise.
    """

    draws: Tensor
    keys: Tensor
    mixed: Mixed | None = None

    def to(self, device: torch.device) -> "Augment":
        """The same on `device`."""
        draws, keys = (tensor.to(device, non_blocking=True) for tensor in self[:2])
        if self.mixed is None:
            return Augment(draws, keys)
        moved = (tensor.to(device, non_blocking=True) for tensor in self.mixed)
        return Augment(draws, keys, Mixed(*moved))

    def repeated(self, times: int) -> "Augment":
        """The draws of n = `times` rows of each clip, side by side: all rows get their clip's."""
        return Augment(self.draws.repeat_interleave(times, 0), self.keys.repeat_interleave(times))


def is_augmenting(data: DataConfig) -> bool:
    """Whether the settings ask for anything of this module."""
    return data.noise or max(data.mixup, data.freq_mask, data.time_mask) > 0


def draws_of(rng: np.random.Generator, data: DataConfig) -> ClipDraws:
    """All draws of one clip; what is switched off is drawn too, so that it moves nothing else."""
    values = rng.random(NUM_DRAWS)
    key = int(rng.integers(-(2**31), 2**31))
    mixes, weight = rng.random() < data.mixup, float(rng.beta(MIX_BETA, MIX_BETA))
    return ClipDraws(values, key, weight if mixes else 1.0)


def collate_draws(draws: Sequence[ClipDraws]) -> Augment:
    """The draws of a batch's clips, in its order."""
    values = torch.from_numpy(np.stack([clip.values for clip in draws])).float()
    keys = torch.tensor([clip.key for clip in draws], dtype=torch.int32)
    rows = [row for row, clip in enumerate(draws) if clip.partner is not None]
    partners = [clip.partner for clip in draws if clip.partner is not None]
    if not partners:
        return Augment(values, keys)
    mixed = Mixed(
        rows=torch.tensor(rows),
        weights=torch.tensor([draws[row].weight for row in rows]),
        waveforms=pad([clip.waveform for clip in partners]),
        lengths=torch.tensor([len(clip.waveform) for clip in partners]),
        frames=torch.stack([clip.frame for clip in partners]),
        classes=classes_of(partners),
    )
    return Augment(values, keys, mixed)


def pad(waveforms: Sequence[Tensor]) -> Tensor:
    """(B, N), filled up with zeros to the longest."""
    if len({len(waveform) for waveform in waveforms}) == 1:
        return torch.stack(list(waveforms))
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)


def classes_of(clips: Sequence[Clip]) -> Tensor:
    """(B, K) int64, all labels of each clip, filled up with -1."""
    rows = [torch.tensor(clip.classes or (clip.label,)) for clip in clips]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def mix_up(
    waveforms: Tensor, lengths: Tensor, frames: Tensor, mixed: Mixed
) -> tuple[Tensor, Tensor]:
    """Waveforms and frames with the mixed clips put in.

    Both waveforms lose their mean, then weight * own + (1 - weight) * other; the other is cut or
    filled up with zeros to the clip's own length. Frames are rounded to whole levels.
    """
    size = waveforms.shape[1]
    others = remove_mean(mixed.waveforms, mixed.lengths)[:, :size]
    others = torch.nn.functional.pad(others, (0, size - others.shape[1]))
    mine = remove_mean(waveforms[mixed.rows], lengths[mixed.rows])
    outside = torch.arange(size, device=mine.device) >= lengths[mixed.rows].unsqueeze(1)
    sound = torch.lerp(others, mine, mixed.weights.unsqueeze(1)).masked_fill_(outside, 0)
    share = mixed.weights.view(-1, *(1,) * (frames.ndim - 1))
    picture = torch.lerp(mixed.frames.float(), frames[mixed.rows].float(), share).round_()
    return (
        waveforms.index_copy(0, mixed.rows, sound),
        frames.index_copy(0, mixed.rows, picture.to(frames.dtype)),
    )


def mask_bands(fbank: Tensor, draws: Tensor, freq_mask: int, time_mask: int) -> Tensor:
    """Set one band of mel bins and one stretch of rows of each clip to 0, in place.

    fbank: (B, T, F), not yet normalised. freq_mask, time_mask: mel bins and rows the masks are at
    most wide (exclusive). Width w = u * mask, start = v * (size - w), both cut to whole numbers, as
    torchaudio does it; the last bin and row are never masked that way.
    """
    for axis, most, width in ((2, freq_mask, FREQ_WIDTH), (1, time_mask, TIME_WIDTH)):
        if most == 0:
            continue
        size = fbank.shape[axis]
        wide = draws[:, width] * most
        start = (draws[:, width + 1] * (size - wide)).floor()
        places = torch.arange(size, device=fbank.device)
        inside = (places >= start.unsqueeze(1)) & (places < (start + wide.floor()).unsqueeze(1))
        fbank.masked_fill_(inside.unsqueeze(3 - axis), 0)
    return fbank


def add_noise_and_roll(fbank: Tensor, draws: Tensor, keys: Tensor) -> Tensor:
    """Normalised fbank (B, T, F) plus noise of a random level each, then rolled in time at random.

    Noise: u * NOISE_LEVEL * U(0, 1) for each value; the roll is any of -T ... T - 1 rows.
    """
    clips, rows, bins = fbank.shape
    noise = keyed_noise(keys, rows * bins).view(clips, rows, bins)
    fbank = torch.addcmul(fbank, noise, draws[:, NOISE].view(-1, 1, 1), value=NOISE_LEVEL)
    shift = (draws[:, ROLL] * (2 * rows)).floor().long() - rows
    source = (torch.arange(rows, device=fbank.device) - shift.unsqueeze(1)) % rows
    return fbank[torch.arange(clips, device=fbank.device).unsqueeze(1), source]


def keyed_noise(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32 uniform in [0, 1): number i of a clip depends on (its key, i) alone.

    keys: (B,) int32. A 32-bit integer hash, the same on every device.
    """
    # int32 wraps around, so these are products modulo 2^32; its shifts keep the sign.
    words = torch.arange(count, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B9)
    words = words ^ keys.unsqueeze(1)
    words ^= (words >> 16) & 0xFFFF
    words *= 0x7FEB352D
    words ^= (words >> 15) & 0x1FFFF
    words *= _signed(0x846CA68B)
    words ^= (words >> 16) & 0xFFFF
    return ((words >> 8) & 0xFFFFFF).float().mul_(2.0**-24)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def label_vectors(
    classes: Tensor, num_classes: int, smoothing: float = 0.0, mixed: Mixed | None = None
) -> Tensor:
    """Training targets (B, num_classes) float32 of clips with any number of labels.

    classes: (B, K) int64, -1 for none. e = smoothing: e / num_classes everywhere and 1 - e at the
    labels; of a mixed clip e / num_classes + (1 - e) (weight * own + (1 - weight) * other's).
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be in [0, 1)")
    low = smoothing / num_classes
    hot = _multi_hot(classes, num_classes)
    vectors = low + hot * (1 - smoothing - low)
    if mixed is None:
        return vectors
    share = mixed.weights.unsqueeze(1)
    both = torch.lerp(_multi_hot(mixed.classes, num_classes), hot[mixed.rows], share)
    return vectors.index_copy(0, mixed.rows, low + (1 - smoothing) * both)


def _multi_hot(classes: Tensor, num_classes: int) -> Tensor:
    """(B, num_classes), 1 at each class; class -1 is written to a column that is cut off."""
    columns = torch.where(classes < 0, num_classes, classes)
    wide = torch.zeros(len(classes), num_classes + 1, device=classes.device)
    return wide.scatter_(1, columns, 1.0)[:, :num_classes]
