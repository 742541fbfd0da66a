"""CSV lists of videos: a header, then a path or an id a row, with times and labels."""

import csv
import math
import os
import posixpath
from typing import Any

from kdcmae_fast.data.prepare.names import VIDEO_EXTENSIONS

COLUMNS = {  # accepted headers, lower case -> field
    "path": "path", "file": "path", "filename": "path", "video": "path", "video_path": "path",
    "id": "id", "video_id": "id", "ytid": "ytid", "youtube_id": "ytid",
    "start": "start", "start_seconds": "start", "time_start": "start", "start_time": "start",
    "end": "end", "end_seconds": "end", "time_end": "end", "end_time": "end",
    "duration": "duration", "seconds": "duration",
    "labels": "labels", "positive_labels": "labels", "label": "label", "class": "label",
}  # fmt: skip


def read_csv_list(path: str, media_root: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The fields of `Input` for each row, and notes for the user.

    Columns: path (relative to media_root, or to the list's folder) or ytid (looked up by name under
    media_root); start, end or duration, in seconds; labels, separated by commas, or label, one
    name; id. Raises ValueError naming the file and line for what is no such list.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if path.lower().endswith(".tsv") else ","
            table = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            fields = _fields(path, table.fieldnames or [])
            rows = [(table.line_num, row) for row in table]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    if "path" not in fields.values() and not media_root:
        raise ValueError(f"{path} names videos by id; give their folder as --media-root")
    by_name = {} if "path" in fields.values() else _files_by_name(media_root)
    base = media_root or os.path.dirname(path)
    inputs = []
    for line, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: not as many values as the header has columns")
        values = {field: row[column].strip() for column, field in fields.items()}
        inputs.append(_input(f"{path}, line {line}", values, base, by_name))
    unused = [column for column in table.fieldnames or [] if column not in fields]
    return inputs, [f"{path}: column {column!r} is not used" for column in unused]


def _fields(path: str, header: Any) -> dict[str, str]:
    """Column as written -> field."""
    fields: dict[str, str] = {}
    for column in header:
        field = COLUMNS.get(column.strip().lower())
        if field in fields.values():
            raise ValueError(f"{path}: two columns for {field}: {', '.join(header)}")
        if field:
            fields[column] = field
    if not {"path", "ytid"} & set(fields.values()):
        raise ValueError(
            f"{path}: the first line must name the columns, path (or ytid) among them, as in "
            f"path,start,end,labels; it is {','.join(header)[:80]!r}"
        )
    return fields


def _input(
    where: str, values: dict[str, str], base: str, by_name: dict[str, str]
) -> dict[str, Any]:
    start, seconds, skip = _time_range(values)
    labels = [label.strip() for label in values.get("labels", "").split(",")]
    # Lists of labels are separated by commas everywhere, so a name keeps none.
    labels.append(values.get("label", "").replace(",", "_"))
    if path := values.get("path"):
        name = posixpath.splitext(posixpath.normpath(path).lstrip("/"))[0]
        found = os.path.abspath(os.path.join(base, path))
        identity = f"{name}_{start:.3f}" if values.get("start") else name
    elif identity := values.get("ytid", ""):
        segments = [f"{identity}_{start:06.0f}", f"{identity}_{start:.3f}", f"{identity}_{start:g}"]
        cut = next((by_name[name] for name in segments if name in by_name), None)
        found = cut or by_name.get(identity, "")
        path = os.path.relpath(found, base) if found else identity
        identity = segments[0] if values.get("start") else identity
        if cut:  # already the segment, so its times start at 0
            start = 0.0
        elif not found:
            skip = skip or ("missing", f"{where}: no video {path}.* under {base}")
    else:
        raise ValueError(f"{where}: neither a path nor an id")
    return {
        "id": values.get("id") or identity,
        "source": path,
        "path": found,
        "start": start,
        "seconds": seconds,
        "labels": tuple(dict.fromkeys(label for label in labels if label)),
        "skip": skip,
    }


def _time_range(values: dict[str, str]) -> tuple[float, float | None, tuple[str, str] | None]:
    """Start, length (None: to the end), and why the row cannot be used (None: it can)."""
    numbers: dict[str, float | None] = {}
    for field in ("start", "end", "duration"):
        text = values.get(field, "")
        try:
            numbers[field] = float(text) if text else None
        except ValueError:
            numbers[field] = math.nan
    start = numbers["start"] or 0.0
    seconds = numbers["duration"]
    if seconds is None and numbers["end"] is not None:
        seconds = round(numbers["end"] - start, 6)
    if math.isfinite(start) and start >= 0 and (seconds is None or 0 < seconds < math.inf):
        return start, seconds, None
    given = ", ".join(f"{field} {values[field]!r}" for field in numbers if values.get(field))
    return 0.0, None, ("bad_time_range", given)


def _is_video(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in VIDEO_EXTENSIONS


def _files_by_name(root: str) -> dict[str, str]:
    """Name of a video without extension -> path; of several the first in sorted order."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(file for file in files if _is_video(file)):
            found.setdefault(os.path.splitext(file)[0], os.path.join(folder, file))
    return found
