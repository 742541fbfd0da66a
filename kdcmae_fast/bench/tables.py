"""Markdown tables of results: which ones there are (a YAML file) and how they look.

The file, `benchmarks/tables.yaml` here, with paths relative to its own folder:

    documents: [../README.md]            # files with <!-- bench:NAME --> ... <!-- /bench -->
    results:
      cpu: [results/cpu.jsonl]
    tables:
      NAME:
        kind: speed                      # one provider beside the published sequence
        results: cpu
        provider: cpp                    # of kind speed
        providers: [published, cpp]      # of kind providers: one column each
        modes: [fwd+bwd]                 # default: both, where a group has both
        rows:
          - "gather_tokens *"            # groups by pattern, or one group with a label:
          - {group: masks B=64 L=512, label: masks of two views, provider: cpp}
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kdcmae_fast.bench.markdown import (
    comparison,
    markdown,
    megabytes,
    milliseconds,
    percent,
    times,
)
from kdcmae_fast.bench.rows import PUBLISHED, GroupRun, Row, group_runs, latest, read_rows


class RowSpec(BaseModel):
    """One group, what the table calls it, and whose figures it shows (kind speed)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    label: str | None = None
    provider: str | None = None


class TableSpec(BaseModel):
    """A table of the YAML file; see the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["speed", "providers"]
    results: str
    rows: tuple[str | RowSpec, ...]
    provider: str | None = None
    providers: tuple[str, ...] = ()
    modes: tuple[Literal["fwd", "fwd+bwd"], ...] | None = None


class TableFile(BaseModel):
    """The whole YAML file, and where it lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: tuple[str, ...]
    results: dict[str, tuple[str, ...]]
    tables: dict[str, TableSpec]
    folder: Path = Path(".")


class Entry(NamedTuple):
    """One line of a table."""

    label: str
    found: GroupRun
    provider: str | None


def read_tables(path: str | Path) -> TableFile:
    """The tables that a YAML file describes. ValueError naming what is wrong in it."""
    path = Path(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        found = TableFile.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise ValueError(f"{path}: {where}: {problem['msg']}") from error
    return found.model_copy(update={"folder": path.parent})


def render_table(name: str, tables: TableFile) -> str:
    """The Markdown of one table and the line that says where its figures come from."""
    if name not in tables.tables:
        known = ", ".join(tables.tables)
        raise ValueError(f"no table {name!r} is described; there are {known}")
    spec = tables.tables[name]
    if spec.results not in tables.results:
        raise ValueError(f"table {name}: there are no results {spec.results!r}")
    files = [tables.folder / file for file in tables.results[spec.results]]
    found = latest(group_runs(read_rows(files)))
    entries = [entry for row in spec.rows for entry in _entries(name, row, found)]
    draw = _speed_table if spec.kind == "speed" else _providers_table
    lines = draw(name, spec, entries)
    sources = sorted({str(entry.found.run) for entry in entries})
    shown = ", ".join(f"`{file.name}`" for file in files)
    return "\n".join([*lines, "", f"{'; '.join(sources)}; rows in {shown}."])


def _entries(name: str, row: str | RowSpec, found: dict[str, GroupRun]) -> list[Entry]:
    if isinstance(row, RowSpec):
        if row.group not in found:
            raise ValueError(f"table {name}: the results have no group {row.group!r}")
        return [Entry(row.label or f"`{row.group}`", found[row.group], row.provider)]
    groups = [group for group in found if fnmatchcase(group, row)]
    if not groups:
        raise ValueError(f"table {name}: no group of the results matches {row!r}")
    return [Entry(f"`{group}`", found[group], None) for group in groups]


def _speed_table(name: str, spec: TableSpec, entries: Sequence[Entry]) -> list[str]:
    """Published beside one provider: time, speed, kept and peak memory, share of the floor."""
    cells = []
    for entry in entries:
        provider = entry.provider or spec.provider
        if provider is None:
            raise ValueError(f"table {name}: name the provider of {entry.found.group!r}")
        for mode in spec.modes or (entry.found.full_mode(),):
            before, ours = (_row(name, entry.found, who, mode) for who in (PUBLISHED, provider))
            cells.append([
                entry.label if not spec.modes or len(spec.modes) == 1 else f"{entry.label}, {mode}",
                milliseconds(before.median_ms),
                milliseconds(ours.median_ms),
                times(before.median_ms / ours.median_ms),
                _change(before, ours, "saved_for_backward_bytes"),
                _change(before, ours, "peak_bytes"),
                percent(ours.number("floor_share")),
            ])  # fmt: skip
    head = ["op", "published ms", "ours ms", "speed", "saved MB", "peak MB", "of the floor"]
    return markdown(head, cells)


def _providers_table(name: str, spec: TableSpec, entries: Sequence[Entry]) -> list[str]:
    """One column per provider: median of each mode and, in the last of them, the speed."""
    if not spec.providers:
        raise ValueError(f"table {name}: name its providers")
    return comparison([(entry.label, entry.found) for entry in entries], spec.providers, spec.modes)


def _row(name: str, found: GroupRun, provider: str, mode: str) -> Row:
    row = found.get(provider, mode)
    if row is None:
        raise ValueError(f"table {name}: no {provider} row, {mode}, of {found.group!r}")
    return row


def _change(before: Row, ours: Row, name: str) -> str:
    """ "published -> ours" in megabytes, empty where not both were measured."""
    old, new = before.number(name), ours.number(name)
    return "" if old is None or new is None else f"{megabytes(old)} -> {megabytes(new)}"
