"""File names: which are videos, and names made of ids, safe and never the same for two ids."""

import hashlib
import unicodedata

from kdcmae_fast.data.folder import EXTENSIONS

MORE_KINDS = "asf divx dv f4v m2t m2ts m2v m4p mp2v mpe mpv mxf nut ogg ogm qt rm rmvb vob y4m"
VIDEO_EXTENSIONS = EXTENSIONS | {f".{kind}" for kind in MORE_KINDS.split()}

LONGEST = 180  # bytes of a name; file systems allow 255, extensions and temporary names included
FORBIDDEN = frozenset('/\\<>:"|?*%~')  # ~ starts the digest of a name that was changed


class SafeNames:
    """Names for ids, in the order they come; each is unlike the others in every file system."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def add(self, identity: str) -> str:
        """The name of an id not seen before."""
        name = safe_name(identity)
        folded = _folded(name)
        if folded in self._taken:  # differs only in case or in how accents are written
            name = f"{name}~{_digest(identity)}"
            folded = _folded(name)
        self._taken.add(folded)
        return name


def safe_name(identity: str) -> str:
    """A file name without separators, control characters, leading dots and the like.

    Unicode letters and spaces stay. Anything else becomes %XX of its UTF-8 bytes, so that different
    ids stay different; too long names end in a digest instead.
    """
    last = len(identity) - 1
    name = "".join(
        _escaped(character) if _unsafe(character, i == 0, i == last) else character
        for i, character in enumerate(identity)
    )
    if not name:
        return "%"
    if len(name.encode("utf-8", "surrogatepass")) <= LONGEST:
        return name
    start = name.encode("utf-8")[: LONGEST - 65].decode("utf-8", "ignore")
    return f"{start}~{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _unsafe(character: str, first: bool, last: bool) -> bool:
    return (
        character in FORBIDDEN
        or unicodedata.category(character)[0] == "C"
        or (character.isspace() and (character != " " or first or last))
        or (first and character in ".-")
        or (last and character == ".")
    )


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
