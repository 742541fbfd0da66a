"""Shards as archives: every tar header against the index, and nothing that leads elsewhere."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from kdcmae_fast.data.doctor.checks import Check, first_lines
from kdcmae_fast.data.shards.layout import BLOCK, read_index

Members = dict[str, tuple[int, int]]  # name -> where its data starts, its size


class ArchiveReport(NamedTuple):
    """unsafe: members that could write elsewhere. damaged: what does not fit. One line each."""

    members: int
    unsafe: list[str]
    damaged: list[str]


def check_archives(tars: Sequence[Path], root: Path | None = None, *, of: int = 0) -> list[Check]:
    """Walks the headers of `tars`. root: of a dataset whose indexes they must fit; None: no index.

    of: how many shards there are, where `tars` are some of them.
    """
    members = 0
    unsafe: list[str] = []
    damaged: list[str] = []
    for path in tars:
        report = read_archive(path, root)
        members += report.members
        unsafe += report.unsafe
        damaged += report.damaged
    looked = f"{members:,} members of {len(tars)} shards" + (f" (of {of})" if of else "")
    return [
        Check(
            "shards",
            "error" if damaged else "ok",
            len(damaged),
            f"places where tar and index differ; {looked}" if damaged else f"whole: {looked}",
            first_lines(damaged),
            "delete the shard's .tar and .jsonl and run `kdcmae prepare` again" if damaged else "",
        ),
        Check(
            "archive names",
            "error" if unsafe else "ok",
            len(unsafe),
            "links, special files or paths that lead elsewhere" if unsafe else "plain files only",
            first_lines(unsafe),
            "do not unpack this archive; get it from its source again" if unsafe else "",
        ),
    ]


def read_archive(path: Path, root: Path | None) -> ArchiveReport:
    """Every header of one tar, and the index of the shard where `root` has one."""
    found: Members = {}
    unsafe: list[str] = []
    damaged: list[str] = []
    try:
        for info in _headers(path, damaged):
            if problem := _unsafe(info):
                unsafe.append(f"{path}, offset {info.offset}: {info.name!r} {problem}")
            if info.name in found:
                damaged.append(f"{path}, offset {info.offset}: {info.name!r} is there twice")
            found[info.name] = (info.offset_data, info.size)
    except (OSError, tarfile.TarError) as error:
        damaged.append(f"{path}: {getattr(error, 'strerror', None) or error}")
    if root is not None:
        damaged += _against_index(path, root, found)
    return ArchiveReport(len(found), unsafe, damaged)


def _headers(path: Path, damaged: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; where tarfile gives up in silence, `damaged` gets a line."""
    size = path.stat().st_size
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while True:
            try:
                info = tar.next()
            except tarfile.TarError as error:
                damaged.append(f"{path}, offset {tar.offset}: {error}")
                return
            if info is None:
                break
            if info.isreg() and info.offset_data + info.size > size:
                damaged.append(f"{path}, offset {info.offset}: {info.name!r} ends after the file")
            yield info
        # An archive ends with blocks of zeros; tarfile also stops where a header is damaged.
        file.seek(tar.offset)
        if file.read(BLOCK).strip(b"\0"):
            damaged.append(f"{path}, offset {tar.offset}: damaged header")


def _unsafe(info: tarfile.TarInfo) -> str:
    """What is wrong with a member's kind or name; "" for nothing."""
    name = PurePosixPath(info.name.replace("\\", "/"))
    if info.issym() or info.islnk():
        return f"is a link to {info.linkname!r}"
    if not info.isreg():
        return "is not a plain file"
    if name.is_absolute() or re.match("[A-Za-z]:", info.name):
        return "has an absolute name"
    return "leads out of its folder" if ".." in name.parts else ""


def _against_index(path: Path, root: Path, found: Members) -> Iterator[str]:
    """Where the index of a shard names a member that the tar does not have there."""
    listed: set[str] = set()
    try:
        for line in read_index(root, path.stem):
            for kind, place in line.get("members", {}).items():
                name = f"{line['key']}.{kind}"
                listed.add(name)
                if name not in found:
                    yield f"{path}, offset {place[0]}: the index has {name}, the tar has not"
                elif tuple(place) != found[name]:
                    yield (
                        f"{path}, offset {place[0]}: the index has {name} there with {place[1]} "
                        f"bytes, the tar has it at {found[name][0]} with {found[name][1]}"
                    )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{path}: index: {error}"
        return
    for name in found.keys() - listed:
        yield f"{path}, offset {found[name][0]}: {name!r} is not in the index"
