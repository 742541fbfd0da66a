"""What a dataset hands over: clips, `ClipError`, the dataset protocol, and its random numbers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SAMPLE_RATE = 16_000  # Hz, of every waveform a dataset returns
FRAME_SHIFT = 160  # samples: 10 ms, one fbank row
FRAME_LENGTH = 400  # samples: 25 ms
CLIP_ROWS = 1024  # fbank rows of a whole clip as published, 10.24 s

# First word of the key of every random draw, so that no two purposes share a stream.
ORDER_STREAM = 1  # epoch orders
FRAME_STREAM = 2  # which frame and which window of a clip
SCENE_STREAM = 3  # what a synthetic clip shows
AUGMENT_STREAM = 4  # what augmentation does to a clip


class Clip(NamedTuple):
    """One clip: its sound and one frame.

    video_id: the clip's name in reports. index: its position in the dataset.
    waveform: (N,) float32 at 16 kHz, in [-1, 1]. frame: (3, H, W) uint8, RGB; (3, 0, 0) of a sound
    without pictures.
    label: class number, the first of its labels; -1 when unknown. classes: the numbers of all.

    With several frames n of one clip and all its sound (`data.pairs`): frame is (n, 3, H, W),
    numbers which frames of the clip they are, times when each is shown, seconds from the
    waveform's start; (n,) both.
    """

    video_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    waveform: Tensor
    frame: Tensor
    label: int
    classes: tuple[int, ...] = ()
    numbers: NDArray[np.int64] | None = None
    times: NDArray[np.float64] | None = None


class ClipFrames(NamedTuple):
    """One clip: all its sound and several of its frames.

    video_id, index, label, classes: as in Clip. waveform: (N,) float32 at 16 kHz, in [-1, 1].
    frames: (T, 3, H, W) uint8, RGB, in the order shown. times: (T,) float64, seconds from the
    waveform's start at which each frame is shown.
    """

    video_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    waveform: Tensor
    frames: Tensor
    times: NDArray[np.float64]
    label: int
    classes: tuple[int, ...] = ()


class ClipError(Exception):
    """A clip that cannot be used. `reason` is one line, for the report."""

    def __init__(self, video_id: str, reason: str) -> None:
        super().__init__(video_id, reason)
        self.video_id = video_id
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.video_id}: {self.reason}"


class TooFewFrames(ValueError):
    """A clip has fewer frames than are asked for; the message has both numbers."""


class ClipDataset(Protocol):
    """Clips by number. `read` is a function of (seed, epoch, index) only.

    Optional, for sampling by label: `label_sets()`, every clip's labels, and `weight_file`, a Path.
    """

    def __len__(self) -> int: ...

    def video_id(self, index: int) -> str:
        """Name of clip `index`; does not touch its files."""
        ...

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as epoch `epoch` sees it; ClipError when it cannot be used."""
        ...

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """All sound of clip `index`, and T = num_frames of its frames, evenly over the clip.

        num_frames: None takes all there are, of clips that are not stored as frames
            data.num_frames. TooFewFrames, a ValueError, for more than there are.
        only: read just these of the T frames (0 ... T - 1).
        epoch: of videos longer than a clip, the window that this epoch sees; None: the start.

        ClipError when the clip cannot be used.
        """
        ...


def pick_frames(
    num_frames: int | None, only: Sequence[int] | None, stored: int, where: str
) -> NDArray[np.int64]:
    """Which of `stored` frames a clip's T = num_frames are: the first of each of T equal parts.

    num_frames: None is all. only: keep just these of the T. where: what the error calls the clip.
    Raises TooFewFrames, and ValueError for numbers that `only` cannot have.
    """
    count = stored if num_frames is None else num_frames
    if count > stored:
        raise TooFewFrames(
            f"num_frames={count}: {where} has {stored} frames; set data.num_frames={stored}, or "
            f"extract {count} (`kdcmae prepare --num-frames {count}`)"
        )
    numbers = np.arange(count) * stored // max(1, count)
    return numbers[checked_numbers(only, count)]


def checked_numbers(only: Sequence[int] | None, num_frames: int) -> NDArray[np.int64]:
    """`only` (None: all) as an array; ValueError unless all are of 0 ... num_frames - 1."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")
    numbers = np.arange(num_frames) if only is None else np.asarray(only, dtype=np.int64)
    if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= num_frames:
        raise ValueError(f"only={only}: need frames of 0 ... {num_frames - 1}")
    return numbers


def keyed_rng(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone, not on what was drawn before."""
    return np.random.default_rng((seed, stream, *key))
