"""Reading what others wrote: size limits, no pickle, nothing outside of a run's folder."""

import json
import math
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MEGABYTE = 1_000_000
MAX_JSON = 64 * MEGABYTE  # a metrics.json or config.json
MAX_LOG = 512 * MEGABYTE
MAX_HEADER = 100 * MEGABYTE  # as the safetensors library has it


class Unreadable(ValueError):
    """A file that cannot be shown; the message says why and does not repeat its name."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `Unreadable` where there is none."""
    try:
        found = json.loads(read_text(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise Unreadable("holds no JSON object")
    return found


def read_text(path: Path, limit: int) -> str:
    """The text of a file of at most `limit` bytes; undecodable bytes become U+FFFD."""
    try:
        if not path.is_file():
            raise Unreadable("is missing")
        size = path.stat().st_size
        if size > limit:
            raise Unreadable(f"is {size // MEGABYTE} MB, more than the {limit // MEGABYTE} allowed")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error


def inside(run: Path, folder: Path, name: object) -> Path:
    """The file that `name`, relative to `folder`, is; `Unreadable` if it leaves the run's folder.

    Absolute paths, `..` and symbolic links count as what they lead to, and may lead to nothing
    outside of `run`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise Unreadable("is no file name")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise Unreadable("is refused: an absolute path")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(run.resolve()):
            raise Unreadable("is refused: it is outside of the run's folder")
        if not path.is_file():
            raise Unreadable("is missing")
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, ...
        if isinstance(error, Unreadable):
            raise
        raise Unreadable("is no file name") from error
    return path


def number(value: object) -> float | None:
    """`value` if it is a number (True and False are none), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def whole(value: object) -> int | None:
    """`value` as a whole number, if it is a finite number; else None."""
    found = number(value)
    return int(found) if found is not None and math.isfinite(found) else None


def count_parameters(path: Path) -> int | None:
    """Parameters in a safetensors file, from its header alone; None where there is no such file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                return None
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(entry["shape"]) for entry in tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return None
