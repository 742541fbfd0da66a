"""Pictures, sounds and videos of a page: inside it while they fit, else linked beside it."""

import base64
import os
import struct
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from kdcmae_fast.report.reading import MEGABYTE, Unreadable, inside

Kind = Literal["picture", "sound", "video"]


class Media:
    """Where a page takes its files from.

    page_folder: where the page will be. limit: bytes of files that it may hold; files that do not
        fit any more are linked, relative to `page_folder`.
    """

    def __init__(self, page_folder: Path, limit: int) -> None:
        self.embedded = 0
        self.linked: list[Path] = []
        self._page_folder = page_folder.resolve()
        self._room = limit

    def address(self, run: Path, folder: Path, name: object, kind: Kind) -> str:
        """The URL of a file named in a metrics.json of `folder`.

        `Unreadable` for a file that is missing, outside of `run`, cut short, or of another kind:
        what it is, its content says, not its name.
        """
        path = inside(run, folder, name)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(64)
                file.seek(max(0, size - 64))
                tail = file.read(64)
            mime = sniff(head)
            if mime is None or not mime.startswith(MIME_OF[kind]):
                raise Unreadable(f"is no {kind} that browsers show")
            if _cut_short(mime, head, tail, size):
                raise Unreadable("is cut short")
            if size > self._room:
                self.linked.append(path)
                relative = os.path.relpath(path, self._page_folder)
                return quote(Path(relative).as_posix(), safe="/", errors="surrogateescape")
            content = path.read_bytes()
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        self._room -= size
        self.embedded += 1
        return f"data:{mime};base64,{base64.b64encode(content).decode()}"

    def linked_megabytes(self) -> float:
        """Size of the files that the page needs beside it."""
        return sum(path.stat().st_size for path in set(self.linked)) / MEGABYTE


MIME_OF = {"picture": "image/", "sound": "audio/", "video": "video/"}


def sniff(head: bytes) -> str | None:
    """The media type of a file by its first 64 bytes; None for others, SVG (a program) too."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE"):
        return "image/webp" if head[8:12] == b"WEBP" else "audio/wav"
    if head[4:8] == b"ftyp":
        return "audio/mp4" if head[8:12] == b"M4A " else "video/mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "video/webm"
    if head.startswith(b"fLaC"):
        return "audio/flac"
    if head.startswith(b"OggS"):
        return "audio/ogg"
    if head.startswith(b"ID3") or head[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"):
        return "audio/mpeg"
    return None


def _cut_short(mime: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of a kind that tells its length or end was not written to its end."""
    if mime == "image/png":
        return b"IEND" not in tail
    if mime == "image/jpeg":
        return b"\xff\xd9" not in tail
    if head[:4] == b"RIFF":
        (length,) = struct.unpack("<I", head[4:8])
        return length != 0xFFFFFFFF and size < length
    return False
