"""A person's own video file as a clip: its sound, and T frames with the times they are shown at."""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcmae_fast.data.clip import ClipError, ClipFrames
from kdcmae_fast.data.media import (
    MediaError,
    MediaOptions,
    Window,
    finish_waveform,
    fit_picture,
    require_file,
    require_length,
)
from kdcmae_fast.data.video import (
    MICROSECONDS,
    common_seconds,
    decode_window,
    media_streams,
    open_video,
)


def read_video_clip(
    path: str | os.PathLike[str],
    options: MediaOptions,
    *,
    num_frames: int,
    start: float = 0.0,
    seconds: float | None = None,
    index: int = 0,
) -> ClipFrames:
    """Sound at 16 kHz and `num_frames` frames of a stretch of a video file.

    The frames are those shown in the middle of equal parts of the stretch; their times are their
    own, so a frame may come twice from a video of few frames. start, seconds: the stretch, as far
    as the file goes (None: to its end).

    Errors: ClipError with one line for what cannot be used: a damaged file, one without a picture
    or without sound (a sound file with a cover has no picture), silence, too little of it.
    """
    import av

    name = os.fspath(path)
    try:
        require_file(name)
        with open_video(name) as file:
            sound, picture = media_streams(file)
            origin = (file.start_time or 0) / MICROSECONDS
            window = _window(common_seconds(file, sound, picture), start, seconds)
            samples = decode_window(file, sound, window, origin)
            rate = sound.codec_context.sample_rate
            waveform = finish_waveform(samples, rate, options)
            heard = samples.shape[1] / rate
            wanted = (np.arange(num_frames) + 0.5) / num_frames * heard
            pictures, times = _read_frames(file, picture, window.start + wanted, origin)
        frames = [fit_picture(pixels, options.img_size) for pixels in pictures]
    except MediaError as error:
        raise ClipError(name, str(error)) from error
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(name, f"cannot decode, truncated or damaged: {reason}") from error
    return ClipFrames(name, index, waveform, torch.stack(frames), times - window.start, -1)


def _window(duration: float | None, start: float, seconds: float | None) -> Window:
    if duration is None:
        if seconds is None:
            raise MediaError("the file does not say how long it is; give the seconds to take")
        return Window(start, seconds)
    if start >= duration:
        raise MediaError(f"it is {duration:.2f} s long: nothing from {start:g} s on", "too_short")
    return Window(start, min(duration - start, duration if seconds is None else seconds))


def _read_frames(
    container: Any, stream: Any, wanted: NDArray[np.float64], origin: float
) -> tuple[list[NDArray[np.uint8]], NDArray[np.float64]]:
    """Upright (H, W, 3) RGB frames shown at `wanted`, ascending seconds, and when each began."""
    container.seek(max(0, int((origin + wanted[0]) / stream.time_base)), stream=stream)
    found: list[NDArray[np.uint8]] = []
    times: list[float] = []
    shown: Any = None

    def take(frame: Any) -> None:
        if frame.is_corrupt:
            raise MediaError(f"damaged video frame at {frame.time - origin:.2f} s")
        pixels = frame.to_ndarray(format="rgb24")
        found.append(np.rot90(pixels, k=round(frame.rotation / 90) % 4))
        times.append(max(frame.time - origin, 0.0))

    for frame in container.decode(stream):
        if frame.time is None:
            continue
        while len(found) < len(wanted) and frame.time - origin > wanted[len(found)]:
            take(frame if shown is None else shown)
        if len(found) == len(wanted):
            return found, np.array(times)
        shown = frame
    if shown is None:
        raise MediaError(f"no video frame from {wanted[0]:.2f} s on: truncated or damaged")
    rate = float(stream.average_rate or 1)
    require_length(shown.time - origin + max(3 / rate, 0.5), float(wanted[-1]), "video")
    while len(found) < len(wanted):
        take(shown)
    return found, np.array(times)
