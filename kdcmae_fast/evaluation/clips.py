"""Features of all frames of a clip, and of the sound around each (CAV-MAE Sync)."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.data.segments import take_segments

if TYPE_CHECKING:
    from kdcmae_fast.models.cav_mae import CavMae


class FrameFeatures(NamedTuple):
    """Features of B clips frame by frame, (B, T, D) each, not normalised."""

    audio: Tensor
    video: Tensor


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
    pictures = frames.flatten(0, 1).split(rows_per_pass)
    video = torch.cat([_of(model.encode(frames=some).video) for some in pictures])
    return FrameFeatures(torch.cat(audio)[index], video.unflatten(0, (clips, num_frames)))


def _of(features: Tensor | None) -> Tensor:
    assert features is not None  # its modality was given
    return features
