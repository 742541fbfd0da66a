"""One frame and its sound of each clip that has boxes, ready for a model."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import BadClip, ClipDataset, ClipError, FrontEnd
from kdcmae_fast.data.clip import FRAME_LENGTH, FRAME_SHIFT, ClipFrames
from kdcmae_fast.data.segments import take_segments, timed_segment_starts
from kdcmae_fast.evaluation.attribution import References
from kdcmae_fast.evaluation.localization_maps import normalized
from kdcmae_fast.evaluation.processes import SharedBadClips
from kdcmae_fast.models.cav_mae_sync import CavMaeSync

if TYPE_CHECKING:
    from kdcmae_fast.models.cav_mae import CavMae


class Located(NamedTuple):
    """B clips with a frame each.

    clips: as read; their frames are (1, 3, S, S). frames: (B, 3, S, S) uint8 on the device.
    sounds: (B, D) vectors of the clips' sounds.
    """

    clips: list[ClipFrames]
    frames: Tensor
    sounds: Tensor

    @property
    def indices(self) -> Tensor:
        """(B,) int64 numbers of the clips in their dataset."""
        return torch.tensor([clip.index for clip in self.clips])


def located_batches(
    model: "CavMae",
    dataset: ClipDataset,
    data: DataConfig,
    indices: Sequence[int],
    *,
    batch_size: int,
    bad: SharedBadClips,
) -> Iterator[Located]:
    """The clips of `indices` in order, in batches; of several processes (of `bad`) this one's.

    Clips that cannot be read go to `bad`; their batch is smaller.
    """
    with ThreadPoolExecutor(max(1, data.num_workers)) as pool:
        for batch in bad.processes.batches(len(indices), batch_size):
            found = list(pool.map(_reader(dataset), indices[batch.start : batch.stop]))
            clips = [clip for clip in found if not isinstance(clip, BadClip)]
            bad.add(batch, [clip for clip in found if isinstance(clip, BadClip)])
            if clips:
                device = next(model.parameters()).device
                frames = torch.stack([clip.frames[0] for clip in clips]).to(device)
                yield Located(clips, frames, sound_vectors(model, data, clips)[:, 0])


def make_references(
    model: "CavMae", dataset: ClipDataset, data: DataConfig, indices: Sequence[int], count: int
) -> References:
    """At most `count` clips evenly out of `indices`, to attribute from; unreadable ones left out.

    Of several processes each reads them all, so that they have the same.
    ValueError where there are fewer than two: a clip is not its own reference.
    """
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    chosen = [indices[place] for place in places.tolist()]
    bad = SharedBadClips(len(dataset), len(chosen), 1.0)
    batches = list(located_batches(model, dataset, data, chosen, batch_size=32, bad=bad))
    if sum(len(batch.clips) for batch in batches) < 2:
        raise ValueError(
            "fewer than 2 clips can be read: each one's map is compared with what other "
            "clips' frames and sounds give; add clips"
        )
    return References(
        normalized(model, torch.cat([batch.frames for batch in batches])),
        torch.cat([batch.sounds for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
    )


def sound_vectors(model: "CavMae", data: DataConfig, clips: Sequence[ClipFrames]) -> Tensor:
    """(B, T, D) what the model makes of the sound that goes with each of T frames.

    CAV-MAE hears the clip from its start on, the same for every frame; CAV-MAE Sync the segment
    around the frame's time. All clips have the same T.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(clip.waveform) for clip in clips], device=device)
    waveforms = torch.nn.utils.rnn.pad_sequence(
        [clip.waveform for clip in clips], batch_first=True
    ).to(device)
    num_frames = len(clips[0].times)
    length = model.config.audio_length
    if not isinstance(model, CavMaeSync):
        fbank = FrontEnd(data, model.config).fbank(waveforms, lengths)
        return _encode_sound(model, fbank)[:, None].expand(-1, num_frames, -1)
    rows = ((lengths - FRAME_LENGTH) // FRAME_SHIFT + 1).clamp(min=1)
    patch = model.config.patch_size
    padded = max(length, -(-int(rows.max()) // patch) * patch)
    front_end = FrontEnd(data, replace(model.config, audio_length=padded))
    fbank = front_end.fbank(waveforms, lengths)
    times = torch.from_numpy(np.stack([clip.times for clip in clips])).to(device)
    starts = timed_segment_starts(times, length, rows, padded_rows=padded)
    segments = take_segments(fbank, starts, length)
    return _encode_sound(model, segments.flatten(0, 1)).unflatten(0, (len(clips), num_frames))


def _encode_sound(model: "CavMae", fbank: Tensor) -> Tensor:
    with torch.no_grad():
        audio = model.encode(fbank=fbank).audio
    assert audio is not None  # sound was given
    return audio.float()


def _reader(dataset: ClipDataset) -> Callable[[int], ClipFrames | BadClip]:
    def read(index: int) -> ClipFrames | BadClip:
        try:
            try:
                return dataset.read_frames(index, 2, only=[1])  # the middle one of those stored
            except ValueError:  # there is only one
                return dataset.read_frames(index, 1)
        except ClipError as error:
            return BadClip(error.video_id, error.reason)

    return read
