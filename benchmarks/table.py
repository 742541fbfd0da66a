"""Print results files as one Markdown table: python benchmarks/table.py FILE.jsonl [FILE.jsonl ...]

Speed is the published op sequence's median over the provider's, from rows of one run.
"""

import json
import sys
from pathlib import Path


def read_rows(paths: list[str]) -> list[dict]:
    """All rows, in order; a later row of the same group, provider and place replaces an earlier."""
    rows: dict[tuple, dict] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["group"], row["provider"], row["device"], row["threads"]] = row
    return list(rows.values())


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def table(rows: list[dict]) -> str:
    """A line per row, and where and with what they were measured."""
    lines = ["| op and shape | implementation | median ms | p20-p80 | speed | saved MB | peak MB |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    published = {
        (row["group"], row["device"], row["threads"]): row["median_ms"]
        for row in rows
        if row["provider"] == "published"
    }
    for row in rows:
        baseline = published.get((row["group"], row["device"], row["threads"]))
        speed = f"{baseline / row['median_ms']:.1f}x" if baseline else ""
        lines.append(
            f"| {row['group']} | {row['provider']} | {row['median_ms']:.2f} | "
            f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f} | {speed} | "
            f"{megabytes(row.get('saved_for_backward_bytes'))} | "
            f"{megabytes(row.get('peak_bytes'))} |"
        )
    where = {
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['commit']}"
        for row in rows
    }
    return "\n".join([*lines, "", *sorted(where)])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("error: name at least one results file, as in benchmarks/results/masking.jsonl")
    print(table(read_rows(sys.argv[1:])))
