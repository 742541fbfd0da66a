"""Tables of results files: only figures of one run side by side, and no figure by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdcmae_fast.bench.documents import documents, update_documents, updated_text
from kdcmae_fast.bench.report import report_text
from kdcmae_fast.bench.rows import group_runs, read_rows
from kdcmae_fast.bench.tables import read_tables, render_table
from kdcmae_fast.cli import main

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "tables.yaml"


def row(group: str, provider: str, median: float, **more: object) -> dict:
    facts = {
        "run": "2026-01-02T03:04:05+00:00", "date": "2026-01-02", "device": "A chip",
        "threads": 2, "torch": "9.9", "commit": "abc", "dirty": False, "mode": "fwd+bwd",
    }  # fmt: skip
    times = {"median_ms": median, "p20_ms": median * 0.9, "p80_ms": median * 1.1}
    return {"group": group, "provider": provider, **times, **facts, **more}


ROWS = [
    row("op B=2", "published", 10.0, saved_for_backward_bytes=5e6, peak_bytes=7e6),
    row("op B=2", "cpp", 4.0, saved_for_backward_bytes=1e6, peak_bytes=2e6, floor_share=0.5),
    row("op B=2", "torch", 12.5),
    row("op B=2", "published", 3.0, mode="fwd"),
    row("op B=2", "cpp", 1.0, mode="fwd"),
    row("op B=4", "published", 40.0),
    row("op B=4", "cpp", 41.0),
]
SPEC = """
documents: [doc.md]
results: {here: [rows.jsonl]}
tables:
  fast: {kind: speed, results: here, provider: cpp, rows: ["op *"]}
  all: {kind: providers, results: here, providers: [published, cpp, torch, triton], rows: ["op *"]}
"""


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tables.yaml").write_text(SPEC)
    (tmp_path / "doc.md").write_text("Before.\n<!-- bench:fast -->\n<!-- /bench -->\nAfter.\n")
    return tmp_path


@pytest.fixture
def kdcmae(capsys):
    """kdcmae(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


def test_committed_documents_hold_what_the_committed_rows_say():
    tables = read_tables(TABLES)
    used = set()
    for path in documents(tables):
        text = path.read_text(encoding="utf-8")
        assert updated_text(text, tables, path.name) == text, "run kdcmae bench report --update"
        used |= set(re.findall(r"<!-- bench:([\w-]+) -->", text))
    assert used == set(tables.tables), "a described table that no document shows"


def test_a_changed_figure_would_be_noticed():
    tables = read_tables(TABLES)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("<!-- bench:")
    figure = re.compile(r"\d\.\d+x").search(text, start)
    changed = text[: figure.start()] + "9.99x" + text[figure.end() :]
    assert updated_text(changed, tables, "README.md") == text


def test_speed_table_shows_wins_and_losses(folder):
    table = render_table("fast", read_tables(folder / "tables.yaml"))
    assert table.splitlines() == [
        "| op | published ms | ours ms | speed | saved MB | peak MB | of the floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `op B=2` | 10.0 | 4.00 | 2.5x | 5.0 -> 1.0 | 7.0 -> 2.0 | 50 % |",
        "| `op B=4` | 40.0 | 41.0 | 0.98x | | | |",
        "",
        "A chip, 2 threads, torch 9.9, 2026-01-02, commit abc; rows in `rows.jsonl`.",
    ]


def test_providers_table_has_a_column_for_each_that_was_measured(folder):
    table = render_table("all", read_tables(folder / "tables.yaml"))
    assert table.splitlines()[:4] == [
        "| op | ms of | published | cpp | torch |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `op B=2` | fwd / fwd+bwd | 3.00 / 10.0 | 1.00 / 4.00 (2.5x) | - / 12.5 (0.80x) |",
        "| `op B=4` | fwd+bwd | 40.0 | 41.0 (0.98x) | |",
    ]


def test_rows_of_two_runs_are_never_compared(folder):
    later = [row("op B=2", "cpp", 1.0, run="2026-01-03T00:00:00+00:00", date="2026-01-03")]
    write(folder / "rows.jsonl", ROWS + later)
    tables = read_tables(folder / "tables.yaml")
    with pytest.raises(ValueError, match=r"table fast: no published row, fwd\+bwd, of 'op B=2'"):
        render_table("fast", tables)
    runs = {entry.run.date: entry for entry in group_runs(read_rows([folder / "rows.jsonl"]))
            if entry.group == "op B=2"}  # fmt: skip
    assert runs["2026-01-02"].speed("cpp", "fwd+bwd") == 2.5
    assert runs["2026-01-03"].speed("cpp", "fwd+bwd") is None


def test_another_number_of_threads_is_another_run(folder):
    groups = group_runs(read_rows([write(folder / "t.jsonl", [
        row("op", "published", 8.0, threads=1), row("op", "cpp", 2.0, threads=2)])]))  # fmt: skip
    assert [entry.speed("cpp", "fwd+bwd") for entry in groups] == [None, None]


def test_update_rewrites_marked_tables_only_and_once(folder):
    (changed,) = update_documents(folder / "tables.yaml")
    text = changed.read_text()
    assert text.startswith("Before.\n<!-- bench:fast -->\n| op |")
    assert text.endswith("rows in `rows.jsonl`.\n<!-- /bench -->\nAfter.\n")
    assert update_documents(folder / "tables.yaml") == []


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- bench:fast -->\n", "each <!-- bench:NAME --> line needs its"),
        ("<!-- bench:fast -->\n<!-- bench:all -->\n<!-- /bench -->\n", "line needs its"),
        ("<!-- bench:none -->\n<!-- /bench -->\n", "no table 'none' is described; there are fast"),
    ],
)
def test_bad_markers_are_named_and_nothing_is_written(folder, document, message):
    (folder / "doc.md").write_text(document)
    with pytest.raises(ValueError, match=re.escape(message)):
        update_documents(folder / "tables.yaml")
    assert (folder / "doc.md").read_text() == document


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("op *", "po *", "table fast: no group of the results matches 'po *'"),
        ("kind: speed", "kind: slow", "tables.fast.kind: Input should be"),
        ("provider: cpp", "provider: cuda", "table fast: no cuda row, fwd+bwd, of 'op B=2'"),
        ("provider: cpp, ", "", "table fast: name the provider of 'op B=2'"),
        ("results: here", "results: there", "table fast: there are no results 'there'"),
        ("[doc.md]", "[cod.md]", "documents: cod.md names no file"),
    ],
)
def test_bad_descriptions_are_named(folder, old, new, message):
    (folder / "tables.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        update_documents(folder / "tables.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1 is not JSON"), ('{"group": "x"}', "line 1 has no provider, median_ms")],
)
def test_bad_rows_are_named(kdcmae, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    code, out, err = kdcmae("bench", "report", path)
    assert (code, out) == (1, "")
    assert str(path) in err and message in err and err.count("\n") == 1


def test_rows_without_a_mode_are_read_as_what_they_were(tmp_path):
    old = [{key: value for key, value in line.items() if key not in ("mode", "run", "date")}
           for line in ROWS[:3]]  # fmt: skip
    rows = read_rows([write(tmp_path / "cpu-2025-12-31.jsonl", old)])
    assert [line.mode for line in rows] == ["fwd+bwd", "fwd+bwd", "fwd"]
    assert rows[0].run.date == "2025-12-31"


def test_report_on_stdout(kdcmae, folder):
    code, out, err = kdcmae("bench", "report", folder / "rows.jsonl")
    assert (code, err) == (0, "")
    assert out == report_text([folder / "rows.jsonl"]) + "\n"
    assert "## A chip, 2 threads, torch 9.9, 2026-01-02, commit abc" in out
    assert out.index("### Summary") < out.index("| op B=4 | fwd+bwd | 40.0 | 41.0 (0.98x) | |")
    assert "| torch | fwd+bwd | 12.5 | 11.2-13.8 | 0.80x |" in out


def test_report_with_plots_and_metrics(kdcmae, folder):
    pytest.importorskip("matplotlib")
    out = folder / "out"
    code, _, err = kdcmae("bench", "report", folder / "rows.jsonl", "--output", out)
    assert (code, err) == (0, "")
    metrics = json.loads((out / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert run["groups"]["op B=2"]["fwd+bwd"]["cpp"]["speed"] == 2.5
    assert run["groups"]["op B=4"]["fwd+bwd"]["cpp"]["speed"] < 1
    report = (out / "report.md").read_text()
    assert len(metrics["pictures"]) == 3  # speed of both modes, the floor of one
    for picture in metrics["pictures"]:
        assert f"({picture})" in report
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(kdcmae, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for arguments, message in (
        (["report"], "benchmarks/results holds no *.jsonl here; name the results files"),
        (["report", "no.jsonl"], "no.jsonl: No such file or directory"),
        (["report", "rows.jsonl", "--update"], "--update takes no FILE"),
        (["report", "--update"], "benchmarks/tables.yaml: No such file or directory"),
        (["publish"], "invalid choice: 'publish'"),
    ):
        code, out, err = kdcmae("bench", *arguments)
        assert (code, out) == (1, "")
        assert message in err and err.count("\n") == 1


def test_reading_results_needs_no_torch():
    code = (
        "import sys, kdcmae_fast.bench.documents, kdcmae_fast.bench.report;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
