"""`FrontEnd`: a raw batch from the loader becomes a model's `Batch`, on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.augment import Augment, add_noise_and_roll, mask_bands, mix_up
from kdcmae_fast.data.bad import BadClip
from kdcmae_fast.data.clip import CLIP_ROWS, FRAME_LENGTH, FRAME_SHIFT
from kdcmae_fast.data.fbank import kaldi_fbank, num_fbank_frames
from kdcmae_fast.data.segments import segment_starts, take_segments, timed_segment_starts


class RawBatch(NamedTuple):
    """One rank's clips of one micro step, as they leave the loader. B clips.

    waveforms: (B, N) float32 at 16 kHz, 0 beyond each clip's length. lengths: (B,) int64.
    frames: (B, 3, H, W) uint8. sample_ids: (B,) int64, positions in the dataset.
    labels: (B,) int64, -1 unknown. bad: the clips that had to be replaced, in the order tried.
    classes: (B, K) int64, all labels of each clip, filled up with -1.
    augment: what FrontEnd is to do to the clips; None: nothing.

    With n frames of each clip (CAV-MAE Sync) waveforms are whole clips and frames (B, n, 3, H, W);
    numbers: (B, n) int64, which of the clip's frames they are. times: (B, n) float64, seconds from
    the waveform's start.
    """

    waveforms: Tensor
    lengths: Tensor
    frames: Tensor
    sample_ids: Tensor
    labels: Tensor
    bad: tuple[BadClip, ...] = ()
    classes: Tensor | None = None
    augment: Augment | None = None
    numbers: Tensor | None = None
    times: Tensor | None = None


class FrontEnd:
    """Filterbank, length and normalisation of CAV-MAE (arXiv 2210.07839) for a whole batch.

    Each clip's mean is removed, its log-mel filterbank computed, cut or filled up with zeros to
    `audio_length` rows (0 after the log, not silence), then (x - dataset_mean) / dataset_std.
    Frames stay uint8; the patch embedding normalises them.

    A batch that comes with `augment` is mixed up before the filterbank, masked before the
    normalisation, and gets noise and a roll in time after it, as far as `data` asks for them.

    A batch with n frames of each clip becomes B * n rows, those of a clip side by side: the
    filterbank of each whole clip is computed once, and every frame gets the `audio_length` rows
    around its moment (`data.segments`, by `data.time_base`). Masks, noise and roll then concern
    segments, and are the same for all of a clip.
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
        augment = None if raw.augment is None else raw.augment.to(target)
        if augment is not None and augment.mixed is not None:
            waveforms, frames = mix_up(waveforms, lengths, frames, augment.mixed)
        if raw.numbers is None or raw.times is None:
            return Batch(self.fbank(waveforms, lengths, augment), frames, sample_ids)
        numbers = raw.numbers.to(target, non_blocking=True)
        times = raw.times.to(target, non_blocking=True)
        segments = self.segments(waveforms, lengths, numbers, times, augment)
        # Numbers of their own give the rows of a clip masks of their own.
        rows = sample_ids[:, None] * self.data.num_frames + numbers
        return Batch(segments.flatten(0, 1), frames.flatten(0, 1), rows.flatten())

    def segments(
        self,
        waveforms: Tensor,
        lengths: Tensor | None,
        numbers: Tensor,
        times: Tensor,
        augment: Augment | None = None,
    ) -> Tensor:
        """The sound around each frame, (B, n, audio_length, num_mel_bins), normalised.

        waveforms: (B, N) at 16 kHz, whole clips. lengths: (B,), None: all N. numbers: (B, n), of
        data.num_frames. times: (B, n) seconds. augment: of the B clips.
        """
        size, found = self.audio_length, num_fbank_frames(waveforms.shape[1])
        compatible = self.data.time_base == "compatible"
        num_rows = CLIP_ROWS if compatible else max(size, found)
        clips = kaldi_fbank(
            waveforms, lengths, num_mel_bins=self.num_mel_bins, num_rows=num_rows, center=True
        )
        if compatible:
            table = segment_starts(self.data.num_frames, size, num_rows)
            starts = torch.tensor(table, device=numbers.device)[numbers]
        else:
            real = (
                found
                if lengths is None
                else (lengths - FRAME_LENGTH).div(FRAME_SHIFT, rounding_mode="floor") + 1
            )
            starts = timed_segment_starts(times, size, real, padded_rows=num_rows)
        rows = take_segments(clips, starts, size).flatten(0, 1)
        of_rows = None if augment is None else augment.repeated(numbers.shape[1])
        return self._finish(rows, of_rows).unflatten(0, numbers.shape)

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
        return self._finish(rows, augment)

    def _finish(self, rows: Tensor, augment: Augment | None) -> Tensor:
        """Masks, normalisation and noise of (R, audio_length, num_mel_bins), partly in place."""
        if augment is not None:
            mask_bands(rows, augment.draws, self.data.freq_mask, self.data.time_mask)
        rows.sub_(self.data.dataset_mean).div_(self.data.dataset_std)
        if augment is not None and self.data.noise:
            rows = add_noise_and_roll(rows, augment.draws, augment.keys)
        return rows
