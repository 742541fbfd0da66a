"""`ShardClips`: a dataset of shards as clips by number."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.data.clip import (
    FRAME_STREAM,
    SAMPLE_RATE,
    Clip,
    ClipError,
    ClipFrames,
    keyed_rng,
    pick_frames,
)
from kdcmae_fast.data.manifest import read_label_csv
from kdcmae_fast.data.media import (
    MediaError,
    MediaOptions,
    Window,
    choose_window,
    decode_picture,
    decode_sound,
    finish_waveform,
    nearest_frame,
)
from kdcmae_fast.data.shards.layout import LABELS, SOUND_KINDS, read_dataset, read_index, tar_path

Item = TypeVar("Item")

WEIGHTS = "dataset_weight.csv"  # one sampling weight per clip, if somebody wrote it
OPEN_FILES = 64  # tar files a process keeps open


class Row(NamedTuple):
    """One clip of a shard's index.

    frames: (T, 2) int64, start and size of each JPEG in the tar. frame_times: (T,) float32,
    seconds. sound: start and size. kind: of SOUND_KINDS. mids: class ids.
    """

    id: str
    mids: tuple[str, ...]
    frames: NDArray[np.int64]
    frame_times: NDArray[np.float32]
    sound: tuple[int, int]
    kind: str
    num_samples: int


class ShardClips:
    """Clips of shards; each epoch takes another of a clip's frames.

    path: a folder that `kdcmae prepare` finished. label_csv: class numbers ("": DIR/labels.csv if
    there is one; labels are -1 otherwise). A clip's class is the first of its labels.

    window: clips shuffled together; the indexes of about twice as many are kept in memory (1 kB a
    clip). Memory does not grow with the dataset but by a few bytes a shard.
    Raises ValueError naming the file for a dataset that cannot be read.
    """

    def __init__(
        self, path: str, label_csv: str, options: MediaOptions, *, seed: int, window: int = 16384
    ) -> None:
        self.root = Path(path)
        self.options = options
        self.seed = seed
        self.weight_file = self.root / WEIGHTS
        content = read_dataset(self.root)
        self.names = [shard["name"] for shard in content["shards"]]
        self.shard_sizes = tuple(int(shard["clips"]) for shard in content["shards"])
        self._ends = np.cumsum(self.shard_sizes)
        if not self.names:
            raise ValueError(f"data.path={path!r}: no clip in any shard")
        self._held = 2 + 2 * window * len(self.names) // max(1, len(self))  # indexes
        for name, shard in zip(self.names, content["shards"], strict=True):
            _check_tar(tar_path(self.root, name), int(shard["bytes"]))
        own = self.root / LABELS
        csv = label_csv or (str(own) if own.exists() else "")
        self.classes = read_label_csv(csv) if csv else None
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor
        self._indexes: OrderedDict[int, list[Row]] = OrderedDict()  # shard -> its clips

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to this process."""
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def video_id(self, index: int) -> str:
        """The clip's name as it was prepared."""
        return self._find(index)[1].id

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as `epoch` sees it."""
        shard, row = self._find(index)
        rng = keyed_rng(self.seed, FRAME_STREAM, epoch, index)
        try:
            waveform, window = self._sound(shard, row, rng)
            k = nearest_frame(row.frame_times, window, rng)
            frame = self._picture(shard, row, k)
            classes = self._classes(row)
        except MediaError as error:
            raise ClipError(row.id, str(error)) from error
        return Clip(row.id, index, waveform, frame, classes[0] if classes else -1, classes)

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """All sound and frames of clip `index`; see ClipDataset. Times are those stored."""
        shard, row = self._find(index)
        numbers = pick_frames(num_frames, only, len(row.frames), f"{self.root}, clip {row.id}")
        try:
            waveform, _ = self._sound(shard, row, None)
            frames = torch.stack([self._picture(shard, row, k) for k in numbers.tolist()])
            classes = self._classes(row)
        except MediaError as error:
            raise ClipError(row.id, str(error)) from error
        times = row.frame_times[numbers].astype(np.float64)
        label = classes[0] if classes else -1
        return ClipFrames(row.id, index, waveform, frames, times, label, classes)

    def stored_frames(self, index: int) -> int:
        """How many frames of clip `index` there are."""
        return len(self._find(index)[1].frames)

    def label_sets(self) -> Iterator[tuple[str, ...]]:
        """The labels of every clip, as they were prepared; reads every shard's index."""
        for name in self.names:
            lines = (line for line in read_index(self.root, name) if "members" in line)
            yield from (tuple(line["labels"]) for line in lines)

    def frames(self, index: int) -> Tensor:
        """All frames of clip `index`, (T, 3, img_size, img_size) uint8; ClipError if damaged."""
        shard, row = self._find(index)
        try:
            return torch.stack([self._picture(shard, row, k) for k in range(len(row.frames))])
        except MediaError as error:
            raise ClipError(row.id, str(error)) from error

    def frame_times(self, index: int) -> Tensor:
        """(T,) float32: seconds from the clip's start at which each frame is shown."""
        return torch.from_numpy(self._find(index)[1].frame_times.copy())

    def waveform(self, index: int) -> Tensor:
        """The whole sound of clip `index`, (N,) float32 at 16 kHz; ClipError if damaged."""
        shard, row = self._find(index)
        try:
            return self._sound(shard, row, None)[0]
        except MediaError as error:
            raise ClipError(row.id, str(error)) from error

    def _find(self, index: int) -> tuple[int, Row]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard]) - self.shard_sizes[shard]
        rows = _recent(self._indexes, shard, self._held, self._read_rows, lambda rows: None)
        return shard, rows[index - first]

    def _read_rows(self, shard: int) -> list[Row]:
        name = self.names[shard]
        rows = [_row(line) for line in read_index(self.root, name) if "members" in line]
        if len(rows) != self.shard_sizes[shard]:
            raise ValueError(
                f"{self.root}: shard {name} has {len(rows)} clips in its index, "
                f"{self.shard_sizes[shard]} in dataset.json; run `kdcmae prepare` again"
            )
        return rows

    def _sound(
        self, shard: int, row: Row, rng: np.random.Generator | None
    ) -> tuple[Tensor, Window]:
        """Waveform of the window that `rng` draws (None: of everything), and the window."""
        data = self._bytes(shard, *row.sound)
        where = self._where(shard, row.sound[0])
        seconds = row.num_samples / SAMPLE_RATE
        window = Window(0.0, seconds)
        if rng is not None:
            window = choose_window(seconds, self.options.seconds, rng)
        if row.kind == "flac":
            samples, rate = decode_sound(io.BytesIO(data), window, where)
            return finish_waveform(samples, rate, self.options), window
        first, wanted = (round(t * SAMPLE_RATE) for t in (window.start, window.seconds))
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise MediaError(f"{where}: cannot read the sound: {error}") from error
        if array.dtype != np.float16 or array.ndim != 1:
            raise MediaError(f"{where}: {array.dtype} {array.shape} is not (N,) float16")
        part = torch.from_numpy(array[first : first + wanted]).float()  # far quicker than NumPy's
        return finish_waveform(part.numpy()[None], SAMPLE_RATE, self.options), window

    def _picture(self, shard: int, row: Row, k: int) -> Tensor:
        start, size = (int(value) for value in row.frames[k])
        data = self._bytes(shard, start, size)
        where = self._where(shard, start)
        return decode_picture(io.BytesIO(data), self.options.img_size, where)

    def _classes(self, row: Row) -> tuple[int, ...]:
        """Numbers of the clip's labels; the first must be known, unknown others are left out."""
        if self.classes is None or not row.mids:
            return ()
        if row.mids[0] not in self.classes:
            raise MediaError(f"label {row.mids[0]!r} is not in the label CSV")
        return tuple(self.classes[mid] for mid in row.mids if mid in self.classes)

    def _where(self, shard: int, start: int) -> str:
        return f"{tar_path(self.root, self.names[shard])}, offset {start}"

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        try:
            # Reads at given places share nothing, not even a position in the file.
            descriptor = _recent(self._files, shard, OPEN_FILES, self._open, os.close)
            data = os.pread(descriptor, size, start)
        except OSError as error:
            raise MediaError(f"{self._where(shard, start)}: {error.strerror}") from error
        if len(data) != size:
            raise MediaError(f"{self._where(shard, start)}: {len(data)} of {size} bytes: truncated")
        return data

    def _open(self, shard: int) -> int:
        return os.open(tar_path(self.root, self.names[shard]), os.O_RDONLY)


def _recent(
    cache: OrderedDict[int, Item],
    key: int,
    limit: int,
    make: Callable[[int], Item],
    drop: Callable[[Item], None],
) -> Item:
    """cache[key], made when it is missing; the item not used for longest makes room for it."""
    if key not in cache:
        if len(cache) >= limit:
            drop(cache.popitem(last=False)[1])
        cache[key] = make(key)
    cache.move_to_end(key)
    return cache[key]


def _row(line: dict[str, Any]) -> Row:
    members = line["members"]
    frames = [members[name] for name in sorted(members) if name.endswith(".jpg")]
    kind = next(kind for kind in SOUND_KINDS if kind in members)
    start, size = members[kind]
    return Row(
        line["id"],
        tuple(line["labels"]),
        np.asarray(frames, dtype=np.int64).reshape(-1, 2),
        np.asarray(line["frame_times"], dtype=np.float32),
        (start, size),
        kind,
        line["num_samples"],
    )


def _check_tar(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if found != size:
        raise ValueError(f"{path}: {found} bytes, dataset.json says {size}: truncated or replaced")
