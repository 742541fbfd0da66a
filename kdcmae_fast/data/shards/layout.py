"""What a dataset of shards looks like on disk, and the values its writer and reader share.

    DIR/dataset.json        format, version, num_clips, settings, [{name, clips, bytes}, ...]
    DIR/labels.csv          index,mid,display_name, where labels are known
    DIR/shards/000000.tar   for each clip <key>.json, <key>.00.jpg ... and <key>.flac or <key>.npy
    DIR/shards/000000.jsonl one line for each input of the shard; written last: it is there if and
                            only if the shard is complete

The tar is a WebDataset like any other. The index tells where each member's data starts, so that a
clip is read without parsing the tar. Keys are numbers: no file is ever named after a clip.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT, VERSION = "kdcmae-shards", 1
DATASET, LABELS, SHARDS = "dataset.json", "labels.csv", "shards"
SOUND_KINDS = ("flac", "npy")  # 16-bit FLAC; NumPy array of float16
KEY_DIGITS = 9
NAME = re.compile(r"\d{6}")  # of a shard
BLOCK = 512  # bytes that a tar member's header and its data are rounded up to


@dataclass(frozen=True)
class PreparedClip:
    """One clip ready to be written.

    id: its name in reports. source: where it came from. start, seconds: the part of the source.
    labels: class ids ("mids"). frames: JPEG files. frame_times: seconds from the clip's start at
    which each is shown. waveform: (N,) float32 at 16 kHz.
    """

    id: str
    source: str
    start: float
    seconds: float
    frames: Sequence[bytes]
    frame_times: Sequence[float]
    waveform: NDArray[np.float32]
    labels: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Skipped:
    """An input that was left out: `reason` is a code ("no_audio_stream"), `detail` one line."""

    id: str
    source: str
    reason: str
    detail: str
    labels: Sequence[str] = field(default_factory=tuple)


def shard_name(number: int) -> str:
    """Name of shard `number`, without extension."""
    return f"{number:06d}"


def clip_key(number: int) -> str:
    """Key of the clip made of input `number`, counted over all shards."""
    return f"{number:0{KEY_DIGITS}d}"


def tar_path(root: Path, name: str) -> Path:
    """The tar file of a shard."""
    return root / SHARDS / f"{name}.tar"


def index_path(root: Path, name: str) -> Path:
    """The index of a shard."""
    return root / SHARDS / f"{name}.jsonl"


def read_index(root: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a shard's index; ValueError naming the file and line of a damaged one."""
    path = index_path(root, name)
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    if not isinstance(line, dict) or not ("members" in line or "skipped" in line):
                        raise ValueError("neither a clip nor a skipped input")
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: damaged index: {error}") from None
                yield line
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; run `kdcmae prepare` again") from error


def read_dataset(root: Path) -> dict[str, Any]:
    """DIR/dataset.json, checked; ValueError naming the file otherwise."""
    path = root / DATASET
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; data.path must be a folder that `kdcmae prepare` finished"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a dataset of shards (format must be {FORMAT!r})")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: version {content.get('version')}, this code reads {VERSION}")
    for shard in content.get("shards", []):
        if not NAME.fullmatch(str(shard.get("name"))):
            raise ValueError(f"{path}: {shard.get('name')!r} is not the name of a shard")
    return content
