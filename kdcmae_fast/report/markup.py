"""HTML that is escaped by construction: text becomes markup only through here.

Whatever a run's files say (video ids, settings, file names) is text to a browser, never a tag.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "source"})
# Control characters (but tab and line feed) and halves of surrogate pairs have no place in HTML.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
WORD = re.compile(r"[^\d\s.,%+\-−–∞<]")  # what neither a number nor markup begins with


class Markup(str):
    """HTML already; any other string is text."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def text(value: object) -> Markup:
    """`value` as text: escaped, unless it is `Markup`."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(UNPRINTABLE.sub("\ufffd", str(value)), quote=True))


def join(children: Child, separator: str = "") -> Markup:
    """The markup of `children`, in order; None adds nothing."""
    if children is None:
        return Markup()
    if isinstance(children, str | int | float):
        return text(children)
    return Markup(text(separator).join(join(child) for child in children if child is not None))


def element(tag: str, *children: Child, **attributes: object) -> Markup:
    """An HTML element.

    attributes: `class_="a"` and `aria_label="b"` become `class="a" aria-label="b"`; True is an
        attribute without a value, None and False leave it out.
    """
    start = tag
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        start += f" {name.rstrip('_').replace('_', '-')}"
        if value is not True:
            start += f'="{text(value)}"'
    if tag in VOID:
        return Markup(f"<{start}>")
    return Markup(f"<{start}>{join(children)}</{tag}>")


def data_block(value: object) -> Markup:
    """A `<script type="application/json">` that the page's own script may read; never run."""
    packed = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        packed = packed.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json">{packed}</script>')


def table(
    head: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    caption: str | None = None,
    class_: str | None = None,
) -> Markup:
    """A table whose first column names its rows, in a box that scrolls sideways on a phone.

    Columns of words are set to the left, columns of numbers to the right. A cell may be a `<td>`.
    """
    listed = [[join(cell) for cell in row] for row in rows]
    sides = [
        "words" if any(WORD.match(row[place]) for row in listed) else None
        for place in range(len(head))
    ]
    first = [
        element("th", cell, scope="col", class_=side)
        for cell, side in zip(head, sides, strict=True)
    ]
    body = []
    for name, *cells in listed:
        shown = [
            cell if cell.startswith("<td") else element("td", cell, class_=side)
            for cell, side in zip(cells, sides[1:], strict=True)
        ]
        body.append(element("tr", element("th", name, scope="row"), shown))
    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else None,
            element("thead", element("tr", first)),
            element("tbody", body),
        ),
        class_=f"scroll {class_}" if class_ else "scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def definitions(pairs: Mapping[str, Any], class_: str) -> Markup:
    """A `<dl>` of names and values."""
    rows = [
        element("div", element("dt", name), element("dd", value)) for name, value in pairs.items()
    ]
    return element("dl", rows, class_=class_)


def details(summary: Child, *children: Child, class_: str | None = None) -> Markup:
    """Something to unfold."""
    return element("details", element("summary", summary), *children, class_=class_)
