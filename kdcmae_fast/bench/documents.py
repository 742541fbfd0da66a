"""Tables inside documents: everything between a pair of markers is made from results files.

<!-- bench:NAME -->
(the table NAME of the YAML file)
<!-- /bench -->
"""

import os
import re
from pathlib import Path

from kdcmae_fast.bench.tables import TableFile, read_tables, render_table

MARKED = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n.*?<!-- /bench -->", re.DOTALL)
MARKER = re.compile(r"<!-- /?bench\b[^>]*-->")


def updated_text(text: str, tables: TableFile, source: str) -> str:
    """`text` with each marked table made anew; `source` names it in errors."""
    pairs = list(MARKED.finditer(text))
    if len(MARKER.findall(text)) != 2 * len(pairs):
        raise ValueError(f"{source}: each <!-- bench:NAME --> line needs its <!-- /bench -->")

    def render(match: re.Match[str]) -> str:
        name = match["name"]
        try:
            table = render_table(name, tables)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return f"<!-- bench:{name} -->\n{table}\n<!-- /bench -->"

    return MARKED.sub(render, text)


def documents(tables: TableFile) -> list[Path]:
    """The files that may hold marked tables. ValueError for a pattern without any."""
    found = []
    for pattern in tables.documents:
        files = sorted(tables.folder.glob(pattern))
        if not files:
            raise ValueError(f"documents: {pattern} names no file in {tables.folder}")
        found += [Path(os.path.normpath(file)) for file in files]
    return found


def update_documents(path: str | Path) -> list[Path]:
    """Rewrite the marked tables that the YAML file `path` describes; returns the files changed."""
    tables = read_tables(path)
    texts = {file: file.read_text(encoding="utf-8") for file in documents(tables)}
    updated = {file: updated_text(text, tables, str(file)) for file, text in texts.items()}
    changed = [file for file, text in texts.items() if updated[file] != text]
    for file in changed:
        file.write_text(updated[file], encoding="utf-8")
    return changed
