"""The page: its frame, its contents, and the order of what is on it."""

import base64
import hashlib
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

import kdcmae_fast
from kdcmae_fast.messages import require_folder
from kdcmae_fast.report.charts import Logged, charts, colour, legend
from kdcmae_fast.report.compare import comparison, differences
from kdcmae_fast.report.evaluations import (
    bad_clips,
    evaluation_section,
    headline,
    title,
)
from kdcmae_fast.report.figures import label, write_number
from kdcmae_fast.report.markup import Child, Markup, definitions, details, element, join
from kdcmae_fast.report.media import Media
from kdcmae_fast.report.reading import MEGABYTE
from kdcmae_fast.report.run import Run, read_runs
from kdcmae_fast.report.training import facts

NAMED_RUNS = 8  # below the title; the contents name all
Entry = tuple[str, str, list[tuple[str, str]]]  # anchor, words, the same of what is below it


def write_report(
    runs: Sequence[str | Path], output: str | Path, *, max_megabytes: float = 40.0
) -> Path:
    """One HTML page on one run or several: curves, evaluations, comparison.

    runs: folders that `kdcmae pretrain` or `kdcmae finetune` wrote; every evaluation written
        inside them (a metrics.json with a "command") is shown.
    output: the page, a file ending in .html, or a folder that gets report.html.
    max_megabytes: pictures, sounds and videos that the page itself may hold; those beyond it are
        links to the files in the runs' folders.

    Returns the path of the page. Files that are missing or damaged are named on it. Raises
    ValueError for a folder that is no run, for one named twice, for an output of another kind.
    """
    path = page_path(output)
    if not max_megabytes >= 0:
        raise ValueError(f"--max-megabytes {max_megabytes} is below 0")
    require_folder(path.parent)
    found = read_runs(runs)
    media = Media(path.parent, int(min(max_megabytes, 1e6) * MEGABYTE))
    body = page(found, media)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, body)
    return path


def page_path(output: str | Path) -> Path:
    """The file to write; ValueError unless it is one of .html."""
    path = Path(output)
    if path.is_dir():
        path = path / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: give a file ending in .html, or an existing folder")
    if path.is_dir():
        raise ValueError(f"--output {output}: {path} is a folder")
    return path


def page(runs: Sequence[Run], media: Media) -> str:
    """The whole page as text."""
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections, entries = _sections(runs, media)
    written = f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC"
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data: 'self' file:; media-src data: 'self' file:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{name} · kdcmae report"),
        Markup(f"<style>{_resource('style.css')}</style>"),
    )
    body = element(
        "body",
        element("a", "To the contents of the page", href="#main", class_="skip"),
        element(
            "header",
            element("p", "kdcmae report", class_="kind"),
            element("h1", name),
            element("p", _subtitle(runs), class_="subtitle"),
        ),
        element("div", _contents(entries), element("main", sections, id="main"), class_="columns"),
        element("footer", _footer(media, written)),
        Markup(f"<script>{script}</script>"),
    )
    whole = element("html", head, body, lang="en")
    return f"<!doctype html>\n{whole}\n"


def _sections(runs: Sequence[Run], media: Media) -> tuple[list[Markup], list[Entry]]:
    """The sections of the page, and what its table of contents says of them."""
    sections, entries = [], []
    if len(runs) > 1:
        sections.append(_compared(runs))
        below = [("figures", "Figures"), ("curves", "Curves"), ("settings", "Settings")]
        entries.append(("compared", "Side by side", below))
    for place, run in enumerate(runs):
        anchor = f"run-{place + 1}"
        section, below = _run_section(run, place, anchor, media, single=len(runs) == 1)
        sections.append(section)
        entries.append((anchor, "Overview" if len(runs) == 1 else run.name, below))
    return sections, entries


def _compared(runs: Sequence[Run]) -> Markup:
    logs = [Logged(run.name, place, run.log) for place, run in enumerate(runs) if run.log]
    curves = join([legend(logs), charts(logs)])
    return element(
        "section",
        element("h2", "Side by side"),
        element("section", comparison(runs), id="figures", aria_label="Figures"),
        element("section", element("h3", "Curves"), curves, id="curves"),
        element("section", element("h3", "Settings"), differences(runs), id="settings"),
        id="compared",
    )


def _run_section(
    run: Run, place: int, anchor: str, media: Media, *, single: bool
) -> tuple[Markup, list[tuple[str, str]]]:
    """One run: what it is, its figures at a glance, its curves, its evaluations."""
    below: list[tuple[str, str]] = []
    parts: list[Child] = []
    if run.log is not None and run.log.curves:
        drawn = charts([Logged(run.name, place, run.log)])
        if not single:  # the curves of all runs are above
            drawn = details("Curves of this run alone", drawn)
        parts.append(element("section", element("h3", "Training"), drawn, id=f"{anchor}-training"))
        below.append((f"{anchor}-training", "Training"))
    several = [evaluation.command for evaluation in run.evaluations]
    for number, evaluation in enumerate(run.evaluations, 1):
        link = f"{anchor}-{number}"
        parts.append(evaluation_section(run, place, evaluation, media, link))
        words = title(evaluation)
        if several.count(evaluation.command) > 1:
            words += f" ({evaluation.place or 'at the top'})"
        below.append((link, words))
    heading = "Overview" if single else run.name
    swatch = None if single else element("span", class_=f"swatch {colour(place)}")
    section = element(
        "section",
        element("h2", swatch, heading),
        _glance(run, anchor),
        facts(run),
        bad_clips((run.metrics or {}).get("bad_clips")),
        _problems(run),
        *parts,
        id=anchor,
        class_="run",
    )
    return section, below


def _glance(run: Run, anchor: str) -> Markup | None:
    """The headline figures of every evaluation, each a link to its section."""
    cards = []
    for number, evaluation in enumerate(run.evaluations, 1):
        figures = dict(list(headline(evaluation.metrics).items())[:4])
        if figures:
            shown = {label(name): write_number(value, name) for name, value in figures.items()}
            link = element("a", title(evaluation), href=f"#{anchor}-{number}")
            cards.append(element("li", element("h3", link), definitions(shown, "few")))
    return element("ul", cards, class_="glance") if cards else None


def _problems(run: Run) -> Markup | None:
    if not run.problems:
        return None
    listed = [element("li", problem) for problem in run.problems]
    return element(
        "div", element("b", "Left out of this report"), element("ul", listed), class_="problems"
    )


def _subtitle(runs: Sequence[Run]) -> Child:
    if len(runs) > 1:
        names = [element("bdi", run.name) for run in runs[:NAMED_RUNS]]
        parts = [join([", ", name]) for name in names[1:]]
        rest = len(runs) - len(names)
        return join([names[0], *parts, f" and {rest} more" if rest else None])
    count = len(runs[0].evaluations)
    return f"{count} evaluation{'' if count == 1 else 's'}" if count else "no evaluations yet"


def _contents(entries: Sequence[Entry]) -> Markup:
    items = []
    for anchor, words, below in entries:
        inner = [element("li", element("a", name, href=f"#{link}")) for link, name in below]
        link = element("a", words, href=f"#{anchor}")
        items.append(element("li", link, element("ul", inner) if inner else None))
    return element("nav", element("ul", items), aria_label="Contents", class_="contents")


def _footer(media: Media, written: str) -> Markup:
    said = [
        element("p", f"Written {written} by kdcmae {kdcmae_fast.__version__}. "
                f"{media.embedded} pictures, sounds and videos are inside this file.")
    ]  # fmt: skip
    if media.linked:
        count = len(set(media.linked))
        said.append(
            element(
                "p",
                f"{count} more ({media.linked_megabytes():.1f} MB) are not: keep this page where "
                "it is beside the run's folder, or raise --max-megabytes.",
            )
        )
    said.append(element("p", "", id="loaded", hidden=True))
    return join(said)


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _write(path: Path, body: str) -> None:
    """Write so that a reader sees the old page or the new, never a part."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(body)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
