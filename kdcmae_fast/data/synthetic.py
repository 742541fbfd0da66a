"""Synthetic clips: a moving, coloured shape and the sound it makes, with the truth known.

The shape's kind (the class, with its surface pattern) fixes the sound's timbre, its size the base
pitch (small is high), its hue the tremolo rate (red 2 Hz to violet 16 Hz), its height in the
picture bends the pitch (by up to a third of an octave) and its horizontal place sets the level
(right is loud). It throws coloured light around itself, strong light where it is loud. Grey, plain
shapes on the cluttered background are silent. Sound and picture are functions of (seed, clip
number) and of time; tremolo begins with a crest.
"""

import colorsys
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdcmae_fast.data.clip import (
    FRAME_SHIFT,
    FRAME_STREAM,
    SAMPLE_RATE,
    SCENE_STREAM,
    Clip,
    ClipFrames,
    checked_numbers,
    keyed_rng,
)
from kdcmae_fast.data.shapes import SHAPES, draw, pixel_box

HELDOUT_CLIPS = 1000
HELDOUT_START = 2**40  # scene numbers from here on are never trained on
CLASS_NAMES = tuple(shape.name for shape in SHAPES)

RADIUS = (0.14, 0.40)  # of the picture's side
PITCH = (120.0, 1500.0)  # Hz, of the largest and the smallest shape
TREMOLO = (2.0, 16.0)  # Hz
MAX_HUE = 0.8  # red, yellow, green, blue, violet; red does not come back
BEND = 0.35  # octaves, pitch at the top of the picture over pitch at its middle
LEVELS = (-32.0, -2.0)  # dB, at the left and right edge
TREMOLO_DEPTH = 0.9
GLOW = (0.2, 1.0)  # strength of the light next to the shape where it is soft and loud
GLOW_REACH = 3.0  # radii
HUM = 0.02  # steady noise that goes with every tone, as a share of its peak

_CYCLES = 4  # of the base pitch in a wavetable, so that partials lie at multiples of 1/4
_TABLE = 16384

# Partials of each class: (multiple of the pitch, amplitude), in the order of SHAPES.
_PARTIALS: tuple[tuple[tuple[float, float], ...], ...] = (
    ((1, 1.0),),  # pure tone
    tuple((k, 1 / k) for k in range(1, 14, 2)),  # hollow: odd harmonics
    tuple((k, 1 / k) for k in range(1, 15)),  # saw: all harmonics
    ((1, 1.0), (2.75, 0.8), (5.5, 0.6), (8.75, 0.4)),  # bell
    ((1, 0.5), *((k, 0.6) for k in range(7, 12))),  # nasal: a high formant
    ((0.5, 0.8), (1, 1.0), (1.5, 0.6), (2, 0.2)),  # dull, with a sub-octave
    ((1, 1.0), (2, 0.9), (4, 0.8), (8, 0.7)),  # organ: octaves
    ((1, 0.6), (1.25, 0.6), (1.5, 0.6), (3, 0.3), (3.75, 0.3), (4.5, 0.3)),  # chord
)


@dataclass(frozen=True)
class Scene:
    """What one synthetic clip shows and plays; positions are shares of the picture's side.

    label: class number. radius, hue (0..1): of the sounding shape. center, swing, rate (Hz), phase:
    its path, x and y each, center + swing * sin(2 pi (rate t + phase)).
    """

    label: int
    radius: float
    hue: float
    center: tuple[float, float]
    swing: tuple[float, float]
    rate: tuple[float, float]
    phase: tuple[float, float]

    @property
    def class_name(self) -> str:
        """Name of the shape."""
        return CLASS_NAMES[self.label]

    @property
    def base_pitch(self) -> float:
        """Hz, at half height; falls with the logarithm of the size."""
        share = np.log(self.radius / RADIUS[0]) / np.log(RADIUS[1] / RADIUS[0])
        return float(PITCH[1] * (PITCH[0] / PITCH[1]) ** share)

    @property
    def tremolo(self) -> float:
        """Hz."""
        return float(TREMOLO[0] * (TREMOLO[1] / TREMOLO[0]) ** (self.hue / MAX_HUE))

    def position(self, times: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """x (rightwards) and y (downwards) of the shape's middle at `times` in seconds."""
        t = np.asarray(times, dtype=np.float64)
        x, y = (
            c + s * np.sin(2 * np.pi * (r * t + p))
            for c, s, r, p in zip(self.center, self.swing, self.rate, self.phase, strict=True)
        )
        return x, y

    def pitch(self, times: ArrayLike) -> NDArray[np.float64]:
        """Hz at `times` in seconds: the base pitch bent by the height."""
        return self.base_pitch * 2 ** (2 * BEND * (0.5 - self.position(times)[1]))

    def level(self, times: ArrayLike) -> NDArray[np.float64]:
        """Peak amplitude at `times` in seconds, tremolo aside: set by the horizontal place."""
        decibel = LEVELS[0] + (LEVELS[1] - LEVELS[0]) * self.position(times)[0]
        return 10 ** (decibel / 20)

    def box(self, time: float, size: int) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the sounding shape at `time`, in pixels of a `size` px picture."""
        x, y = self.position(time)
        center = (float(x) * size, float(y) * size)
        return pixel_box(SHAPES[self.label], center, self.radius * size, size)


def scene_of(
    draws: NDArray[np.float64],
    *,
    other_than: int | None = None,
    places: tuple[float, float] = (0.3, 0.4),
) -> Scene:
    """The scene that 11 numbers in [0, 1) make.

    other_than: a class that it is not. places: where the middle of its path lies, the lowest share
    of the picture's side and how far beyond.
    """
    lowest, highest = np.log(RADIUS)
    first, width = places
    label = int(draws[0] * len(SHAPES))
    if other_than is not None:
        label = (other_than + 1 + int(draws[0] * (len(SHAPES) - 1))) % len(SHAPES)
    return Scene(
        label=label,
        radius=float(np.exp(lowest + (highest - lowest) * draws[1])),
        hue=float(MAX_HUE * draws[2]),
        center=(first + width * float(draws[3]), first + width * float(draws[4])),
        swing=(0.05 + 0.1 * float(draws[5]), 0.05 + 0.1 * float(draws[6])),
        rate=(0.1 + 0.4 * float(draws[7]), 0.1 + 0.4 * float(draws[8])),
        phase=(float(draws[9]), float(draws[10])),
    )


class SyntheticClips:
    """Clips made from (seed, number); the held-out ones are made from other numbers.

    num_clips: size. img_size: pixels. clip_seconds: length of the sound. num_frames: the times a
    frame may be taken at are the middles of so many equal parts of the clip. first: number of clip
    0; HELDOUT_START for the held-out clips.
    """

    def __init__(
        self,
        num_clips: int,
        *,
        seed: int,
        img_size: int,
        clip_seconds: float,
        num_frames: int = 10,
        first: int = 0,
    ) -> None:
        if min(num_clips, img_size, num_frames) < 1 or clip_seconds < 0.4 or seed < 0:
            raise ValueError(
                f"num_clips={num_clips}, img_size={img_size} and num_frames={num_frames} must be "
                f"at least 1, clip_seconds={clip_seconds} at least 0.4 and seed={seed} at least 0"
            )
        self.num_clips = num_clips
        self.seed = seed
        self.img_size = img_size
        self.num_samples = round(clip_seconds * SAMPLE_RATE)
        self.clip_seconds = clip_seconds
        self.num_frames = num_frames
        self.first = first

    def __len__(self) -> int:
        return self.num_clips

    def video_id(self, index: int) -> str:
        """Name of clip `index`."""
        kind = "heldout" if self.first >= HELDOUT_START else "train"
        return f"synthetic_{kind}_{index:06d}"

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index`, with the frame that `epoch` draws."""
        time = self.frame_time(index, epoch)
        return Clip(
            self.video_id(index),
            index,
            self.waveform(index),
            self.frames(index, [time])[0],
            self.truth(index).label,
            self.classes(index),
        )

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """All sound and frames of clip `index`; see ClipDataset. None is data.num_frames."""
        count = self.num_frames if num_frames is None else num_frames
        numbers = checked_numbers(only, count)
        times = np.asarray(self.frame_times(count))[numbers]
        return ClipFrames(
            self.video_id(index),
            index,
            self.waveform(index),
            self.frames(index, times.tolist()),
            times,
            self.truth(index).label,
            self.classes(index),
        )

    def frame_times(self, num_frames: int | None = None) -> list[float]:
        """Seconds at which frames may be taken; None is data.num_frames."""
        count = self.num_frames if num_frames is None else num_frames
        return [(k + 0.5) * self.clip_seconds / count for k in range(count)]

    def frame_time(self, index: int, epoch: int) -> float:
        """Time in seconds of the frame that `read(index, epoch)` returns."""
        rng = keyed_rng(self.seed, FRAME_STREAM, epoch, self._number(index))
        return self.frame_times()[int(rng.integers(self.num_frames))]

    def truth(self, index: int) -> Scene:
        """What clip `index` shows and plays."""
        return scene_of(keyed_rng(self.seed, SCENE_STREAM, self._number(index), 0).random(11))

    def classes(self, index: int) -> tuple[int, ...]:
        """Class numbers beside the label's; none here."""
        return ()

    def scenes_at(self, index: int, times: list[float]) -> list[Scene]:
        """What is shown at each of `times` in seconds."""
        return [self.truth(index)] * len(times)

    def waveform(self, index: int) -> Tensor:
        """(N,) float32 at 16 kHz, the sound of clip `index`."""
        return torch.from_numpy(self._sound(index))

    def frames(self, index: int, times: Sequence[float]) -> Tensor:
        """(len(times), 3, H, W) uint8: clip `index` at each of `times` in seconds."""
        scenes = self.scenes_at(index, list(times))
        rng = keyed_rng(self.seed, SCENE_STREAM, self._number(index), 1)
        backdrop = _backdrop(rng, self.img_size)
        silent = rng.random((int(rng.integers(2, 5)), 9))
        size = self.img_size
        pictures = np.empty((len(times), size, size, 3), dtype=np.uint8)
        for picture, time, scene in zip(pictures, times, scenes, strict=True):
            color = np.array(colorsys.hsv_to_rgb(scene.hue, 0.95, 1.0), dtype=np.float32)
            canvas = backdrop.copy()
            for kind, radius, grey, cx, cy, sx, sy, rate, phase in silent:
                turn = np.sin(2 * np.pi * (0.5 * rate * time + phase))
                draw(
                    canvas,
                    SHAPES[int(kind * len(SHAPES))],
                    ((cx + 0.3 * (sx - 0.5) * turn) * size, (cy + 0.3 * (sy - 0.5) * turn) * size),
                    (0.6 + 1.2 * radius) * RADIUS[0] * size,
                    np.full(3, 0.15 + 0.7 * grey, dtype=np.float32),
                )
            x, y = scene.position(time)
            center = (float(x) * size, float(y) * size)
            glow = GLOW[0] + (GLOW[1] - GLOW[0]) * float(x)
            _shine(canvas, center, GLOW_REACH * scene.radius * size, glow, color)
            draw(canvas, SHAPES[scene.label], center, scene.radius * size, color, patterned=True)
            np.multiply(canvas, 255, out=picture, casting="unsafe")
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def _number(self, index: int) -> int:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of {self.num_clips}")
        return self.first + index

    def _sound(self, index: int) -> NDArray[np.float32]:
        turn = keyed_rng(self.seed, SCENE_STREAM, self._number(index), 2).random()
        return self._play(self.truth(index), turn, self.num_samples)

    @staticmethod
    def _play(
        scene: Scene, turn: float, num_samples: int, start: float = 0.0, *, tremolo: bool = True
    ) -> NDArray[np.float32]:
        """Wavetable synthesis: pitch and level are set every 10 ms and run straight between.

        turn: where in a period the wave begins. start: seconds, of the first sample.
        """
        knots = start + np.arange(0, num_samples + FRAME_SHIFT, FRAME_SHIFT) / SAMPLE_RATE
        pitch = scene.pitch(knots)
        ramp = _ramp(pitch * (_TABLE / _CYCLES / SAMPLE_RATE), num_samples)
        place = (np.cumsum(ramp, dtype=np.float64) + turn * _TABLE).astype(np.int64)
        place &= _TABLE - 1
        sound = _wavetable(scene.label, float(pitch.max())).take(place)
        sound += np.resize(_hum(), num_samples)
        sound *= _ramp(scene.level(knots), num_samples)
        if not tremolo:
            return sound
        beat = np.arange(num_samples, dtype=np.float32)
        beat *= np.float32(2 * np.pi * scene.tremolo / SAMPLE_RATE)
        np.cos(beat, out=beat)
        beat *= TREMOLO_DEPTH / 2
        beat += 1 - TREMOLO_DEPTH / 2
        sound *= beat
        return sound


def _ramp(knots: NDArray[np.float64], num_samples: int) -> NDArray[np.float32]:
    """Straight lines through values given every 10 ms."""
    share = np.arange(FRAME_SHIFT, dtype=np.float32) / FRAME_SHIFT
    values = knots.astype(np.float32)
    lines = np.diff(values)[:, None] * share + values[:-1, None]
    return lines.astype(np.float32, copy=False).reshape(-1)[:num_samples]


@functools.lru_cache(maxsize=1)
def _hum() -> NDArray[np.float32]:
    """One 10 ms period of noise: repeated, its filterbank is the same in every row, so tremolo and
    level show in all bins."""
    noise: NDArray[np.float32]
    noise = keyed_rng(0, SCENE_STREAM).standard_normal(FRAME_SHIFT, dtype=np.float32)
    noise *= HUM
    return noise


@functools.cache
def _wavetable_of(label: int, num_partials: int) -> NDArray[np.float32]:
    """(_TABLE,) _CYCLES periods of a class's first partials, peak 1."""
    angle = np.arange(_TABLE) * (2 * np.pi / _TABLE)
    table = sum(a * np.sin(round(k * _CYCLES) * angle) for k, a in _PARTIALS[label][:num_partials])
    return (table / np.abs(table).max()).astype(np.float32)


def _wavetable(label: int, highest_pitch: float) -> NDArray[np.float32]:
    """The class's timbre without the partials that would pass 7.5 kHz."""
    return _wavetable_of(label, sum(k * highest_pitch < 7500 for k, _ in _PARTIALS[label]))


def _shine(
    canvas: NDArray[np.float32],
    center: tuple[float, float],
    reach: float,
    strength: float,
    color: NDArray[np.float32],
) -> None:
    """Coloured light that the shape throws around itself; `reach` in pixels."""
    x, y = (((np.arange(len(canvas)) + 0.5 - c) / reach) ** 2 for c in center)
    light = (np.exp(-x)[None] * np.exp(-y)[:, None]).astype(np.float32)[..., None]
    canvas *= 1 - strength * light * (1 - color)


def _backdrop(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """(size, size, 3) in 0..1: a soft, dull colour gradient under grey-brown bars and noise."""
    corners = (0.15 + 0.45 * rng.random((2, 2, 3))).astype(np.float32)
    corners = 0.7 * corners.mean(2, keepdims=True) + 0.3 * corners
    share = np.linspace(0, 1, size, dtype=np.float32)
    rows = np.stack([1 - share, share], 1)
    canvas = np.einsum("ya,xb,abc->yxc", rows, rows, corners, optimize=True)
    for x, y, width, height, *color in rng.random((6, 7)):
        x0, y0 = int(x * size), int(y * size)
        x1, y1 = x0 + int((0.1 + 0.4 * width) * size), y0 + int((0.05 + 0.2 * height) * size)
        shade = 0.2 + 0.5 * float(color[0])
        tint = np.array(color, dtype=np.float32)
        canvas[y0:y1, x0:x1] = 0.5 * canvas[y0:y1, x0:x1] + 0.5 * (0.9 * shade + 0.1 * tint)
    grain = rng.random((size, size, 1), dtype=np.float32)
    canvas += 0.08 * (grain - 0.5)
    return np.ascontiguousarray(canvas, dtype=np.float32)
