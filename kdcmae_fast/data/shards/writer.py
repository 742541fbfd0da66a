"""Shards, written so that a killed writer leaves nothing half done and the bytes never differ."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdcmae_fast.data.clip import SAMPLE_RATE
from kdcmae_fast.data.shards.layout import (
    BLOCK,
    DATASET,
    FORMAT,
    SHARDS,
    SOUND_KINDS,
    VERSION,
    PreparedClip,
    Skipped,
    clip_key,
    index_path,
    read_index,
    shard_name,
    tar_path,
)

TEMPORARY = ".partial"  # suffix of a file that is being written


def write_shard(
    root: Path,
    number: int,
    inputs: Iterable[PreparedClip | Skipped],
    *,
    first: int,
    sound: str = "flac",
) -> None:
    """Write shard `number`: its inputs in order, the first of them input `first` of all.

    sound: "flac" (16 bit) or "npy" (float16, four times the size, quicker to read).
    The tar appears under its name when it is complete and on disk, the index after it.
    """
    if sound not in SOUND_KINDS:
        raise ValueError(f"sound={sound!r} is not one of {', '.join(SOUND_KINDS)}")
    (root / SHARDS).mkdir(parents=True, exist_ok=True)
    name = shard_name(number)
    tar_file, index_file = tar_path(root, name), index_path(root, name)
    lines: list[str] = []
    with _partial(tar_file) as raw, tarfile.open(fileobj=raw, mode="w") as tar:
        for offset, item in enumerate(inputs):
            key = clip_key(first + offset)
            line = _skipped_line(item) if isinstance(item, Skipped) else _add(tar, key, item, sound)
            lines.append(json.dumps({"key": key, **line}, ensure_ascii=False))
    with _partial(index_file) as raw:
        raw.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def finish_dataset(root: Path, num_shards: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Write DIR/dataset.json over complete shards 0 .. num_shards - 1; returns its content.

    Shards without a clip are left out. Raises ValueError naming the first incomplete shard.
    """
    shards: list[dict[str, Any]] = []
    for number in range(num_shards):
        name = shard_name(number)
        if not index_path(root, name).exists():
            raise ValueError(f"{index_path(root, name)}: this shard is not complete yet")
        clips = sum("members" in line for line in read_index(root, name))
        if clips:
            size = tar_path(root, name).stat().st_size
            shards.append({"name": name, "clips": clips, "bytes": size})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_clips": sum(shard["clips"] for shard in shards),
        "settings": settings,
        "shards": shards,
    }
    with _partial(root / DATASET) as raw:
        raw.write((json.dumps(content, indent=1) + "\n").encode())
    return content


class _partial:
    """A binary file that gets its name when the block ends well, and is removed otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + TEMPORARY)

    def __enter__(self) -> io.BufferedWriter:
        self.file = self.temporary.open("wb")
        return self.file

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        with self.file:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, key: str, clip: PreparedClip, sound: str) -> dict[str, Any]:
    """Append a clip's members; returns its line of the index."""
    times = [round(float(time), 6) for time in clip.frame_times]
    if len(times) != len(clip.frames) or not clip.frames:
        raise ValueError(f"{clip.id}: {len(clip.frames)} frames, {len(times)} frame times")
    about = {
        "id": clip.id,
        "source": clip.source,
        "start": clip.start,
        "seconds": clip.seconds,
        "labels": list(clip.labels),
        "frame_times": times,
        "sample_rate": SAMPLE_RATE,
        "num_samples": len(clip.waveform),
    }
    text = json.dumps(about, ensure_ascii=False).encode("utf-8", "replace")
    members: dict[str, Sequence[int]] = {"json": _append(tar, f"{key}.json", text)}
    for number, frame in enumerate(clip.frames):
        members[f"{number:02d}.jpg"] = _append(tar, f"{key}.{number:02d}.jpg", frame)
    members[sound] = _append(tar, f"{key}.{sound}", _sound_bytes(clip.waveform, sound))
    kept = ("id", "source", "labels", "seconds", "num_samples", "frame_times")
    return {**{name: about[name] for name in kept}, "members": members}


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a member without date or owner; returns where its data starts, and its size."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // BLOCK) * BLOCK, len(data)


def _skipped_line(item: Skipped) -> dict[str, Any]:
    return {
        "id": item.id,
        "source": item.source,
        "labels": list(item.labels),
        "skipped": item.reason,
        "detail": " ".join(item.detail.split()),
    }


def _sound_bytes(waveform: Any, sound: str) -> bytes:
    data = io.BytesIO()
    if sound == "npy":
        np.save(data, np.asarray(waveform, dtype=np.float16), allow_pickle=False)
    else:
        import soundfile

        soundfile.write(data, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return data.getvalue()
