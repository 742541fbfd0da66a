"""Benchmark results as tables and plots: what `kdcmae bench report` runs. Needs no torch."""

from kdcmae_fast.bench.documents import update_documents, updated_text
from kdcmae_fast.bench.report import report_text, write_report
from kdcmae_fast.bench.rows import Row, Run, group_runs, read_rows
from kdcmae_fast.bench.tables import TableSpec, read_tables, render_table

__all__ = [
    "Row",
    "Run",
    "TableSpec",
    "group_runs",
    "read_rows",
    "read_tables",
    "render_table",
    "report_text",
    "update_documents",
    "updated_text",
    "write_report",
]
