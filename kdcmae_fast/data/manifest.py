"""The CAV-MAE (arXiv 2210.07839) layout: a JSON list of clips, a label CSV, frames as JPEG files.

The JSON is {"data": [{"video_id", "wav", "video_path", "labels"}, ...]}; frame k of a clip is
`<video_path>/frame_<k>/<video_id>.jpg`, the first picture of the k-th of `num_frames` equal parts,
or what is shown at `frame_times`[k] seconds if an entry has that list, as `kdcmae prepare` writes;
`labels` are comma-separated class ids ("mids") that the CSV (index,mid,display_name) numbers.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcmae_fast.data.clip import (
    FRAME_STREAM,
    Clip,
    ClipError,
    ClipFrames,
    keyed_rng,
    pick_frames,
)
from kdcmae_fast.data.media import (
    MediaError,
    MediaOptions,
    nearest_frame,
    read_picture,
    read_sound,
)

PLACEHOLDER = re.compile(r"<[^<>/]*>")  # as in "<YOUR_PATH>/audio/x.wav"


class Entry(NamedTuple):
    """One clip of the list.

    classes: numbers of all its labels, () where they were not read. frame_times: (T,) float32, when
    each frame is shown, seconds from the sound's start; None where the list does not say.
    """

    video_id: str
    wav: str
    video_path: str
    classes: tuple[int, ...]
    frame_times: NDArray[np.float32] | None = None

    @property
    def label(self) -> int:
        """Number of the first label, -1 without one."""
        return self.classes[0] if self.classes else -1

    def times(self, duration: float, num_frames: int) -> NDArray[np.floating]:
        """When each frame is shown, seconds: frame_times, or k / num_frames of the duration."""
        if self.frame_times is not None:
            return self.frame_times
        return np.arange(num_frames) * (duration / num_frames)


class ListedClips:
    """What the datasets of a list have in common: clips by number, their names and labels.

    path: of the list; `<name>_weight.csv` beside it is a sampling weight per clip.
    """

    def __init__(self, path: str, entries: list[Entry], options: MediaOptions, seed: int) -> None:
        self.options = options
        self.seed = seed
        self.weight_file = Path(path).with_name(f"{Path(path).stem}_weight.csv")
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def video_id(self, index: int) -> str:
        """The clip's name in the list."""
        return self.entries[index].video_id

    def label_sets(self) -> Iterator[tuple[int, ...]]:
        """The class numbers of every clip; () where labels were not read."""
        return (entry.classes for entry in self.entries)


class ManifestClips(ListedClips):
    """Clips of a JSON list; each epoch takes another of a clip's frames.

    Its frames are those of its `frame_times`, or else data.num_frames, evenly over the sound.
    path: the JSON file. label_csv: "" when labels do not matter (they are -1 then).
    A clip's class is the first of its labels, which must be in the CSV; others may be missing.
    `<name>_weight.csv` beside <name>.json: a sampling weight per clip, for data.sampling=balanced.
    """

    def __init__(self, path: str, label_csv: str, options: MediaOptions, *, seed: int) -> None:
        classes = read_label_csv(label_csv) if label_csv else None
        super().__init__(path, read_manifest(path, classes), options, seed)

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as `epoch` sees it."""
        entry = self.entries[index]
        rng = keyed_rng(self.seed, FRAME_STREAM, epoch, index)
        try:
            waveform, window, duration = read_sound(entry.wav, self.options, rng)
            k = nearest_frame(entry.times(duration, self.options.num_frames), window, rng)
            frame = read_picture(self._frame_path(entry, k), self.options.img_size)
        except MediaError as error:
            raise ClipError(entry.video_id, str(error)) from error
        return Clip(entry.video_id, index, waveform, frame, entry.label, entry.classes)

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """All sound and frames of clip `index`; see ClipDataset.

        num_frames: None is data.num_frames. Where the list has no `frame_times`, frame k of n in
        the folders is taken to be shown at k / n of the sound, as CAV-MAE's preparation cuts them.
        """
        entry = self.entries[index]
        count = self.options.num_frames if num_frames is None else num_frames
        try:
            stored = self.stored_frames(index, count)
            if stored == 0 or (stored < count and self._others_have(entry, count)):
                path = self._frame_path(entry, stored)
                raise MediaError(f"{path}: No such file or directory", "missing")
            numbers = pick_frames(count, only, stored, f"{entry.video_path}, {entry.video_id}")
            waveform, _, duration = read_sound(entry.wav, self.options, None)
            paths = [self._frame_path(entry, k) for k in numbers]
            frames = torch.stack([read_picture(path, self.options.img_size) for path in paths])
        except MediaError as error:
            raise ClipError(entry.video_id, str(error)) from error
        times = entry.times(duration, stored)[numbers].astype(np.float64)
        return ClipFrames(
            entry.video_id, index, waveform, frames, times, entry.label, entry.classes
        )

    def stored_frames(self, index: int, expected: int = 0) -> int:
        """How many frames of clip `index` there are, from frame_0 on without a gap.

        expected: where just so many seem to be there, they are not counted one by one.
        """
        entry, count = self.entries[index], expected

        def there(k: int) -> bool:
            return os.path.exists(self._frame_path(entry, k))

        if not expected or not there(expected - 1) or there(expected):
            count = 0
            while there(count):
                count += 1
        return count if entry.frame_times is None else min(count, len(entry.frame_times))

    @staticmethod
    def _others_have(entry: Entry, count: int) -> bool:
        """Whether there are `count` frames of other clips beside this one's."""
        return os.path.isdir(f"{entry.video_path}/frame_{count - 1}")

    @staticmethod
    def _frame_path(entry: Entry, k: int) -> str:
        return f"{entry.video_path}/frame_{k}/{entry.video_id}.jpg"


def read_label_csv(path: str) -> dict[str, int]:
    """mid -> class number; ValueError naming the file and the line for anything else."""
    return {row["mid"]: int(row["index"]) for row in _label_rows(path)}


def label_names(path: str) -> dict[int, str]:
    """Class number -> display name (of several rows of a class the first); errors as above."""
    names: dict[int, str] = {}
    for row in _label_rows(path):
        names.setdefault(int(row["index"]), row["display_name"] or row["mid"])
    return names


def _label_rows(path: str) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = {"index", "mid", "display_name"} - set(table.fieldnames or ())
            if missing:
                raise ValueError(
                    f"data.label_csv={path}: no column {', '.join(sorted(missing))}; "
                    f"the header must be index,mid,display_name"
                )
            rows = list(table)
    except OSError as error:
        raise ValueError(f"data.label_csv={path}: {error.strerror}") from error
    mids: set[str] = set()
    for line, row in enumerate(rows, 2):
        number = (row["index"] or "").strip()
        if not number.isdecimal() or not row["mid"] or row["mid"] in mids:
            raise ValueError(
                f"data.label_csv={path}, line {line}: need a whole number and a mid not used "
                f"before, got index={row['index']!r}, mid={row['mid']!r}"
            )
        mids.add(row["mid"])
    return rows


def read_manifest(
    path: str, classes: dict[str, int] | None, *, pictures: bool = True
) -> list[Entry]:
    """The clips of a JSON list. classes: mid -> number, None: no labels wanted.

    pictures: False for sounds, whose `video_path` may be empty or missing.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f"data.path={path!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"data.path={path!r} is not JSON: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"data.path={path!r}: need an object with a filled list under 'data'")
    keys = ["video_id", "wav", *(["video_path"] if pictures else [])]
    return [
        _entry(f"data.path={path!r}, entry {i}", row, keys, classes) for i, row in enumerate(rows)
    ]


def _entry(where: str, row: object, required: list[str], classes: dict[str, int] | None) -> Entry:
    keys = required + (["labels"] if classes is not None else [])
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object with {', '.join(keys)}")
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key]:
            raise ValueError(f"{where}: {key!r} must be text, got {row.get(key)!r}")
    for key in required[1:]:
        if found := PLACEHOLDER.search(row[key]):
            raise ValueError(
                f"{where}: {key}={row[key]!r} still has the placeholder {found.group()}; "
                f"put the real folder there"
            )
    numbers: tuple[int, ...] = ()
    if classes is not None:
        mids = [mid.strip() for mid in row["labels"].split(",")]
        if mids[0] not in classes:
            raise ValueError(
                f"{where} ({row['video_id']}): label {mids[0]!r} is not in the label CSV"
            )
        numbers = tuple(classes[mid] for mid in mids if mid in classes)
    times = _frame_times(where, row["frame_times"]) if "frame_times" in row else None
    pictures = str(row.get("video_path") or "").rstrip("/")
    return Entry(row["video_id"], row["wav"], pictures, numbers, times)


def _frame_times(where: str, values: object) -> NDArray[np.float32]:
    if not isinstance(values, list) or not values or not all(map(_is_time, values)):
        raise ValueError(f"{where}: 'frame_times' must be a list of seconds, got {values!r}")
    return np.asarray(values, dtype=np.float32)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
