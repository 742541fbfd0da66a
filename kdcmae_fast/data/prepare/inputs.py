"""What is to be prepared: the list of inputs that folders, videos, CSV files and manifests give."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kdcmae_fast.data.manifest import read_label_csv, read_manifest
from kdcmae_fast.data.prepare.csv_list import read_csv_list
from kdcmae_fast.data.prepare.names import VIDEO_EXTENSIONS, SafeNames
from kdcmae_fast.data.prepare.settings import PrepareSettings


@dataclass(frozen=True, slots=True)
class Input:
    """One clip to be made.

    id: its name in reports. source: its file as the user gave it. path: the file to open.
    start, seconds: the part of it (None: to the end). frames: root of a manifest's frame folders,
    where `path` is a sound file. name: its file name in the CAV-MAE layout. skip: reason code and
    one line when it is not even tried. size: bytes of the file, -1 where there is none.
    """

    id: str
    source: str
    path: str
    start: float = 0.0
    seconds: float | None = None
    labels: tuple[str, ...] = ()
    frames: str = ""
    name: str = ""
    skip: tuple[str, str] | None = None
    size: int = -1


@dataclass
class Sources:
    """All inputs, and what was found besides.

    ignored: extension -> files of the folders that are no videos. notes: lines for the user.
    """

    inputs: list[Input] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_sources(paths: Sequence[str], settings: PrepareSettings, media_root: str = "") -> Sources:
    """The inputs of folders, videos, CSV lists and manifests, in the order given.

    media_root: folder that the paths or ids of CSV lists are looked up in. ValueError for a source
    that does not exist or cannot be a source, or when there is no input at all.
    """
    if media_root and not os.path.isdir(media_root):
        raise ValueError(f"--media-root {media_root} is no folder")
    found = Sources()
    for path in paths:
        if os.path.isdir(path):
            _read_folder(path, found)
        elif not os.path.exists(path):
            raise ValueError(f"{path}: no such file or folder")
        elif path.lower().endswith(".json"):
            _read_json(path, settings, found)
        elif path.lower().endswith((".csv", ".tsv")):
            rows, notes = read_csv_list(path, media_root)
            found.inputs += [Input(**row) for row in rows]
            found.notes += notes
        else:
            name = os.path.splitext(os.path.basename(path))[0]
            found.inputs.append(Input(_text(name), _text(path), os.path.abspath(path)))
    if not found.inputs:
        raise ValueError(f"{', '.join(map(_text, paths))}: no videos there")
    return found


def finish_inputs(inputs: Iterable[Input], order: str) -> list[Input]:
    """The inputs in their final order, with sizes and file names; doubles are marked skipped.

    The first of several with an id is kept.
    """
    first: dict[str, str] = {}
    names = SafeNames()
    finished = []
    for item in inputs:
        if item.id in first and item.skip is None:
            skip = "duplicate_id", f"{item.id!r} is also {first[item.id]}"
            finished.append(replace(item, skip=skip, size=_size(item.path)))
            continue
        if item.skip is None:
            first[item.id] = item.source
        finished.append(replace(item, name=names.add(item.id), size=_size(item.path)))
    if order == "shuffled":
        # By what they are called and not by where they stand, so that a shard is a mixture.
        finished.sort(
            key=lambda item: hashlib.sha256(item.id.encode("utf-8", "surrogatepass")).digest()
        )
    return finished


def digest_inputs(inputs: Iterable[Input], labels: Sequence[tuple[int, str, str]]) -> str:
    """SHA-256 over everything that decides which clips come out, file sizes included."""
    digest = hashlib.sha256(json.dumps(labels).encode())
    for item in inputs:
        digest.update(_line(item))
    return digest.hexdigest()


def label_rows(inputs: Iterable[Input], label_csv: str) -> list[tuple[int, str, str]]:
    """(index, mid, display name) of labels.csv, [] when no input has a label.

    label_csv: the classes and their numbers; without it the labels of all inputs in sorted order.
    """
    if not label_csv:
        mids = {mid for item in inputs for mid in item.labels}
        return [(number, mid, mid) for number, mid in enumerate(sorted(mids))]
    classes = read_label_csv(label_csv)
    for item in inputs:
        for mid in item.labels:
            if mid not in classes:
                raise ValueError(f"{item.source} ({item.id}): label {mid!r} is not in {label_csv}")
    with open(label_csv, newline="", encoding="utf-8") as file:
        names = {row["mid"]: row["display_name"] or row["mid"] for row in csv.DictReader(file)}
    return [(number, mid, names[mid]) for mid, number in classes.items()]


def _read_folder(path: str, found: Sources) -> None:
    root = os.path.abspath(path)
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            extension = os.path.splitext(file)[1].lower()
            if extension not in VIDEO_EXTENSIONS:
                found.ignored[_text(extension or file)] += 1
                continue
            full = os.path.join(folder, file)
            inner = os.path.relpath(full, root).replace(os.sep, "/")
            source = os.path.join(path, inner)
            found.inputs.append(Input(_text(os.path.splitext(inner)[0]), _text(source), full))


def _read_json(path: str, settings: PrepareSettings, found: Sources) -> None:
    entries = read_manifest(path, None)
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)["data"]
    for entry, row in zip(entries, rows, strict=True):
        labels = tuple(
            mid.strip() for mid in str(row.get("labels") or "").split(",") if mid.strip()
        )
        found.inputs.append(
            Input(
                entry.video_id,
                entry.wav,
                os.path.abspath(entry.wav),
                labels=labels,
                frames=entry.video_path,
            )
        )
    first = entries[0]
    count = count_frames(first.video_path, first.video_id)
    if count not in (0, settings.num_frames):
        raise ValueError(
            f"{path}: its first clip, {first.video_id}, has {count} frames, --num-frames is "
            f"{settings.num_frames}; give --num-frames {count} or a preset with as many"
        )


def count_frames(root: str, identity: str) -> int:
    """How many of frame_0, frame_1 ... a clip of the CAV-MAE layout has, without gap."""
    count = 0
    while os.path.exists(f"{root}/frame_{count}/{identity}.jpg"):
        count += 1
    return count


def _line(item: Input) -> bytes:
    values = (item.id, item.source, item.start, item.seconds, item.labels, item.frames, item.size)
    text = json.dumps([*values, item.skip and item.skip[0]])
    return text.encode()


def _text(name: str) -> str:
    """A file name as text, also one that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size if path else -1
    except (OSError, ValueError):  # ValueError: a zero byte in a list's path
        return -1
