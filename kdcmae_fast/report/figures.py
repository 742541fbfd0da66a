"""How figures are written and named, which of them are better high, and tables of any JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdcmae_fast.report.markup import Child, Markup, definitions, details, element, join, table
from kdcmae_fast.report.reading import number

Table = tuple[str | None, dict[str, Mapping[str, Any]]]  # caption, rows

SHOWN_ROWS = 50
SHOWN_JSON = 20_000  # characters
SHOWN_DEPTH = 3
SHARES = ("r@", "accuracy", "chance", "top-", "top1", "top5", "recall", "share", "majority")
SPELLED = {"ciou": "cIoU", "iou": "IoU", "auc": "AUC", "mrr": "MRR", "ap50": "AP50"}
LOWER = ("loss", "error", "rank", "medr", "second", "distance", "mse", "mae")
NEITHER = (
    "chance", "baseline", "control", "centred", "centered", "untrained", "random", "raw", "num_",
    "majority", "visible", "clips", "steps", "samples", "folds", "classes", "seed", "offset",
    "threshold", "epoch", "another",
)  # fmt: skip


def write_number(value: float, name: str = "") -> str:
    """A figure as a person reads it: three or four digits, shares (by their name) in percent."""
    if isinstance(value, int) and abs(value) < 10**15:
        if value in (0, 1) and is_share(name):
            return f"{value:.1%}".replace("%", " %")
        return f"{value:,}"
    value = number(value) or 0.0
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if is_share(name) and 0 <= value <= 1:
        return f"{value * 100:.1f} %"
    if value and not 0.01 <= abs(value) < 1e6:
        return f"{value:.3g}"
    whole = len(str(int(abs(value))))  # digits before the point
    shown = f"{value:,.{max(0, 4 - whole)}f}"
    if "." in shown and (value == int(value) or "rank" in name.lower()):
        return shown.rstrip("0").rstrip(".")
    return shown


def write_value(value: object, name: str = "") -> str:
    """A figure, a word or nothing, as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return write_number(value, name)
    return str(value)


def label(name: str) -> str:
    """A key of metrics.json as words: `audio_to_video` is "audio → video"."""
    words = str(name).replace("_to_", " → ").replace("->", " → ").replace("_", " ")
    return " ".join(SPELLED.get(word, word) for word in words.split())


def is_share(name: str) -> bool:
    """Whether a figure of that name is a part of 1, shown in percent."""
    return any(word in name.lower() for word in SHARES)


def better(name: str) -> int:
    """1: the higher the better; -1: the lower; 0: neither, as of chance or of counts."""
    lowered = name.lower()
    if any(word in lowered for word in NEITHER):
        return 0
    return -1 if any(word in lowered for word in LOWER) else 1


def numbers(found: object) -> dict[str, float]:
    """The entries of an object that are numbers; none of anything else."""
    if not isinstance(found, Mapping):
        return {}
    return {str(name): value for name, value in found.items() if number(value) is not None}


def show(found: Mapping[str, Any], depth: int = 0) -> Markup:
    """Any JSON object for reading: plain figures first, objects that are alike in one table."""
    plain = {name: v for name, v in found.items() if _is_plain(v) and v is not None}
    tables, others = _group({name: v for name, v in found.items() if not _is_plain(v)})
    parts: list[Child] = []
    if plain:
        shown = {label(name): write_value(value, name) for name, value in plain.items()}
        parts.append(definitions(shown, "figures"))
    parts += [_matrix(*rows) for rows in tables]
    for name, value in others.items():
        parts.append(_other(name, value, depth))
    return join(parts)


def show_json(value: object) -> Markup:
    """JSON as it stands, cut after a screenful or ten."""
    shown = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    if len(shown) > SHOWN_JSON:
        shown = f"{shown[:SHOWN_JSON]}\n... ({len(shown):,} characters in all)"
    return element("pre", shown)


def rows_table(rows: Sequence[Mapping[str, Any]], caption: str) -> Markup:
    """Plain values of objects as the rows of a table, the first 50 of them."""
    keys = list(dict.fromkeys(key for row in rows for key in row if _is_plain(row[key])))
    body: list[list[Child]] = [
        [write_value(row.get(key), key) if _is_plain(row.get(key)) else "" for key in keys]
        for row in rows[:SHOWN_ROWS]
    ]
    if len(rows) > SHOWN_ROWS:
        caption = f"{caption} (the first {SHOWN_ROWS} of {len(rows):,})"
    return table([label(key) for key in keys], body, caption=caption)


def _other(name: str, value: object, depth: int) -> Markup:
    """One entry that is neither plain nor part of a table of several."""
    title = label(name)
    if isinstance(value, list) and value:
        if all(_is_plain(entry) for entry in value) and len(value) <= 12:
            shown = ", ".join(write_value(entry, name) for entry in value)
            return definitions({title: shown}, "figures")
        if all(
            isinstance(entry, Mapping) and any(map(_is_plain, entry.values())) for entry in value
        ):
            whole = all(map(_is_flat, value))
            rest = None if whole else details(f"{title}, whole", show_json(value))
            return join([rows_table(value, title), rest])
    if isinstance(value, Mapping) and value and depth < SHOWN_DEPTH:
        inner = show(value, depth + 1)
        if all(_is_table(entry) for entry in value.values()):
            return join([element("h4", title), inner])
        return details(title, inner)
    if isinstance(value, list | Mapping) and not value:
        return definitions({title: "none"}, "figures")
    return details(title, show_json(value))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_flat(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_plain, value.values()))


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_flat, value.values()))


def _group(found: Mapping[str, Any]) -> tuple[list[Table], dict[str, Any]]:
    """Tables: each entry that is one, and flat entries that share most of their keys. The rest."""
    tables: list[Table] = []
    rest: dict[str, Any] = {}
    for name, value in found.items():
        if _is_table(value):
            tables.append((label(name), dict(value)))
        elif _is_flat(value):
            for title, rows in tables:
                first = next(iter(rows.values())).keys()
                if title is None and 2 * len(first & value.keys()) >= len(first | value.keys()):
                    rows[name] = value
                    break
            else:
                tables.append((None, {name: value}))
        else:
            rest[name] = value
    return tables, rest


def _matrix(title: str | None, rows: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """A table of objects, but those that hold nothing."""
    known = {name: row for name, row in rows.items() if any(v is not None for v in row.values())}
    if not known:
        return None
    keys = list(dict.fromkeys(key for row in known.values() for key in row))
    body: list[list[Child]] = [
        [label(name), *(write_value(row[key], key) if key in row else "" for key in keys)]
        for name, row in known.items()
    ]
    return table(["", *map(label, keys)], body, caption=title)
