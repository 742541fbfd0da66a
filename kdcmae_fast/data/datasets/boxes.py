"""Flickr-SoundNet and VGG-SS: where in a frame the sound comes from."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from kdcmae_fast.data.datasets.entries import (
    SOUND_EXTENSIONS,
    Entry,
    Files,
    Listing,
    as_mid,
    bad_line,
    csv_rows,
    label_classes,
    plain_name,
)

FLICKR_FRAME = 256.0  # side of the picture that Flickr-SoundNet's boxes are drawn in
VGGSS_ID = re.compile(r"[A-Za-z0-9_-]{11}_\d{6}")
PICTURES = frozenset({".jpg", ".jpeg", ".png"})
MAX_XML_BYTES = 1 << 20

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ClipBoxes:
    """The boxes of one clip, as its annotation file has them.

    boxes: xmin, ymin, xmax, ymax of each, in a square frame of side `frame` (256 or 1.0), not
    clipped: VGG-SS has values far outside. annotators: whose each box is, from 0; VGG-SS has one.
    """

    id: str
    boxes: tuple[Box, ...]
    frame: float
    annotators: tuple[int, ...] = ()
    label: str = ""

    def pixels(self, size: int) -> list[tuple[int, int, int, int]]:
        """The boxes in a picture of `size` pixels a side, clipped to it and rounded down."""
        return [
            tuple(int(min(max(v / self.frame, 0.0), 1.0) * size) for v in box)  # type: ignore[misc]
            for box in self.boxes
        ]


def read_flickr_boxes(path: Path) -> ClipBoxes:
    """One XML file: the root's children are annotators (leaves, such as a file name, are not),
    each with `bbox` elements of five values: one to leave out, then xmin, ymin, xmax, ymax."""
    data = path.read_bytes()
    # Boxes need no declarations, and entities could expand without end.
    if len(data) > MAX_XML_BYTES or b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{path}: not a list of boxes (declarations, or more than 1 MiB)")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not XML: {error}") from None
    boxes: list[Box] = []
    annotators: list[int] = []
    for annotator, child in enumerate(child for child in root if len(child)):
        for element in child:
            if element.tag != "bbox":
                continue
            values = [(value.text or "").strip() for value in element]
            if len(values) != 5 or not all(re.fullmatch(r"-?\d+", v) for v in values[1:]):
                raise ValueError(
                    f"{path}: a bbox must hold five values, the last four whole numbers, "
                    f"found {values}"
                )
            xmin, ymin, xmax, ymax = map(float, values[1:])
            boxes.append((xmin, ymin, xmax, ymax))
            annotators.append(annotator)
    if not boxes:
        raise ValueError(f"{path}: no bbox in it")
    return ClipBoxes(path.stem, tuple(boxes), FLICKR_FRAME, tuple(annotators))


def read_vggss_boxes(path: Path) -> list[ClipBoxes]:
    """vggss.json: a list of {"file", "class", "bbox"}, boxes as fractions of the picture."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list of objects with file, class and bbox")
    return [_vggss_row(f"{path}, entry {number}", row) for number, row in enumerate(rows)]


def _vggss_row(where: str, row: object) -> ClipBoxes:
    if not isinstance(row, dict) or not {"file", "class", "bbox"} <= row.keys():
        raise ValueError(f"{where}: must be an object with file, class and bbox")
    if not VGGSS_ID.fullmatch(str(row["file"])):
        raise ValueError(f"{where}: file={row['file']!r} is not <YouTube id>_<6-digit second>")
    boxes = []
    for box in row["bbox"] if isinstance(row["bbox"], list) else [None]:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(f"{where}: a box must be four numbers, found {box!r}")
        boxes.append((float(box[0]), float(box[1]), float(box[2]), float(box[3])))
    if not boxes:
        raise ValueError(f"{where}: no box")
    zeros = (0,) * len(boxes)
    return ClipBoxes(row["file"], tuple(boxes), 1.0, zeros, str(row["class"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass
class BoxListing(Listing):
    """A listing with the boxes of its test split, and the pictures they are in."""

    boxes: Sequence[ClipBoxes] = ()
    frames: Files | None = None


def read_flickr_soundnet(root: Path) -> BoxListing:
    """flickr_test.csv (id, a number that is not used) and Annotations/<id>.xml."""
    path = root / "flickr_test.csv"
    boxes = []
    for line, values in csv_rows(path):
        name = plain_name(path, line, values[0])
        if len(values) > 2:
            bad_line(path, line, "id,number", ",".join(values))
        boxes.append(read_flickr_boxes(root / "Annotations" / f"{name}.xml"))
    return _listing(root, boxes, [], {})


def read_vggss(root: Path) -> BoxListing:
    """vggss.json; vggss_heard_test.csv and vggss_unheard_test.csv, where they are, as splits."""
    boxes = read_vggss_boxes(root / "vggss.json")
    names = sorted({row.label for row in boxes})
    known = {row.id for row in boxes}
    splits: dict[str, list[str]] = {}
    for split in ("heard", "unheard"):
        path = root / f"vggss_{split}_test.csv"
        if path.exists():
            rows = list(csv_rows(path))
            for line, values in rows:
                if values[0] not in known:
                    bad_line(path, line, "an id of vggss.json", values[0])
            splits[split] = [values[0] for _, values in rows]
    return _listing(root, boxes, names, splits)


def _listing(
    root: Path, boxes: Sequence[ClipBoxes], names: Sequence[str], splits: dict[str, list[str]]
) -> BoxListing:
    sounds = Files(root / "audio", SOUND_EXTENSIONS)
    listing = BoxListing(
        label_classes((as_mid(name), name) for name in names),
        list(_box_entries(boxes, sounds, splits)),
        kind="sound",
        boxes=boxes,
        frames=Files(root / "frames", PICTURES),
    )
    listing.notes += sounds.notes()
    empty = sum(all(x0 >= x1 or y0 >= y1 for x0, y0, x1, y1 in b.pixels(224)) for b in boxes)
    if empty:
        listing.notes.append(f"{empty} clips have no box with an area: they always score 0")
    return listing


def _box_entries(
    boxes: Sequence[ClipBoxes], sounds: Files, splits: dict[str, list[str]]
) -> Iterator[Entry]:
    by_id = {row.id: row for row in boxes}
    for split, names in {"test": list(by_id), **splits}.items():
        for name in names:
            found = sounds.find(name)
            label = (as_mid(by_id[name].label),) if by_id[name].label else ()
            media = found or str(sounds.folder / name)
            yield Entry(name, media, split, label, found=found is not None)
