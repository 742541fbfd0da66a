"""Several frames of a clip, each to be paired with the sound around it (CAV-MAE Sync)."""

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data.clip import (
    FRAME_STREAM,
    Clip,
    ClipDataset,
    ClipError,
    TooFewFrames,
    keyed_rng,
)

LOOKED_AT = 20  # clips, before a run starts
DRAW = 1  # last word of the key, so that the draw is not that of a long video's window


def drawn_frames(
    index: int, epoch: int, *, seed: int, num_frames: int, frames_per_clip: int
) -> NDArray[np.int64]:
    """The n = frames_per_clip distinct frames of num_frames that `epoch` takes of clip `index`.

    In random order; with fewer of them they are the first of those with more.
    """
    rng = keyed_rng(seed, FRAME_STREAM, epoch, index, DRAW)
    return rng.permutation(num_frames)[:frames_per_clip]


def read_pairs(
    dataset: ClipDataset,
    index: int,
    epoch: int,
    *,
    seed: int,
    num_frames: int,
    frames_per_clip: int,
) -> Clip:
    """All sound of clip `index`, read once, and the frames of it that `epoch` draws.

    ClipError when the clip cannot be used, also for one with fewer than num_frames frames.
    """
    numbers = drawn_frames(
        index, epoch, seed=seed, num_frames=num_frames, frames_per_clip=frames_per_clip
    )
    try:
        clip = dataset.read_frames(index, num_frames, only=numbers.tolist(), epoch=epoch)
    except TooFewFrames as error:
        raise ClipError(dataset.video_id(index), str(error)) from error
    return Clip(
        clip.video_id,
        index,
        clip.waveform,
        clip.frames,
        clip.label,
        clip.classes,
        numbers,
        clip.times,
    )


def check_stored_frames(dataset: ClipDataset, num_frames: int) -> None:
    """ValueError when the first clips have fewer than num_frames frames; before work starts.

    Clips without any are left to the count of bad clips. Videos and synthetic clips have any
    number.
    """
    count = getattr(dataset, "stored_frames", None)
    if count is None:
        return
    stored = max(count(index) for index in range(min(LOOKED_AT, len(dataset))))
    if 0 < stored < num_frames:
        layout = ", as CAV-MAE's preparation makes them" if stored == 10 else ""
        raise ValueError(
            f"data.num_frames={num_frames}: the clips have {stored} frames{layout}; set "
            f"data.num_frames={stored}, or extract {num_frames} from the videos: kdcmae prepare "
            f"VIDEOS --output DIR --preset cav_mae_sync --num-frames {num_frames}"
        )
