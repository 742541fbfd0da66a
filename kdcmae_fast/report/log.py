"""The records of a run's log.jsonl, whatever state the run left it in."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from kdcmae_fast.report.reading import MAX_LOG, number, read_text

LARGEST, SMALLEST = 1e30, 1e-30  # beyond them a figure counts as not finite, or as 0
LAST_STEP = 1e15

Curve = list[tuple[float, float]]  # (step, value), in order of step


@dataclass
class Log:
    """curves: of each figure, its (step, value) pairs. problems: what could not be read."""

    curves: dict[str, Curve] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 for an empty log."""
        return int(max((curve[-1][0] for curve in self.curves.values()), default=0))

    def last(self, name: str) -> float | None:
        """The last value of a figure."""
        curve = self.curves.get(name)
        return curve[-1][1] if curve else None


def read_log(path: Path) -> Log:
    """Curves of every figure in a log.jsonl; `Unreadable` if there is no such file.

    Where a step comes twice (a resumed run) the later line counts. Lines that are no records and
    values that are no finite numbers are left out, and `problems` says so.
    """
    body = read_text(path, MAX_LOG)
    lines = body.splitlines()
    found: dict[str, dict[float, float]] = {}
    damaged: list[int] = []
    lost: dict[str, int] = {}
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        step = number(record.get("step")) if record else None
        if record is None or step is None or not abs(step) < LAST_STEP:
            if place < len(lines) or body.endswith("\n"):  # else the line a stopped run was writing
                damaged.append(place)
            continue
        for name, value in record.items():
            figure = number(value)
            if name == "step" or figure is None:
                continue
            if abs(figure) < LARGEST:
                found.setdefault(name, {})[step] = figure if abs(figure) > SMALLEST else 0.0
            else:
                lost[name] = lost.get(name, 0) + 1
    problems = []
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        problems.append(f"{path.name}: no record in line {some} ({len(damaged)} left out)")
    for name, times in lost.items():
        problems.append(f"{path.name}: {name} is not finite at {times} of the logged steps")
    return Log({name: sorted(values.items()) for name, values in found.items()}, problems)


def _record(line: str) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
