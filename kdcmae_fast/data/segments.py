"""Segments of a clip's fbank, one per frame (CAV-MAE Sync, arXiv 2505.01237).

B clips, T frames and so T segments of each, S fbank rows of 10 ms, F mel bins. A segment is
`length` rows around the moment of its frame; near the ends of a clip it stays inside, so that
neighbouring frames share segments there.
"""

import torch
from torch import Tensor

ROWS_PER_SECOND = 100


def segment_starts(num_frames: int, length: int, rows: int = 1024) -> tuple[int, ...]:
    """First rows of the T segments on the published time base ("compatible").

    Frame i is taken to be at row i * rows / T, rounded half to even, of the fbank as it is padded:
    with 1024 rows and 16 frames 0.64 s apart, whatever the clip's duration is.

    rows: S. length: at most `rows`, a multiple of 16. Errors: ValueError naming the number.
    """
    _check(num_frames, length, rows)
    return tuple(
        _inside(round(frame * rows / num_frames) - length // 2, length, rows)
        for frame in range(num_frames)
    )


def timed_segment_starts(
    timestamps: Tensor, length: int, rows: Tensor | int, *, padded_rows: int = 1024
) -> Tensor:
    """First rows of the segments around frames at known times ("true"), (B, T) int64.

    timestamps: (B, T) seconds from the start of the sound, the frames' own. rows: (B,) or a number,
    each clip's real S before padding. Segments stay inside the real rows; where the clip is shorter
    than `length` they begin at 0 and end in padding. padded_rows: how many rows the fbank has.
    """
    if timestamps.ndim != 2:
        raise ValueError(f"timestamps must be (B, T), got {tuple(timestamps.shape)}")
    _check(timestamps.shape[1], length, padded_rows)
    real = torch.as_tensor(rows, device=timestamps.device).clamp(max=padded_rows)
    centres = (timestamps.double() * ROWS_PER_SECOND).round().long()  # half to even
    last = (real - length).clamp(min=0).expand(timestamps.shape[0])[:, None]
    return torch.minimum((centres - length // 2).clamp(min=0), last)


def take_segments(
    fbank: Tensor, starts: Tensor, length: int, *, clips: Tensor | None = None
) -> Tensor:
    """Rows [start, start + length) of each clip: (B, S, F), starts (B,) -> (B, length, F).

    With starts (B, T), T segments of each clip: (B, T, length, F). clips: (n,) beside starts (n,),
    which clip each segment is of, for any number of them -> (n, length, F).
    """
    if clips is None:
        clips = torch.arange(fbank.shape[0], device=fbank.device)
        clips = clips.view(-1, *(1,) * (starts.ndim - 1))
    windows = fbank.unfold(1, length, 1)  # a view, (B, S - length + 1, F, length)
    return windows[clips, starts].transpose(-1, -2)


def _inside(start: int, length: int, rows: int) -> int:
    return max(0, min(start, rows - length))


def _check(num_frames: int, length: int, rows: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")
    if length < 16 or length % 16:
        raise ValueError(f"length={length} must be a multiple of 16 fbank rows")
    if length > rows:
        raise ValueError(f"length={length}: a segment is longer than the fbank of {rows} rows")
