"""Figures as text, and Markdown tables of them."""

from collections.abc import Sequence

from kdcmae_fast.bench.rows import PUBLISHED, GroupRun


def comparison(
    groups: Sequence[tuple[str, GroupRun]],
    providers: Sequence[str],
    modes: Sequence[str] | None = None,
) -> list[str]:
    """A line per (label, group), a column per provider: medians of its modes, speed in the last."""
    cells = []
    for label, found in groups:
        own = modes or tuple(found.modes)
        line = [label, " / ".join(own)]
        for provider in providers:
            rows = [found.get(provider, mode) for mode in own]
            text = " / ".join(milliseconds(row.median_ms) if row else "-" for row in rows)
            speed = found.speed(provider, own[-1])
            if speed is not None and provider != PUBLISHED:
                text += f" ({times(speed)})"
            line.append(text if any(rows) else "")
        cells.append(line)
    return markdown(["op", "ms of", *providers], cells)


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text; columns without any figure are left out."""
    kept = [place for place in range(len(head)) if place == 0 or any(line[place] for line in cells)]
    rule = ["---", *["---:"] * (len(kept) - 1)]
    lines = [[head[place] for place in kept], rule]
    lines += [[line[place] for place in kept] for line in cells]
    return ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines]


def milliseconds(value: float) -> str:
    """Three digits or so: 388, 64.7, 5.09, 0.514, 0.0123."""
    for limit, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if value >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def times(value: float) -> str:
    """A ratio, with two decimals where a win and a loss lie close together."""
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def megabytes(count: float) -> str:
    value = count / 1e6
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
