"""Which frames of a video a clip keeps: the published extraction grids."""

import re

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-5  # seconds; times are fractions in float


def parse_grid(text: str) -> tuple[str, float]:
    """("seconds", 0), ("ends", 0), ("fps", R) or ("stride", N) of `seconds`, `fps:R` and so on.

    seconds: the first frames of num_frames equal parts, as CAV-MAE takes them (10 at 1 s).
    ends: evenly from the first to the last frame, as CAV-MAE Sync takes them.
    fps:R: the frame shown at k / R seconds, as XKD takes them.
    stride:N: every N-th frame, as VideoMAE takes them.
    """
    if text in ("seconds", "ends"):
        return text, 0.0
    if match := re.fullmatch(r"fps:(\d+(?:\.\d+)?)|stride:(\d+)", text):
        value = float(match[1] or match[2])
        if value > 0:
            return ("fps" if match[1] else "stride"), value
    raise ValueError(f"--grid {text} must be seconds, ends, fps:RATE or stride:NUMBER")


def choose_frames(
    grid: str, num_frames: int, times: NDArray[np.float64], rate: float, seconds: float
) -> NDArray[np.int64]:
    """Numbers of the frames to keep, ascending; a number is repeated where frames are too few.

    times: (n,) when each frame of the clip is shown, ascending, seconds from the clip's start.
    rate: average frames a second. seconds: longest clip. grids seconds and ends: exactly
    `num_frames`; fps and stride: at most, as far as the clip goes.
    """
    kind, value = parse_grid(grid)
    count = len(times)
    k = np.arange(num_frames)
    if kind == "seconds":
        return k * max(1, min(count, int(seconds * rate + ROUNDING))) // num_frames
    if kind == "ends":
        return k * (count - 1) // max(1, num_frames - 1)
    if kind == "stride":
        return np.arange(0, count, int(value))[:num_frames]
    wanted = k / value
    wanted = wanted[wanted < times[-1] + 1 / rate - ROUNDING]
    shown = np.searchsorted(times, wanted + ROUNDING, side="right") - 1
    return np.maximum(shown, 0)
