"""What a dataset hands over: `Clip`, `ClipError`, the dataset protocol, and its random numbers."""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

SAMPLE_RATE = 16_000  # Hz, of every waveform a dataset returns
FRAME_SHIFT = 160  # samples: 10 ms, one fbank row
FRAME_LENGTH = 400  # samples: 25 ms

# First word of the key of every random draw, so that no two purposes share a stream.
ORDER_STREAM = 1  # epoch orders
FRAME_STREAM = 2  # which frame and which window of a clip
SCENE_STREAM = 3  # what a synthetic clip shows
AUGMENT_STREAM = 4  # what augmentation does to a clip


class Clip(NamedTuple):
    """One clip: its sound and one frame.

    video_id: the clip's name in reports. index: its position in the dataset.
    waveform: (N,) float32 at 16 kHz, in [-1, 1]. frame: (3, H, W) uint8, RGB.
    label: class number, the first of its labels; -1 when unknown. classes: the numbers of all.
    """

    video_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    waveform: Tensor
    frame: Tensor
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


def keyed_rng(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone, not on what was drawn before."""
    return np.random.default_rng((seed, stream, *key))
