"""`FrontEnd`: a raw batch from the loader becomes a model's `Batch`, on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.augment import Augment, add_noise_and_roll, mask_bands, mix_up
from kdcmae_fast.data.bad import BadClip
from kdcmae_fast.data.fbank import kaldi_fbank


class RawBatch(NamedTuple):
    """One rank's clips of one micro step, as they leave the loader. B clips.

    waveforms: (B, N) float32 at 16 kHz, 0 beyond each clip's length. lengths: (B,) int64.
    frames: (B, 3, H, W) uint8. sample_ids: (B,) int64, positions in the dataset.
    labels: (B,) int64, -1 unknown. bad: the clips that had to be replaced, in the order tried.
    classes: (B, K) int64, all labels of each clip, filled up with -1.
    augment: what FrontEnd is to do to the clips; None: nothing.
    """

    waveforms: Tensor
    lengths: Tensor
    frames: Tensor
    sample_ids: Tensor
    labels: Tensor
    bad: tuple[BadClip, ...] = ()
    classes: Tensor | None = None
    augment: Augment | None = None


class FrontEnd:
    """Filterbank, length and normalisation of CAV-MAE (arXiv 2210.07839) for a whole batch.

    Each clip's mean is removed, its log-mel filterbank computed, cut or filled up with zeros to
    `audio_length` rows (0 after the log, not silence), then (x - dataset_mean) / dataset_std.
    Frames stay uint8; the patch embedding normalises them.

    A batch that comes with `augment` is mixed up before the filterbank, masked before the
    normalisation, and gets noise and a roll in time after it, as far as `data` asks for them.
    """

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        if not data.dataset_std > 0:
            raise ValueError(f"dataset_std={data.dataset_std} must be positive")
        for name, size in (("freq_mask", model.num_mel_bins), ("time_mask", model.audio_length)):
            if getattr(data, name) > size:
                raise ValueError(f"{name}={getattr(data, name)} must be at most {size}")
        self.data = data
        self.audio_length = model.audio_length
        self.num_mel_bins = model.num_mel_bins

    def __call__(self, raw: RawBatch, device: torch.device | str | None = None) -> Batch:
        """Copies `raw` to `device` (None: where it is) and returns its Batch there."""
        target = raw.waveforms.device if device is None else torch.device(device)
        waveforms, lengths, frames, sample_ids = (
            tensor.to(target, non_blocking=True) for tensor in raw[:4]
        )
        if raw.augment is None:
            return Batch(self.fbank(waveforms, lengths), frames, sample_ids)
        augment = raw.augment.to(target)
        if augment.mixed is not None:
            waveforms, frames = mix_up(waveforms, lengths, frames, augment.mixed)
        return Batch(self.fbank(waveforms, lengths, augment), frames, sample_ids)

    def fbank(
        self, waveforms: Tensor, lengths: Tensor | None = None, augment: Augment | None = None
    ) -> Tensor:
        """(B, N) at 16 kHz, (B,) or None -> (B, audio_length, num_mel_bins), normalised."""
        rows = kaldi_fbank(
            waveforms,
            lengths,
            num_mel_bins=self.num_mel_bins,
            num_rows=self.audio_length,
            center=True,
        )
        if augment is not None:
            mask_bands(rows, augment.draws, self.data.freq_mask, self.data.time_mask)
        rows.sub_(self.data.dataset_mean).div_(self.data.dataset_std)
        if augment is not None and self.data.noise:
            rows = add_noise_and_roll(rows, augment.draws, augment.keys)
        return rows
