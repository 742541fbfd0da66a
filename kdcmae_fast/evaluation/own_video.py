"""A person's own video file as a clip: its sound, and T frames with the times they are shown at."""

import os

import numpy as np
import torch

from kdcmae_fast.data.clip import ClipError, ClipFrames
from kdcmae_fast.data.media import MediaError, MediaOptions, Window
from kdcmae_fast.data.video import common_seconds, media_streams, read_parts, readable


def read_video_clip(
    path: str | os.PathLike[str],
    options: MediaOptions,
    *,
    num_frames: int,
    start: float = 0.0,
    seconds: float,
    index: int = 0,
) -> ClipFrames:
    """Sound at 16 kHz and `num_frames` frames of a stretch of a video file.

    The frames are those shown in the middle of equal parts of the stretch; their times are their
    own, so a frame may come twice from a video of few frames. start, seconds: the stretch, as far
    as the file goes.

    Errors: ClipError with one line for what cannot be used: a damaged file, one without a picture
    or without sound (a sound file with a cover has no picture), silence, too little of it.
    """
    name = os.fspath(path)
    try:
        with readable(name) as file:
            streams = media_streams(file)
            window = _window(common_seconds(file, *streams), start, seconds)
            shares = [(k + 0.5) / num_frames for k in range(num_frames)]
            waveform, shown = read_parts(file, streams, window, shares, options)
    except MediaError as error:
        raise ClipError(name, str(error)) from error
    times = np.array([time - window.start for time, _ in shown])
    frames = torch.stack([frame for _, frame in shown])
    return ClipFrames(name, index, waveform, frames, times, -1)


def _window(duration: float | None, start: float, seconds: float) -> Window:
    if duration is None:
        return Window(start, seconds)
    if start >= duration:
        raise MediaError(f"it is {duration:.2f} s long: nothing from {start:g} s on", "too_short")
    return Window(start, min(duration - start, seconds))
