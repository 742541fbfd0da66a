"""`Check`: one finding, and how findings are told."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Result = Literal["ok", "warning", "error"]

EXAMPLES = 3  # of a finding that the table names
KEPT = 100  # examples of a finding that doctor.json keeps


@dataclass
class Check:
    """What was looked at, and what was found.

    result: "error" stops a run, or a shard is damaged; "warning" does not. count: clips (or files)
    concerned. detail: one line. examples: the first of them. advice: what to do next.
    """

    name: str
    result: Result
    count: int
    detail: str
    examples: list[str] = field(default_factory=list)
    advice: str = ""

    def __post_init__(self) -> None:
        self.examples = self.examples[:KEPT]


def share(count: int, total: int) -> str:
    """`count` of `total` in percent."""
    return f"{count / total:.1%}" if total else "none"


def first_lines(items: Iterable[str], limit: int = KEPT) -> list[str]:
    """The first `limit` items, each on one line."""
    return [" ".join(str(item).split()) for _, item in zip(range(limit), items, strict=False)]


def checks_table(checks: Sequence[Check]) -> str:
    """All findings for a terminal; examples and advice below those that are not ok."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'check':{width}}  {'result':7}  {'count':>9}"]
    for check in checks:
        lines.append(
            f"{check.name:{width}}  {check.result:7}  {check.count:>9,}  {check.detail}".rstrip()
        )
        if check.result == "ok":
            continue
        lines += [f"{'':{width}}    {example}" for example in check.examples[:EXAMPLES]]
        if check.advice:
            lines.append(f"{'':{width}}    -> {check.advice}")
    return "\n".join(lines)
