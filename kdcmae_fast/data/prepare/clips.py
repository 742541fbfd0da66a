"""One input to one clip: its sound at 16 kHz and its frames."""

import math
import os

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data.clip import SAMPLE_RATE
from kdcmae_fast.data.media import (
    MediaError,
    MediaOptions,
    Window,
    decode_sound,
    finish_waveform,
    require_file,
)
from kdcmae_fast.data.prepare.inputs import Input
from kdcmae_fast.data.prepare.pictures import picture_bytes, read_pictures
from kdcmae_fast.data.prepare.settings import PrepareSettings
from kdcmae_fast.data.shards import PreparedClip, Skipped
from kdcmae_fast.data.video import (
    MICROSECONDS,
    common_seconds,
    decode_window,
    media_streams,
    open_video,
)


def make_clip(item: Input, settings: PrepareSettings) -> PreparedClip | Skipped:
    """The clip, or why there is none: whatever is wrong with one input concerns it alone."""
    if item.skip is not None:
        return skipped(item, *item.skip)
    try:
        return _read_files(item, settings) if item.frames else _read_video(item, settings)
    except MediaError as error:
        return skipped(item, error.code, str(error).removeprefix(f"{item.path}: "))
    except Exception as error:
        # Decoders fail in more ways than they document; the type is named, so that it is seen.
        reason = getattr(error, "strerror", None) or str(error)
        detail = f"cannot decode, truncated or damaged: {type(error).__name__}: {reason}"
        return skipped(item, "damaged", detail)


def skipped(item: Input, reason: str, detail: str) -> Skipped:
    """The record of an input that was left out."""
    return Skipped(item.id, item.source, reason, detail, item.labels)


def probe_seconds(path: str) -> float | None:
    """How long a video says it is; None if it does not say or is none."""
    try:
        require_file(path)
        with open_video(path) as file:
            return common_seconds(file, *media_streams(file))
    except Exception:  # the clip itself is tried later and says what is wrong
        return None


def _read_video(item: Input, settings: PrepareSettings) -> PreparedClip:
    require_file(item.path)
    with open_video(item.path) as file:
        sound, picture = media_streams(file)
        origin = (file.start_time or 0) / MICROSECONDS
        window = _window(item, settings, common_seconds(file, sound, picture))
        samples = decode_window(file, sound, window, origin)
        waveform = _finish(samples, sound.codec_context.sample_rate, settings)
    # Opened again instead of sought back: some containers cannot seek to their start.
    with open_video(item.path) as file:
        _, picture = media_streams(file)
        frames, times = read_pictures(file, picture, window, origin, settings)
    return _clip(item, window.start, waveform, frames, times)


def _window(item: Input, settings: PrepareSettings, duration: float | None) -> Window:
    """The part of a video that becomes the clip."""
    seconds = min(settings.seconds, math.inf if item.seconds is None else item.seconds)
    if duration is not None:
        if item.start > 0 and duration <= item.start:
            raise MediaError(
                f"starts at {item.start:g} s, the file ends at {duration:.2f} s", "bad_time_range"
            )
        seconds = min(seconds, duration - item.start)
    if seconds < settings.min_seconds:
        raise _too_short(seconds, settings)
    return Window(item.start, seconds)


def _read_files(item: Input, settings: PrepareSettings) -> PreparedClip:
    """A clip of a manifest: the whole of its sound, its frames as they are."""
    import soundfile

    require_file(item.path)
    seconds = soundfile.info(item.path).duration
    samples, rate = decode_sound(item.path, Window(0.0, seconds), item.path)
    waveform = _finish(samples, rate, settings)
    if os.path.exists(_frame_path(item, settings.num_frames)):
        raise MediaError(f"more than num_frames={settings.num_frames} frames")
    paths = [_frame_path(item, k) for k in range(settings.num_frames)]
    frames = [_fitting_picture(path, settings) for path in paths]
    # When they were shown is not known; the grid says when they should have been.
    count = settings.num_frames
    step = seconds / max(1, count - 1) if settings.grid == "ends" else seconds / count
    return _clip(item, 0.0, waveform, frames, [k * step for k in range(count)])


def _frame_path(item: Input, k: int) -> str:
    return f"{item.frames}/frame_{k}/{item.id}.jpg"


def _fitting_picture(path: str, settings: PrepareSettings) -> bytes:
    """A picture's own bytes when it is a JPEG of the wanted size, else made to fit."""
    from PIL import Image

    require_file(path)
    with open(path, "rb") as file, Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
        small = min(image.size) == settings.img_size
        square = settings.crop == "none" or image.width == image.height
        if image.format == "JPEG" and image.mode == "RGB" and small and square:
            file.seek(0)
            return file.read()
    return picture_bytes(pixels, settings)


def _finish(
    samples: NDArray[np.float32], rate: int, settings: PrepareSettings
) -> NDArray[np.float32]:
    if samples.shape[1] < settings.min_seconds * rate:
        raise _too_short(samples.shape[1] / rate, settings)
    options = MediaOptions(
        audio_length=1,
        img_size=settings.img_size,
        num_frames=settings.num_frames,
        channel="mean" if settings.channel == "mean" else "first",
        reject_silence=not settings.keep_silent,
    )
    return finish_waveform(samples, rate, options).numpy()


def _too_short(seconds: float, settings: PrepareSettings) -> MediaError:
    return MediaError(f"{seconds:.2f} s, less than {settings.min_seconds:g} s", "too_short")


def _clip(
    item: Input,
    start: float,
    waveform: NDArray[np.float32],
    frames: list[bytes],
    times: list[float],
) -> PreparedClip:
    seconds = round(len(waveform) / SAMPLE_RATE, 6)
    return PreparedClip(
        item.id, item.source, start, seconds, frames, times, waveform, labels=item.labels
    )
