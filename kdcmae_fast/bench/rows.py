"""Rows of results files: one JSON object per line, one line per provider, group and mode.

`benchmarks/conftest.py` writes them. A run is one session on one machine; only rows of one run are
ever compared with each other.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PUBLISHED = "published"
MODES = ("fwd", "fwd+bwd")
REQUIRED = ("group", "provider", "median_ms", "p20_ms", "p80_ms", "device", "threads", "torch")


class Run(NamedTuple):
    """Where and with what rows were measured; equal for all rows of a session."""

    file: str  # name of the results file
    started: str  # UTC time, "" in files that do not tell
    date: str
    device: str
    threads: int
    torch: str
    commit: str
    dirty: bool  # tracked files differed from the commit

    def __str__(self) -> str:
        commit = f"{self.commit}{' with changes' if self.dirty else ''}"
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        parts = [self.device, threads, f"torch {self.torch}", self.date, f"commit {commit}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Milliseconds of one provider of a group, in one mode; `more` holds all else of the line.

    Of a GPU the device's own time between events; `more` has wall_ms and graph_ms beside it.
    """

    run: Run
    group: str
    provider: str
    mode: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    more: dict[str, Any]

    def number(self, name: str) -> float | None:
        """A further figure of the line, such as "peak_bytes"; None where it was not measured."""
        value = self.more.get(name)
        return None if value is None else float(value)


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of these files, in order. ValueError naming file and line of a bad one."""
    rows = []
    for path in map(Path, paths):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            missing = [key for key in REQUIRED if not isinstance(found, dict) or key not in found]
            if missing:
                raise ValueError(f"{path}, line {number} has no {', '.join(missing)}")
            rows.append(_row(path, found))
    return rows


def _row(path: Path, found: dict[str, Any]) -> Row:
    dated = re.search(r"\d{4}-\d{2}-\d{2}", path.name)
    run = Run(
        file=path.name,
        started=found.get("run", ""),
        date=found.get("date") or (dated.group() if dated else ""),
        device=found["device"],
        threads=found["threads"],
        torch=found["torch"],
        commit=found.get("commit", "unknown"),
        dirty=bool(found.get("dirty")),
    )
    # Before there were two modes, what could be differentiated was.
    mode = found.get("mode") or ("fwd+bwd" if "saved_for_backward_bytes" in found else "fwd")
    return Row(
        run=run,
        group=found["group"],
        provider=found["provider"],
        mode=mode,
        median_ms=found["median_ms"],
        p20_ms=found["p20_ms"],
        p80_ms=found["p80_ms"],
        more=found,
    )


class GroupRun(NamedTuple):
    """The rows of one group from one run: {mode: {provider: row}}, providers in order."""

    group: str
    run: Run
    modes: dict[str, dict[str, Row]]

    def get(self, provider: str, mode: str) -> Row | None:
        return self.modes.get(mode, {}).get(provider)

    def speed(self, provider: str, mode: str) -> float | None:
        """The published sequence's median over the provider's; None where either is missing."""
        row, published = self.get(provider, mode), self.get(PUBLISHED, mode)
        return published.median_ms / row.median_ms if row and published else None

    def full_mode(self) -> str:
        """ "fwd+bwd" where the group has it, else "fwd"."""
        return MODES[1] if MODES[1] in self.modes else MODES[0]


def group_runs(rows: Sequence[Row]) -> list[GroupRun]:
    """One entry per group and run, in order; of a row measured twice in a run the later counts."""
    found: dict[tuple[Run, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        modes = found.setdefault((row.run, row.group), {})
        modes.setdefault(row.mode, {})[row.provider] = row
    return [
        GroupRun(group, run, {mode: modes[mode] for mode in MODES if mode in modes})
        for (run, group), modes in found.items()
    ]


def latest(groups: Sequence[GroupRun]) -> dict[str, GroupRun]:
    """group -> its last run: the one later in the files, or later by its own time."""
    found: dict[str, GroupRun] = {}
    for entry in groups:
        if entry.group not in found or entry.run.started >= found[entry.group].run.started:
            found[entry.group] = entry
    return found
