"""Features of all frames of a clip, and of the sound around each (CAV-MAE Sync)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.clip import CLIP_ROWS
from kdcmae_fast.data.fbank import kaldi_fbank, num_fbank_frames
from kdcmae_fast.data.segments import segment_starts, take_segments, timed_segment_starts
from kdcmae_fast.models.cav_mae_sync import CavMaeSync

if TYPE_CHECKING:
    from kdcmae_fast.data.clip import ClipFrames
    from kdcmae_fast.models.cav_mae import CavMae


class FrameFeatures(NamedTuple):
    """Features of B clips frame by frame, (B, T, D) each, not normalised.

    audio is (B, D) of a model that hears a clip as a whole.
    """

    audio: Tensor
    video: Tensor


class FrameBatch(NamedTuple):
    """B clips with all their frames.

    waveforms: (B, N) float32 at 16 kHz, 0 beyond each clip's length. lengths: (B,) int64.
    frames: (B, T, 3, H, W) uint8. times: (B, T) float64, seconds from the sound's start.
    """

    waveforms: Tensor
    lengths: Tensor
    frames: Tensor
    times: Tensor


def hears_frames(model: "CavMae") -> bool:
    """Whether the model takes the sound in segments, one per frame (CAV-MAE Sync)."""
    return isinstance(model, CavMaeSync)


def collate_frames(clips: Sequence["ClipFrames"]) -> FrameBatch:
    """Clips with equally many frames as one batch."""
    waveforms = torch.nn.utils.rnn.pad_sequence([c.waveform for c in clips], batch_first=True)
    return FrameBatch(
        waveforms,
        torch.tensor([len(clip.waveform) for clip in clips]),
        torch.stack([clip.frames for clip in clips]),
        torch.from_numpy(np.stack([clip.times for clip in clips])).double(),
    )


def encode_frames(model: "CavMae", data: DataConfig, batch: FrameBatch) -> FrameFeatures:
    """Features of every frame, and of the sound: around each frame, or of the clip as a whole.

    data: fbank normalisation, and by data.time_base where a frame's segment is. "true": around the
    frame's own time, inside the real sound. "compatible": where the published evaluation has it, as
    if every clip were 10.24 s long and its T frames spread evenly over that (`data.segments`).
    """
    device = next(model.parameters()).device
    length = model.config.audio_length
    real = num_fbank_frames(batch.waveforms.shape[1])
    if hears_frames(model):
        rows = CLIP_ROWS if data.time_base == "compatible" else max(real, length)
    else:
        rows = length
    fbank = kaldi_fbank(
        batch.waveforms.to(device),
        batch.lengths.to(device),
        num_mel_bins=model.config.num_mel_bins,
        num_rows=rows,
        center=True,
    )
    fbank.sub_(data.dataset_mean).div_(data.dataset_std)
    frames = batch.frames.to(device)
    if not hears_frames(model):
        return FrameFeatures(_of(model.encode(fbank=fbank).audio), encode_pictures(model, frames))
    if data.time_base == "compatible":
        starts = torch.tensor(segment_starts(frames.shape[1], length, rows))
    else:
        clip_rows = torch.tensor([num_fbank_frames(int(n)) for n in batch.lengths])
        starts = timed_segment_starts(batch.times, length, clip_rows, padded_rows=rows)
    return encode_clip(model, fbank, frames, starts)


def encode_clip(
    model: "CavMae", fbank: Tensor, frames: Tensor, starts: Tensor, *, rows_per_pass: int = 64
) -> FrameFeatures:
    """`model.encode` of every frame and its segment; each distinct segment of a clip only once.

    fbank: (B, S, F) normalised, whole clips. frames: (B, T, 3, H, W). starts: (T,) or (B, T) int64,
    each frame's segment (`data.segments`). rows_per_pass: frames or segments encoded at once.
    """
    clips, num_frames = frames.shape[:2]
    length = model.config.audio_length
    starts = starts.to(fbank.device).expand(clips, num_frames)
    if fbank.shape[0] != clips:
        raise ValueError(f"fbank has {fbank.shape[0]} clips, frames has {clips}")
    last = fbank.shape[1] - length
    if last < 0 or starts.min() < 0 or starts.max() > last:
        raise ValueError(
            f"starts reach from {starts.min()} to {starts.max()}: segments of {length} rows do not "
            f"fit into an fbank of {fbank.shape[1]}"
        )
    places = last + 1  # a segment's number is clip * places + start
    numbers = torch.arange(clips, device=fbank.device)[:, None] * places + starts
    distinct, index = numbers.unique(return_inverse=True)
    audio = [
        _of(model.encode(fbank=take_segments(fbank, n % places, length, clips=n // places)).audio)
        for n in distinct.split(rows_per_pass)
    ]
    video = encode_pictures(model, frames, rows_per_pass=rows_per_pass)
    return FrameFeatures(torch.cat(audio)[index], video)


def encode_pictures(model: "CavMae", frames: Tensor, *, rows_per_pass: int = 64) -> Tensor:
    """Features (B, T, D) of frames (B, T, 3, H, W), `rows_per_pass` of them at once."""
    pictures = frames.flatten(0, 1).split(rows_per_pass)
    video = torch.cat([_of(model.encode(frames=some).video) for some in pictures])
    return video.unflatten(0, frames.shape[:2])


def _of(features: Tensor | None) -> Tensor:
    assert features is not None  # its modality was given
    return features
