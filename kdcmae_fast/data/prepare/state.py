"""What a run leaves for the next one in its folder, and locks between runs on one folder."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATE = "prepare.json"  # written first; says what the folder is made of
VERSION = 1
PATIENCE = 15.0  # seconds; processes of a killed run end within


def begin(root: Path, settings: dict[str, Any], digest: str, num_inputs: int) -> None:
    """Claim a new folder for these settings and inputs, or check that it was begun with them.

    ValueError naming what differs, or when the folder holds something else.
    """
    wanted = {
        "format": "kdcmae-prepare",
        "version": VERSION,
        "num_inputs": num_inputs,
        "inputs_sha256": digest,
        "settings": settings,
    }
    path = root / STATE
    root.mkdir(parents=True, exist_ok=True)
    others = [entry.name for entry in root.iterdir() if entry.name != STATE]
    if others and not path.exists():
        raise ValueError(
            f"--output {root} is not empty, and not a folder that `kdcmae prepare` began; "
            f"give a new one"
        )
    path.open("ab").close()  # made if it is not there, unchanged if it is
    # Written in place and under the lock: several machines may begin one folder together.
    with path.open("r+b") as file:
        _take(file.fileno(), 0)
        text = file.read()
        try:
            found = json.loads(text)
        except ValueError:
            if others:
                raise ValueError(f"{path}: damaged; give another --output") from None
            file.seek(0)
            file.write(json_text(wanted).encode())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            return
    _compare(path, found, wanted)


def _compare(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    root = path.parent
    if not isinstance(found, dict) or found.get("format") != wanted["format"]:
        raise ValueError(f"{path}: not written by `kdcmae prepare`; give another --output")
    if found["version"] != VERSION:
        raise ValueError(f"{path}: version {found['version']}, this code writes {VERSION}")
    other_inputs = found["inputs_sha256"] != wanted["inputs_sha256"]
    for name, value in wanted["settings"].items():
        if name == "clips_per_shard" and other_inputs:
            continue  # follows from the number of inputs
        if found["settings"].get(name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, but {root} was begun with "
                f"{found['settings'].get(name)}: give that, or another --output"
            )
    if other_inputs:
        raise ValueError(
            f"the inputs are not those that {root} was begun with ({wanted['num_inputs']} now, "
            f"{found['num_inputs']} then; names, order, times, labels or sizes differ): "
            f"restore them, or give another --output"
        )


def json_text(content: Any) -> str:
    """JSON for a file: one element a line, text as it is."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all; for one process at a time."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def locked(root: Path, place: int) -> Iterator[bool]:
    """Holds byte `place` of the state file: True, or False if another process keeps holding it.

    A lock dies with its process, also on another machine, and leaves no file behind. A process must
    not hold two at a time, nor open the state file while it holds one: closing it frees all.
    """
    with (root / STATE).open("r+b") as file:
        yield _take(file.fileno(), place)


def _take(descriptor: int, place: int) -> bool:
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            return True
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):
                return True  # a file system without locks
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
