"""Video files that are written: pictures at their times, with sound."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data.clip import SAMPLE_RATE

TICKS = 90_000  # of a video's clock in a second
CODECS = ("libx264", "h264", "mpeg4")
AUDIO_BLOCK = 1024  # samples of an AAC frame


def write_video(
    path: str | Path,
    pictures: Iterable[NDArray[np.uint8]],
    times: NDArray[np.float64],
    waveform: NDArray[np.float32],
) -> Path:
    """An MP4 with each picture shown from its time on, and sound.

    pictures: T of (H, W, 3), H and W even. times: (T,) seconds from the sound's start, rising.
    waveform: (N,) at 16 kHz. H.264 where PyAV has an encoder of it, else MPEG-4; AAC. Folders are
    made. Returns the path; ValueError without an encoder, without a picture or with an odd size.
    """
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = iter(pictures)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one picture")
    height, width = first.shape[:2]
    if height % 2 or width % 2:  # colour is kept at half of it
        raise ValueError(f"{path}: pictures of {width} x {height}: both must be even")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        video, audio = _add_streams(container, _rate(times), height, width)
        for picture, time in zip(chain([first], rest), times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(float(time) * TICKS), Fraction(1, TICKS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for frame in _sound_frames(waveform):
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def _add_streams(container: Any, rate: Fraction, height: int, width: int) -> tuple[Any, Any]:
    import av

    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise ValueError(f"PyAV {av.__version__} here can write none of {', '.join(CODECS)}")
    video = container.add_stream(codec, rate=rate)
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    video.codec_context.time_base = Fraction(1, TICKS)
    if codec == "libx264":
        # With its macroblock tree, small pictures are not coded the same every time.
        video.options = {"crf": "20", "preset": "veryfast", "mbtree": "0"}
    if codec == "mpeg4":  # its clock has 16 bits
        video.codec_context.time_base = 1 / rate
        video.options = {"qmin": "2", "qmax": "4"}
    audio = container.add_stream("aac", rate=SAMPLE_RATE)
    audio.layout = "mono"
    # The default coder is a quarter off in the first tenth of a second, where clips begin at once.
    audio.options = {"aac_coder": "fast"}
    return video, audio


def _sound_frames(waveform: NDArray[np.float32]) -> Any:
    import av

    for first in range(0, len(waveform), AUDIO_BLOCK):
        block = np.ascontiguousarray(waveform[None, first : first + AUDIO_BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, first
        frame.time_base = Fraction(1, SAMPLE_RATE)
        yield frame


def _rate(times: NDArray[np.float64]) -> Fraction:
    """Frames in a second, for the container's header; the time stamps say when each is shown."""
    if len(times) < 2:
        return Fraction(1)
    step = float(np.median(np.diff(times)))
    return Fraction(1 / max(step, 1 / 60)).limit_denominator(1000)
