"""A confusion matrix as a heat map: a table while it is small, a picture of it when it is not."""

import base64
import struct
import zlib
from collections.abc import Sequence

from kdcmae_fast.report.markup import Child, Markup, element, join, table
from kdcmae_fast.report.reading import Unreadable, number

IN_TABLE = 40  # classes
SEEN_AT_ONCE = 6  # classes from which on the pairs confused most are listed
SHOWN_PAIRS = 10
# Shares of a row from which the text must change sides to keep a contrast of 4.5: in the dark theme
# at the first, in the light theme at the second.
MIDDLE, STRONG = 0.605, 0.724
PICTURE = 580  # pixels, about, of the picture's side
LOW, HIGH = (246, 247, 248), (18, 70, 120)  # colours of the picture


def confusion(matrix: object, class_names: object) -> Markup:
    """The heat map of a matrix of counts (rows: true classes), and the pairs confused most.

    `Unreadable` if it is no square matrix of counts, or the names are not as many.
    """
    counts = _checked(matrix)
    names = _names(class_names, len(counts))
    shares = [[cell / (sum(row) or 1) for cell in row] for row in counts]
    right = sum(counts[place][place] for place in range(len(counts)))
    total = sum(map(sum, counts))
    about = element(
        "p",
        f"{right:,.0f} of {total:,.0f} clips are on the diagonal. Rows are the true classes, "
        "columns the predicted ones; colours are shares of a row.",
        class_="note",
    )
    shown = _as_table(counts, shares, names) if len(names) <= IN_TABLE else _as_picture(shares)
    pairs = _pairs(counts, names) if len(names) > SEEN_AT_ONCE else None
    return join(
        [element("h4", "Confusion matrix"), about, element("div", shown, pairs, class_="beside")]
    )


def _checked(matrix: object) -> list[list[float]]:
    if not isinstance(matrix, list) or not matrix:
        raise Unreadable("confusion: no matrix")
    counts = []
    for row in matrix:
        cells = [number(cell) for cell in row] if isinstance(row, list) else []
        if len(cells) != len(matrix) or any(cell is None or not cell >= 0 for cell in cells):
            raise Unreadable(f"confusion: not {len(matrix)} rows of {len(matrix)} counts")
        counts.append([float(cell or 0) for cell in cells])
    if not all(cell < 1e15 for row in counts for cell in row):
        raise Unreadable("confusion: counts that are not finite")
    return counts


def _names(found: object, count: int) -> list[str]:
    if found is None:
        return [str(place) for place in range(count)]
    if not isinstance(found, list) or len(found) != count:
        given = len(found) if isinstance(found, list) else "no list"
        raise Unreadable(f"confusion: {count} classes, but class_names: {given}")
    return [str(name) for name in found]


def _as_table(
    counts: Sequence[Sequence[float]], shares: Sequence[Sequence[float]], names: Sequence[str]
) -> Markup:
    rows: list[list[Child]] = []
    for place, name in enumerate(names):
        cells = []
        for column, share in enumerate(shares[place]):
            count = counts[place][column]
            style = f"--share:{share:.3f}" if share else None
            shade = "strong" if share >= STRONG else "middle" if share >= MIDDLE else None
            title = f"{name}, taken for {names[column]}: {count:,.0f} ({share:.0%})"
            shown = f"{count:,.0f}" if count else ""
            cells.append(element("td", shown, style=style, class_=shade, title=title))
        rows.append([element("span", name, title=name), *cells])
    head: list[Child] = ["", *(element("span", name, title=name) for name in names)]
    return table(head, rows, caption="Clips by true and predicted class", class_="confusion")


def _as_picture(shares: Sequence[Sequence[float]]) -> Markup:
    """An image of one pixel a cell, which the page enlarges."""
    size = len(shares)
    zoom = max(1, round(PICTURE / size))  # a whole number, so that all cells are of one size
    address = f"data:image/png;base64,{base64.b64encode(_png(shares)).decode()}"
    image = element(
        "img",
        src=address,
        alt=f"Confusion matrix of {size} classes; the pairs confused most are listed below",
        width=size * zoom,
        height=size * zoom,
        class_="matrix",
    )
    return element("figure", image)


def _png(shares: Sequence[Sequence[float]]) -> bytes:
    lines = bytearray()
    for row in shares:
        lines.append(0)  # no filter
        for share in row:
            for low, high in zip(LOW, HIGH, strict=True):
                lines.append(round(low + (high - low) * share**0.5))

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", len(shares), len(shares), 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(lines), 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def _pairs(counts: Sequence[Sequence[float]], names: Sequence[str]) -> Markup | None:
    found = [
        (count, names[true], names[predicted])
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    if not found:
        return None
    found.sort(key=lambda pair: -pair[0])
    rows: list[list[Child]] = [
        [true, predicted, f"{count:,.0f}"] for count, true, predicted in found[:SHOWN_PAIRS]
    ]
    return table(["True class", "Taken for", "Clips"], rows, caption="Confused most often")
