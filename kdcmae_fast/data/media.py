"""Sound files and pictures, and what every clip's sound and frame must pass through."""

import os
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.config import DataConfig, ModelConfig
from kdcmae_fast.data.clip import FRAME_LENGTH, FRAME_SHIFT, SAMPLE_RATE
from kdcmae_fast.data.resample import resample

MIN_SECONDS = 0.4  # of sound; less is no clip
SILENCE_PEAK = 2.0**-14  # two steps of 16-bit sound: nothing louder is digital silence
MISSING_SECONDS = 0.5  # a stream that ends this much before its stated end is truncated


class MediaError(Exception):
    """A file that cannot be used; the message is one line without the clip's name.

    code: the kind of trouble, for counts: damaged, missing, empty_file, too_short, silent,
    no_audio_stream, no_video_stream or bad_time_range.
    """

    def __init__(self, message: str, code: str = "damaged") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class MediaOptions:
    """How a file becomes a clip.

    audio_length: fbank rows of a clip. img_size: pixels. num_frames: frames to choose from.
    channel, reject_silence: as in DataConfig. min_seconds: of sound; less is no clip.
    """

    audio_length: int
    img_size: int
    num_frames: int
    channel: Literal["first", "mean"]
    reject_silence: bool
    min_seconds: float = MIN_SECONDS

    @classmethod
    def of(cls, data: DataConfig, model: ModelConfig) -> "MediaOptions":
        """From a run's settings."""
        if data.num_frames < 1:
            raise ValueError(f"num_frames={data.num_frames} must be at least 1")
        return cls(
            audio_length=model.audio_length,
            img_size=model.img_size,
            num_frames=data.num_frames,
            channel=data.channel,
            reject_silence=data.reject_silence,
        )

    @property
    def seconds(self) -> float:
        """Longest sound a clip uses: just enough for `audio_length` rows."""
        return seconds_of_rows(self.audio_length)


@dataclass(frozen=True)
class Window:
    """The part of a file a clip is made of, in seconds from its start."""

    start: float
    seconds: float


def seconds_of_rows(rows: int) -> float:
    """Seconds of sound that `rows` fbank rows need."""
    return (FRAME_LENGTH + (rows - 1) * FRAME_SHIFT) / SAMPLE_RATE


def choose_window(duration: float | None, seconds: float, rng: np.random.Generator) -> Window:
    """A stretch of at most `seconds`, anywhere in `duration` (None: unknown, then at the start).

    Draws one number from `rng` in every case, so that later draws do not depend on the duration.
    """
    share = float(rng.random())
    if duration is None:
        return Window(0.0, seconds)
    return Window(share * max(0.0, duration - seconds), min(duration, seconds))


def nearest_frame(times: NDArray[np.floating], window: Window, rng: np.random.Generator) -> int:
    """One of the frames taken within the window (of the nearest one, if there are none)."""
    inside = np.flatnonzero((times >= window.start) & (times < window.start + window.seconds))
    share = float(rng.random())
    if not len(inside):
        return int(np.abs(times - window.start - window.seconds / 2).argmin())
    return int(inside[int(share * len(inside))])


def require_file(path: str) -> None:
    """MediaError unless `path` is a file with something in it."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}", "missing") from error
    if not os.path.isfile(path):
        raise MediaError(f"{path}: not a file", "missing")
    if size == 0:
        raise MediaError(f"{path}: empty file (0 bytes)", "empty_file")


def read_sound(
    path: str, options: MediaOptions, rng: np.random.Generator | None
) -> tuple[Tensor, Window, float]:
    """Sound of a wav, flac or other file libsndfile reads: waveform, its window, file's seconds.

    rng: draws the window; None: the whole file.
    """
    import soundfile

    require_file(path)
    try:
        with soundfile.SoundFile(path) as file:
            duration = file.frames / file.samplerate
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"{path}: cannot decode the sound: {error}") from error
    window = Window(0.0, duration)
    if rng is not None:
        window = choose_window(duration, options.seconds, rng)
    samples, rate = decode_sound(path, window, path)
    return finish_waveform(samples, rate, options), window, duration


def decode_sound(
    file: str | BinaryIO, window: Window, where: str
) -> tuple[NDArray[np.float32], int]:
    """(channels, n) float32 of the window of a sound file, and its rate in Hz.

    where: what errors call the file.
    """
    import soundfile

    try:
        with soundfile.SoundFile(file) as sound:
            rate = sound.samplerate
            first, wanted = round(window.start * rate), round(window.seconds * rate)
            sound.seek(first)
            samples = sound.read(wanted, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"{where}: cannot decode the sound: {error}") from error
    require_length(len(samples) / rate, wanted / rate, "sound")
    return samples.T, rate


def require_length(found: float, stated: float, what: str) -> None:
    """MediaError when a stream is truncated: `found` seconds where the file states `stated`."""
    if found < stated - MISSING_SECONDS or found < 0.5 * stated:
        raise MediaError(f"{what} ends after {found:.2f} s of {stated:.2f} s: truncated or damaged")


def finish_waveform(samples: NDArray[np.float32], rate: int, options: MediaOptions) -> Tensor:
    """(channels, n) at `rate` Hz -> (N,) at 16 kHz; MediaError for what is no sound."""
    mono = samples[0] if options.channel == "first" else samples.mean(0)
    if len(mono) < options.min_seconds * rate:
        found = f"{len(mono) / rate:.2f} s"
        raise MediaError(f"sound is {found} long, less than {options.min_seconds} s", "too_short")
    low, high = mono.min(), mono.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise MediaError("sound has values that are not numbers")
    if options.reject_silence and max(high - mono.mean(), mono.mean() - low) <= SILENCE_PEAK:
        raise MediaError("digital silence", "silent")
    waveform = torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
    return resample(waveform, rate, SAMPLE_RATE)


def read_picture(path: str, img_size: int) -> Tensor:
    """(3, img_size, img_size) uint8 of an image file."""
    require_file(path)
    return decode_picture(path, img_size, path)


def decode_picture(file: str | BinaryIO, img_size: int, where: str) -> Tensor:
    """(3, img_size, img_size) uint8 of a picture; errors call it `where`."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return fit_picture(np.asarray(image.convert("RGB")), img_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{where}: cannot decode the picture: {error}") from error


def fit_picture(pixels: NDArray[np.uint8], img_size: int) -> Tensor:
    """(H, W, 3) -> (3, img_size, img_size): short side to img_size (bicubic), centre crop."""
    from PIL import Image

    height, width = pixels.shape[:2]
    if height == width == img_size:
        return _channels_first(pixels)
    scale = img_size / min(height, width)
    size = max(img_size, round(width * scale)), max(img_size, round(height * scale))
    image = Image.fromarray(pixels)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - img_size) // 2, (size[1] - img_size) // 2
    crop = np.asarray(image)[top : top + img_size, left : left + img_size]
    return _channels_first(crop)


def stretched_picture(path: str, img_size: int) -> Tensor:
    """(3, img_size, img_size) uint8 of all of an image file, whatever its aspect (bicubic)."""
    from PIL import Image

    require_file(path)
    try:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((img_size, img_size), Image.Resampling.BICUBIC)
            return _channels_first(np.asarray(square))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot decode the picture: {error}") from error


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
