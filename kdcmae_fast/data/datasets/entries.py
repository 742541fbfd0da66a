"""What every reader of a published dataset returns, and how annotation files are read."""

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from kdcmae_fast.data.folder import EXTENSIONS

SOUND_EXTENSIONS = frozenset({".flac", ".mp3", ".ogg", ".wav"})
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
FRAME_FOLDER, SOUND_FOLDER = "frame_0", "audio"  # of the CAV-MAE layout


class LabelClass(NamedTuple):
    """One row of a label CSV: number, id in lists (without commas), name for people."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    mid: str
    display_name: str


class Entry(NamedTuple):
    """One clip of a published list.

    id: its name, unique within a list. media: the video or sound file; where `found` is false, what
    was looked for. split: "train", "val", "test", ... fold: from 1, 0 where there are none.
    labels: mids. start, end: seconds of the clip in `media`, None when the file is the clip.
    """

    id: str
    media: str
    split: str
    labels: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    fold: int = 0
    found: bool = True


@dataclass
class Listing:
    """A dataset's clips, as its own annotation files say.

    classes: rows of the label CSV. entries: may be read only once. kind: what the media are.
    cav_mae_root: folder with frame_<k>/ where the clips are in the CAV-MAE layout, else "".
    notes: what a user should know, one line each; complete when `entries` has been read.
    """

    classes: Sequence[LabelClass]
    entries: Iterable[Entry]
    kind: str = "video"  # or "sound"
    cav_mae_root: str = ""
    notes: list[str] = field(default_factory=list)


class Files:
    """Media under a folder by name without extension, each looked up without touching the disk.

    depth: parts of the path that make the name: 1 `name`, 2 `folder/name`.
    """

    def __init__(
        self, folder: Path, extensions: frozenset[str] = EXTENSIONS, *, depth: int = 1
    ) -> None:
        self.folder = folder
        self.ambiguous = 0
        self._paths: dict[str, str] = {}
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                stem, extension = os.path.splitext(name)
                if extension.lower() not in extensions:
                    continue
                key = stem if depth == 1 else f"{os.path.basename(parent)}/{stem}"
                self.ambiguous += key in self._paths
                self._paths.setdefault(key, os.path.join(parent, name))

    def find(self, *names: str) -> str | None:
        """Path of the first of `names` that is there."""
        return next((self._paths[name] for name in names if name in self._paths), None)

    def notes(self) -> list[str]:
        """What to say of names that several files have."""
        if not self.ambiguous:
            return []
        return [
            f"{self.ambiguous} files under {self.folder} have the name of another one and are not "
            f"used (the first in order of path is)"
        ]


def media_files(root: Path, *folders: str, depth: int = 1) -> tuple[Files, str]:
    """The videos of `root`, in the first of `folders` there is or else anywhere under it.

    Where `root` is in the CAV-MAE layout, its sounds instead, and `root` as the second value.
    """
    if (root / FRAME_FOLDER).is_dir() and (root / SOUND_FOLDER).is_dir():
        return Files(root / SOUND_FOLDER, SOUND_EXTENSIONS), str(root)
    folder = next((root / name for name in folders if (root / name).is_dir()), root)
    return Files(folder, depth=depth), ""


def bad_line(path: Path, line: int, expected: str, found: object) -> NoReturn:
    """Raise the ValueError for a line that is not in the published format."""
    raise ValueError(f"{path}, line {line}: expected {expected}, found {str(found)[:120]!r}")


def csv_rows(path: Path, *, comments: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each filled line of a CSV file; comments: leave out `# ...`."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.reader(file, skipinitialspace=True)
        try:
            for values in table:
                if not values or (comments and values[0].startswith("#")):
                    continue
                yield table.line_num, [value.strip() for value in values]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {table.line_num + 1}: not CSV: {error}") from None


def csv_table(path: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column of a CSV with a header that has at least `columns`."""
    rows = csv_rows(path)
    line, header = next(rows, (1, []))
    if missing := [column for column in columns if column not in header]:
        raise ValueError(
            f"{path}, line {line}: no column {', '.join(missing)}; the header must have "
            f"{','.join(columns)}, it is {','.join(header)[:120]!r}"
        )
    for line, values in rows:
        if len(values) != len(header):
            bad_line(path, line, f"{len(header)} values", ",".join(values))
        yield line, dict(zip(header, values, strict=True))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each filled line."""
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, text.strip()


def seconds(path: Path, line: int, text: str) -> float:
    """A time in seconds, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        bad_line(path, line, "a time in seconds", text)
    return value


def plain_name(path: Path, line: int, name: str) -> str:
    """`name` as a file's name without folders; ValueError for anything that leads elsewhere."""
    if not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        bad_line(path, line, "the name of a file", name)
    return name


def label_classes(names: Iterable[tuple[str, str]]) -> list[LabelClass]:
    """Classes numbered in the order of (mid, display name)."""
    return [LabelClass(index, mid, name) for index, (mid, name) in enumerate(names)]


def as_mid(name: str) -> str:
    """A class's name as an id: lists of labels are separated by commas."""
    return name.replace(",", "_")
