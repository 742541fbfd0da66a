"""What became of every input: report.json, skipped.csv, and a table for the terminal."""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcmae_fast.data.clip import SAMPLE_RATE
from kdcmae_fast.data.prepare.state import json_text, write_file

EXAMPLES = 5  # inputs named for each reason
REPORT, SKIPPED = "report.json", "skipped.csv"


@dataclass
class Report:
    """Counts over the lines that the units wrote; `inputs` is clips and skipped together."""

    clips: int = 0
    frames: int = 0
    samples: int = 0
    unlabelled: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """Lines counted."""
        return self.clips + self.reasons.total()

    def add(self, lines: Iterable[dict[str, Any]]) -> "Report":
        """Count lines; returns itself."""
        for line in lines:
            if reason := line.get("skipped"):
                row = line["id"], line["source"], reason, line["detail"]
                self.rows.append(row)
                self.reasons[reason] += 1
                named = self.examples.setdefault(reason, [])
                if len(named) < EXAMPLES:
                    named.append({key: line[key] for key in ("id", "source", "detail")})
            else:
                self.clips += 1
                self.frames += len(line["frame_times"])
                self.samples += line["num_samples"]
                self.unlabelled += not line["labels"]
        return self

    def figures(self) -> dict[str, Any]:
        """Counts for JSON; hours are of sound."""
        return {
            "inputs": self.inputs,
            "clips": self.clips,
            "skipped": dict(sorted(self.reasons.items())),
            "frames": self.frames,
            "hours": round(self.samples / SAMPLE_RATE / 3600, 4),
            "unlabelled": self.unlabelled,
        }

    def write(self, root: Path, about: dict[str, Any]) -> None:
        """report.json (counts, examples and `about`) and skipped.csv (every skipped input)."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("id", "source", "reason", "detail"))
        writer.writerows(self.rows)
        write_file(root / SKIPPED, table.getvalue().encode("utf-8", "replace"))
        content = {**self.figures(), "examples": dict(sorted(self.examples.items())), **about}
        write_file(root / REPORT, json_text(content).encode("utf-8", "replace"))

    def table(self) -> str:
        """Inputs, clips and skipped by reason, an example each."""
        lines = [f"inputs   {self.inputs:>8}", f"clips    {self.clips:>8}"]
        lines[1] += f"  {self.frames} frames, {self.samples / SAMPLE_RATE / 3600:.2f} h"
        lines.append(f"skipped  {self.reasons.total():>8}")
        width = max(map(len, self.reasons), default=0)
        for reason, count in self.reasons.most_common():
            example = self.examples[reason][0]
            text = f"{example['id']}: {example['detail']}"
            short = text if len(text) <= 100 else f"{text[:97]}..."
            lines.append(f"  {reason:{width}}  {count:>6}  {short}")
        return "\n".join(lines)

    def require_clips(self) -> None:
        """ValueError when nothing survived."""
        if not self.clips:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            first = self.rows[0]
            raise ValueError(
                f"no clip came of {self.inputs} inputs ({counts}); first: {first[1]}: {first[3]}"
            )
