"""What a dataset lists, read leniently: every row, where a run would stop at the first bad one."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.folder import EXTENSIONS as VIDEO_EXTENSIONS
from kdcmae_fast.data.manifest import PLACEHOLDER
from kdcmae_fast.data.prepare.cav_mae import TRAIN
from kdcmae_fast.data.shards.layout import DATASET, LABELS, SHARDS, read_dataset, read_index
from kdcmae_fast.data.sounds import EXTENSIONS as SOUND_EXTENSIONS

Source = Literal["manifest", "shards", "folder", "sounds", "tar"]


class ListRow(NamedTuple):
    """One clip of a list: its name, the file it comes from, its labels."""

    id: str
    source: str
    mids: tuple[str, ...] = ()


@dataclass
class ClipList:
    """The clips of a list that can be told apart, and what is wrong with the other rows.

    label_csv: the CSV that a run would take, "" for none.
    """

    source: Source
    rows: list[ListRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    label_csv: str = ""


def guess_source(path: str, *, sounds: bool = False) -> Source:
    """What is at `path`; ValueError where there is nothing to examine.

    A list of which no entry has a `video_path`, and a folder of sound files, are sounds without
    pictures. sounds: so are a list that has them and a folder with videos beside the sounds.
    """
    target = Path(path)
    if target.is_file():
        if target.suffix == ".tar":
            return "tar"
        return "sounds" if sounds or _lists_sounds(path) else "manifest"
    if not target.is_dir():
        raise ValueError(
            f"{path}: no such file or folder; give a manifest, shards, videos or sounds"
        )
    if (target / DATASET).exists() or (target / SHARDS).is_dir():
        return "shards"
    if not sounds and (target / TRAIN).is_file() and (target / "frame_0").is_dir():
        raise ValueError(f"{path}: a dataset in CAV-MAE's layout; give its list, {target / TRAIN}")
    found = {os.path.splitext(name)[1].lower() for _, _, names in os.walk(target) for name in names}
    if found & SOUND_EXTENSIONS and (sounds or not found & VIDEO_EXTENSIONS):
        return "sounds"
    return "tar" if ".tar" in found and not found & VIDEO_EXTENSIONS else "folder"


def read_list(data: DataConfig) -> ClipList:
    """The list that `data` names; never raises for what is in it."""
    root = Path(data.path)
    if data.source == "shards":
        return _shards(data)
    if data.source == "manifest":
        return _manifest(data, "manifest")
    if data.source == "sounds":
        return _manifest(data, "sounds") if root.is_file() else _folder(root, "sounds")
    return _folder(root, "folder")


def _folder(root: Path, source: Source) -> ClipList:
    wanted = SOUND_EXTENSIONS if source == "sounds" else VIDEO_EXTENSIONS
    files = (file for file in root.rglob("*") if file.suffix.lower() in wanted)
    names = sorted(file.relative_to(root).as_posix() for file in files if file.is_file())
    return ClipList(source, [ListRow(_text(n), os.path.abspath(root / n)) for n in names])


def _json_rows(path: str) -> list[object]:
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)["data"]
    return rows if isinstance(rows, list) else []


def _lists_sounds(path: str) -> bool:
    """Whether the entries of a JSON list have sounds, and none of them pictures."""
    try:
        rows = [row for row in _json_rows(path) if isinstance(row, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any(row.get("wav") for row in rows) and not any(row.get("video_path") for row in rows)


def _manifest(data: DataConfig, source: Source) -> ClipList:
    found = ClipList(source, label_csv=data.label_csv)
    media = ("wav",) if source == "sounds" else ("wav", "video_path")
    try:
        rows = _json_rows(data.path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.problems.append(f"{data.path}: {type(error).__name__}: {error}")
        return found
    for number, row in enumerate(rows):
        problem = _manifest_problem(row, media, labelled=bool(data.label_csv))
        if problem:
            found.problems.append(f"entry {number}: {problem}")
        if isinstance(row, dict) and isinstance(row.get("video_id"), str):
            labels = row.get("labels")
            mids = labels.split(",") if isinstance(labels, str) else []
            wav = os.path.abspath(row["wav"]) if isinstance(row.get("wav"), str) else ""
            mids_ = tuple(mid.strip() for mid in mids if mid.strip())
            found.rows.append(ListRow(row["video_id"], wav, mids_))
    return found


def _manifest_problem(row: object, media: Sequence[str], *, labelled: bool) -> str:
    """media: keys of the entry that name files or folders."""
    if not isinstance(row, dict):
        return "not an object"
    keys = ("video_id", *media, *(("labels",) if labelled else ()))
    if wrong := [key for key in keys if not isinstance(row.get(key), str) or not row[key]]:
        return f"{', '.join(wrong)} must be text"
    for key in media:
        if found := PLACEHOLDER.search(row[key]):
            return f"{key} still has the placeholder {found.group()}"
    return ""


def _shards(data: DataConfig) -> ClipList:
    root = Path(data.path)
    own = root / LABELS
    label_csv = data.label_csv or (str(own) if own.exists() else "")
    found = ClipList("shards", label_csv=label_csv)
    try:
        names = [shard["name"] for shard in read_dataset(root)["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        found.problems.append(str(error))
        return found
    for name in names:
        try:
            for line in read_index(root, name):
                if "members" in line:
                    row = ListRow(str(line["id"]), str(line["source"]), tuple(line["labels"]))
                    found.rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            found.problems.append(f"shard {name}: {error}")
    return found


def display_names(label_csv: str) -> dict[str, str]:
    """mid -> name for people; empty for a CSV that cannot be read, which is a finding elsewhere."""
    if not label_csv:
        return {}
    try:
        with open(label_csv, newline="", encoding="utf-8") as file:
            return {row["mid"]: row["display_name"] for row in csv.DictReader(file)}
    except (OSError, KeyError, csv.Error, UnicodeDecodeError):
        return {}


def _text(name: str) -> str:
    """A name as a folder's dataset reports it: one that is not UTF-8 must not break the report."""
    return name.encode("utf-8", "replace").decode()


def overlap(rows: Iterable[ListRow], others: Iterable[ListRow]) -> tuple[list[str], list[str]]:
    """Ids and sources that both lists have, in the order of `rows`."""
    others = list(others)
    ids = {row.id for row in others}
    sources = {row.source for row in others if row.source}
    rows = list(rows)
    return (
        list(dict.fromkeys(row.id for row in rows if row.id in ids)),
        list(dict.fromkeys(row.source for row in rows if row.source in sources)),
    )
