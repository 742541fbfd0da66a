"""Video files, decoded on the fly: the seconds of sound and the frames a clip needs."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.data.clip import CLIP_ROWS
from kdcmae_fast.data.media import (
    MIN_SECONDS,
    MediaError,
    MediaOptions,
    Window,
    choose_window,
    finish_waveform,
    fit_picture,
    require_file,
    require_length,
    seconds_of_rows,
)

GAP_SECONDS = 0.05  # a jump of the sound's clock by more is a gap, less is rounding
SEEK_MARGIN = 0.1  # seconds decoded before the wanted sound, for the codec to settle
MICROSECONDS = 1_000_000  # FFmpeg's unit of a container's times


def read_video(path: str, options: MediaOptions, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Waveform (N,) and frame (3, img_size, img_size) of a video file.

    Two draws from `rng`: where the window lies in a file longer than a clip, and which of
    `num_frames` times in the window (the middles of equal parts) the frame is taken at.
    """
    with readable(path) as file:
        sound, picture = media_streams(file)
        window = choose_window(common_seconds(file, sound, picture), options.seconds, rng)
        share = (int(rng.integers(options.num_frames)) + 0.5) / options.num_frames
        waveform, [(_, frame)] = read_parts(file, (sound, picture), window, [share], options)
    return waveform, frame


def read_video_frames(
    path: str,
    options: MediaOptions,
    numbers: Sequence[int] | NDArray[np.int64],
    num_frames: int,
    rng: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Waveform (N,), frames (n, 3, img_size, img_size) and their own times (n,) of a video file.

    The window has at most CLIP_ROWS fbank rows of sound; rng: draws where it lies in a longer file
    (None: at the start). numbers: n of the num_frames frames shown in the middles of equal parts.
    times: seconds from the window's start at which each frame's showing begins.
    """
    with readable(path) as file:
        sound, picture = media_streams(file)
        seconds = seconds_of_rows(max(CLIP_ROWS, options.audio_length))
        stated = common_seconds(file, sound, picture)
        if rng is None:
            window = Window(0.0, seconds if stated is None else min(stated, seconds))
        else:
            window = choose_window(stated, seconds, rng)
        shares = [(float(k) + 0.5) / num_frames for k in numbers]
        waveform, shown = read_parts(file, (sound, picture), window, shares, options)
    times = np.asarray([time - window.start for time, _ in shown], dtype=np.float64)
    return waveform, torch.stack([frame for _, frame in shown]), times


@contextmanager
def readable(path: str) -> Iterator[Any]:
    """The container; what goes wrong in it becomes a MediaError."""
    import av

    require_file(path)
    try:
        with open_video(path) as file:
            yield file
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"cannot decode, truncated or damaged: {reason}") from error


def read_parts(
    container: Any,
    streams: tuple[Any, Any],
    window: Window,
    shares: Sequence[float],
    options: MediaOptions,
) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """The window's sound, and the frames at `shares` of it with their times in the file."""
    sound, picture = streams
    origin = (container.start_time or 0) / MICROSECONDS
    samples = decode_window(container, sound, window, origin)
    waveform = finish_waveform(samples, sound.codec_context.sample_rate, options)
    heard = min(window.seconds, samples.shape[1] / sound.codec_context.sample_rate)
    times = [window.start + share * heard for share in shares]
    order = sorted(range(len(times)), key=times.__getitem__)
    found: dict[int, tuple[float, Tensor]] = {}
    shown = _read_frames(container, picture, [times[place] for place in order], origin)
    for place, (time, pixels) in zip(order, shown, strict=True):
        found[place] = (time, fit_picture(pixels, options.img_size))
    return waveform, [found[place] for place in range(len(times))]


def open_video(path: str) -> Any:
    """The container, for a `with` block; av.FFmpegError when it is none."""
    import av

    # Only local files: a playlist in disguise must not reach the network.
    return av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="ignore")


def media_streams(container: Any) -> tuple[Any, Any]:
    """The first audio stream and the first video stream that is no cover picture."""
    from av.stream import Disposition

    sounds = list(container.streams.audio)
    pictures = [v for v in container.streams.video if not v.disposition & Disposition.attached_pic]
    for kind, streams in (("audio", sounds), ("video", pictures)):
        if not streams:
            raise MediaError(f"no {kind} stream", f"no_{kind}_stream")
        if streams[0].codec_context is None:
            raise MediaError(f"no decoder for the {kind} stream")
        # Loader processes already use the cores; more threads each would fight for them.
        streams[0].codec_context.thread_count = 1
    return sounds[0], pictures[0]


def common_seconds(container: Any, *streams: Any) -> float | None:
    """Seconds that all streams have, as far as the file says; None if it does not."""
    stated = [seconds for seconds in map(stated_seconds, streams) if seconds]
    if not stated and container.duration:
        stated = [container.duration / MICROSECONDS]
    return min(stated, default=None)


def stated_seconds(stream: Any) -> float | None:
    """How long a stream is by its own header, or by the tag that Matroska has instead."""
    if stream.duration:
        return stream.duration * float(stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return None
    hours, minutes, seconds = map(float, tag.groups())
    return 3600 * hours + 60 * minutes + seconds


def decode_window(
    container: Any, stream: Any, window: Window, origin: float
) -> NDArray[np.float32]:
    """(channels, n) float32 at the stream's rate: the window, shorter where the file ends.

    Samples are placed by their time stamps, so sound that starts late or has gaps keeps its place.
    """
    rate = stream.codec_context.sample_rate
    wanted = round(window.seconds * rate)
    samples: NDArray[np.float32] | None = None
    end, heard = 0, 0  # where the last piece ended, in samples from the window's start
    if window.start > 0:
        start = origin + window.start - SEEK_MARGIN
        container.seek(int(start / stream.time_base), stream=stream)
    for time, piece in _sound_pieces(container, stream, sought=window.start > 0):
        if samples is None:
            samples = np.zeros((len(piece), wanted), dtype=np.float32)
            end = round((time - origin - window.start) * rate)
        place = round((time - origin - window.start) * rate)
        place = place if abs(place - end) > GAP_SECONDS * rate else end
        end = place + piece.shape[1]
        first, last = max(place, 0), min(end, wanted)
        if last > first:
            samples[:, first:last] = piece[:, first - place : last - place]
            heard = last
        if end >= wanted:
            break
    if samples is None or heard < MIN_SECONDS * rate:
        found = f"{heard / rate:.2f} s"
        raise MediaError(f"sound is {found} long, less than {MIN_SECONDS} s", "too_short")
    if stated := stated_seconds(stream):
        require_length(heard / rate, min(window.seconds, stated - window.start), "sound")
    return samples[:, :heard]


def _sound_pieces(
    container: Any, stream: Any, *, sought: bool
) -> Iterator[tuple[float, NDArray[np.float32]]]:
    """Decoded pieces: time in seconds, (channels, n) float32 in [-1, 1]."""
    import av

    planar = av.AudioResampler(format="fltp")  # only the number format changes
    begun = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if begun or not sought:
                raise
            continue  # some containers are sought into the middle of a piece
        for part in (part for frame in frames for part in planar.resample(frame)):
            if part.time is not None and part.samples:
                begun = True
                yield part.time, np.asarray(part.to_ndarray(), dtype=np.float32)


def _read_frames(
    container: Any, stream: Any, times: Sequence[float], origin: float
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """The frames shown at `times` seconds, ascending: when each begins, (H, W, 3) upright RGB."""
    container.seek(max(0, int((origin + times[0]) / stream.time_base)), stream=stream)
    shown = None
    missing = list(times)
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        while missing and frame.time > origin + missing[0]:
            yield _upright(shown or frame, stream, missing.pop(0), origin)
        if not missing:
            return
        shown = frame
    for time in missing:
        yield _upright(shown, stream, time, origin)


def _upright(
    shown: Any, stream: Any, time: float, origin: float
) -> tuple[float, NDArray[np.uint8]]:
    """A decoded frame's own time and its picture, checked to be the one at `time` seconds."""
    if shown is None:
        raise MediaError(f"no video frame at {time:.2f} s: truncated or damaged")
    rate = float(stream.average_rate or 1)
    require_length(shown.time - origin + max(3 / rate, 0.5), time, "video")
    if shown.is_corrupt:
        raise MediaError(f"damaged video frame at {time:.2f} s")
    pixels = shown.to_ndarray(format="rgb24")
    return shown.time - origin, np.rot90(pixels, k=round(shown.rotation / 90) % 4)
