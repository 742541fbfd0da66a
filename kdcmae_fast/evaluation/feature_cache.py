"""Features kept on disk under the hash of everything they were made of.

One safetensors file per key in a folder of the user's. The key covers the checkpoint's bytes, the
data settings, the list of clips, the frame settings and `EXTRACTION`: change one of them and the
features are extracted anew. The clips' own media files are not read for it; only a folder of videos
or sounds is told by its files' sizes and dates.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import kdcmae_fast
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import BadClip
from kdcmae_fast.data.folder import VideoFolder
from kdcmae_fast.evaluation.features import (
    ClipFeatures,
    extract_features,
    extract_frame_features,
)
from kdcmae_fast.evaluation.processes import ALONE, Processes
from kdcmae_fast.evaluation.source import EvaluationSource, Opened
from kdcmae_fast.messages import require_folder
from kdcmae_fast.models.pretrained import CONFIG, WEIGHTS, replace_file

FORMAT = "kdcmae features 1"
# Count up when the same clips, settings and weights give other features than before: another frame
# of a window, another filterbank. tests/evaluation/test_feature_version.py notices.
EXTRACTION = 2  # 2: frame_times of a list choose the frame of a window
CHUNK = 2**20  # bytes of a file hashed at once
UNRELATED = (
    "num_workers",
    "shuffle_window",
    "sampling",
    "mixup",
    "freq_mask",
    "time_mask",
    "noise",
)
FRAMES_PER_PASS = 64  # frame-level: as many clips at once as make about so many frames


class FrameSettings(NamedTuple):
    """All frames of each clip. num_frames: T (None: as the dataset has)."""

    num_frames: int | None = None


class FoundFeatures(NamedTuple):
    """features, and what to tell of where they come from ("" without a folder for them)."""

    features: ClipFeatures
    note: str


def find_features(
    source: EvaluationSource,
    opened: Opened,
    frames: FrameSettings | None = None,
    *,
    folder: str | Path | None = None,
    processes: Processes = ALONE,
) -> FoundFeatures:
    """Features of a source's clips: read from `folder` if they are there, else extracted.

    frames: None for one pooled vector per clip and modality. folder: where features are kept
    (None: nowhere). A damaged file there is named in the note and replaced. processes: as in
    `extract_features`.
    """
    if folder is None:
        return FoundFeatures(make_features(source, opened, frames, processes), "")
    require_folder(folder, "--features")
    found: list[ClipFeatures] = []  # on the first process alone

    def look() -> tuple[Path, str, str]:
        key, trouble = feature_key(source, opened, frames), ""
        path = Path(folder) / f"{key[:32]}.safetensors"
        try:
            found.extend([read_cached(path, key)] if path.exists() else [])
        except ValueError as error:
            trouble = f"{path} is damaged ({error}): extracted again; "
        return path, key, trouble

    path, key, trouble = processes.on_first(look)
    if processes.share(len(found)):
        features = found[0] if found else _no_features()
        return FoundFeatures(features, f"features read from {path}{_left_out_then(features)}")
    features = make_features(source, opened, frames, processes)
    processes.on_first(lambda: write_cached(features, path, key))
    return FoundFeatures(features, f"{trouble}features kept in {path}")


def feature_key(source: EvaluationSource, opened: Opened, frames: FrameSettings | None) -> str:
    """Hash of all that the features depend on, 64 hexadecimal digits."""
    settings = {name: v for name, v in asdict(opened.data).items() if name not in UNRELATED}
    checkpoint = Path(opened.described["checkpoint"])
    parts = {
        "format": FORMAT,
        "version": kdcmae_fast.__version__,
        "extraction": EXTRACTION,
        "weights": _digest(_file_bytes(checkpoint / WEIGHTS)),
        "model": _digest(_file_bytes(checkpoint / CONFIG)),
        "data": settings,
        "seed": opened.seed,
        "clips_of": opened.described["clips_of"],
        "clips": len(opened.dataset) if source.num_clips is None else source.num_clips,
        "list": _digest(_list_content(opened.data, opened.dataset)),
        "frames": frames,
    }
    return _digest(iter([json.dumps(parts, sort_keys=True).encode()]))


def read_cached(path: Path, key: str) -> ClipFeatures:
    """The features of a file; ValueError, saying why, for one that is not whole or not this key's.

    Tensors stay on the disk until they are used.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    if about.get("format") != FORMAT or about.get("key") != key:
        raise ValueError("it holds something else")
    for name, tensor in tensors.items():
        if about.get(f"crc32 {name}") != _checksum(tensor):
            raise ValueError(f"checksum of {name} does not match")
    texts = json.loads(bytes(tensors.pop("texts").numpy()))
    bad = tuple(BadClip(*clip) for clip in texts["bad"])
    return ClipFeatures(video_ids=tuple(texts["video_ids"]), bad=bad, **tensors)


def write_cached(features: ClipFeatures, path: Path, key: str) -> None:
    """Write a file for `read_cached`, whole or not at all."""
    texts = json.dumps({"video_ids": features.video_ids, "bad": features.bad}).encode()
    tensors = {"texts": torch.frombuffer(bytearray(texts), dtype=torch.uint8)}
    for name in ("sample_ids", "labels", "audio", "video", "times"):
        column = getattr(features, name)
        if column is not None:
            tensors[name] = column.contiguous()
    about = {"format": FORMAT, "key": key}
    about |= {f"crc32 {name}": _checksum(tensor) for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(tensors, temporary, about))


def make_features(
    source: EvaluationSource,
    opened: Opened,
    frames: FrameSettings | None,
    processes: Processes,
    modalities: tuple[str, ...] = ("audio", "video"),
) -> ClipFeatures:
    """Features of a source's clips, extracted. modalities: of pooled features, what to encode."""
    common: dict[str, Any] = {
        "num_clips": source.num_clips,
        "progress": source.progress,
        "processes": processes,
    }
    given = opened.model, opened.dataset, opened.data
    if frames is None:
        return extract_features(
            *given, batch_size=source.batch_size, modalities=modalities, **common
        )
    at_once = max(1, FRAMES_PER_PASS // (frames.num_frames or opened.data.num_frames))
    return extract_frame_features(
        *given,
        num_frames=frames.num_frames,
        batch_size=min(source.batch_size, at_once),
        **common,
    )


def _left_out_then(features: ClipFeatures) -> str:
    """Of clips that may have been repaired since."""
    if not features.bad:
        return ""
    return f" ({len(features.bad)} of the clips were left out then; remove it to try them again)"


def _no_features() -> ClipFeatures:
    none = torch.empty(0)
    return ClipFeatures((), none.long(), none.long(), none, none)


def _list_content(data: DataConfig, dataset: Any) -> Iterator[bytes]:
    """What the list of clips says, as far as it is not in the settings."""
    if data.label_csv:
        yield from _file_bytes(Path(data.label_csv))
    if data.source in ("manifest", "sounds") and Path(data.path).is_file():
        yield from _file_bytes(Path(data.path))
    elif data.source == "sounds":
        yield from _about((entry.video_id, Path(entry.wav)) for entry in dataset.entries)
    elif data.source == "shards":
        root = Path(data.path)
        for path in [root / "dataset.json", *sorted(root.glob("shards/*.jsonl"))]:
            yield from _file_bytes(path)
    elif isinstance(dataset, VideoFolder):
        yield from _about((name, dataset.root / name) for name in dataset.names)


def _about(files: Iterable[tuple[str, Path]]) -> Iterator[bytes]:
    for name, path in files:
        about = path.stat()
        yield f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode("utf-8", "replace")


def _file_bytes(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def _digest(pieces: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data):08x}"
