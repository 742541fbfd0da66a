"""The settings as text: every field with its default and the comment beside it in config.py."""

import dataclasses
import inspect
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdcmae_fast.config import PRESETS, SYSTEMS, RunConfig
from kdcmae_fast.config_file import did_you_mean
from kdcmae_fast.finetune_config import FinetuneRunConfig


def settings_help(prefix: str = "") -> str:
    """One line per setting under `prefix` ("" is all): key = default, then unit or meaning.

    What only fine-tuning has comes after what pretraining has.

    Raises ValueError when no setting starts with `prefix`.
    """
    all_rows = list(_all_rows())
    rows = [row for row in all_rows if f"{row[0]}.".startswith(f"{prefix}." * bool(prefix))]
    if not rows:
        known = [key for key, _, _ in all_rows]
        known += {key.rpartition(".")[0]: None for key in known if "." in key}
        groups = ", ".join(field.name for field in dataclasses.fields(FinetuneRunConfig))
        hint = did_you_mean(prefix, known) or f"; the groups are {groups}"
        raise ValueError(f"there is no setting {prefix}{hint}")
    width = min(44, max(len(f"{key} = {value}") for key, value, _ in rows))
    lines = []
    group = rows[0][0].rpartition(".")[0]
    for key, value, comment in rows:
        if key.rpartition(".")[0] != group:
            group = key.rpartition(".")[0]
            lines.append("")
        lines.append(f"{f'{key} = {value}':{width}}  {comment}".rstrip())
    return "\n".join(lines)


def presets_help() -> str:
    """What each system and each preset sets in place of the defaults, one line each."""
    lines = []
    for key, table in (("name", SYSTEMS), ("preset", PRESETS)):
        for choice, sets in table.items():
            plain = " ".join(_changes("model", sets)) or "(the defaults)"
            lines.append(f"{f'{key} = {choice}':18}  {plain}")
    return "\n".join(lines)


def _changes(prefix: str, sets: Mapping[str, Any]) -> Iterator[str]:
    """`key=value` of everything in `sets` that is not its field's default."""
    for key, value in sets.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            defaults = type(value)()
            for field in dataclasses.fields(value):
                own = getattr(value, field.name)
                if own != getattr(defaults, field.name):
                    yield f"{prefix}.{key}.{field.name}={_shown(own)}"
        else:
            yield f"{prefix}.{key}={_shown(value)}"


def _all_rows() -> Iterator[tuple[str, str, str]]:
    """Settings of both kinds of run, each once."""
    seen = set()
    for row in _rows(RunConfig):
        seen.add(row[0])
        yield row
    for key, value, comment in _rows(FinetuneRunConfig):
        if key not in seen:
            yield key, value, f"fine-tuning: {comment}"


def _rows(group: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, comment) of a settings class and the groups in it."""
    hints = get_type_hints(group)
    comments: dict[str, str] = {}
    for ancestor in reversed(group.__mro__):
        if dataclasses.is_dataclass(ancestor):
            comments |= _comments(ancestor)
    groups = {}
    for field in dataclasses.fields(group):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups[f"{key}."] = hint
            continue
        parts = [comments.get(field.name, "")]
        if get_origin(hint) is Literal:
            parts.insert(0, " | ".join(map(str, get_args(hint))))
        yield key, _shown(field.default), "; ".join(part for part in parts if part)
    for inner, hint in groups.items():
        yield from _rows(hint, inner)


def _shown(value: Any) -> str:
    """As it would be written in a recipe."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value)


def _comments(group: type) -> dict[str, str]:
    """The comment at the end of each field's line in the source of a settings class."""
    found: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(group)} & set(group.__annotations__)
    source = inspect.cleandoc("\n" + inspect.getsource(group))
    first = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and not token.line[: token.start[1]].strip():
            first = token.string
        elif token.type == tokenize.COMMENT and first in names:
            if token.line[: token.start[1]].strip():
                found[first] = token.string.lstrip("# ").strip()
        elif token.type == tokenize.NEWLINE:
            first = ""
    return found
