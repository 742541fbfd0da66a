"""Findings that need the lists only: duplicates, labels, classes, overlap."""

from collections import Counter
from collections.abc import Sequence

from kdcmae_fast.data.doctor.checks import Check, Result, first_lines
from kdcmae_fast.data.doctor.lists import ClipList, ListRow, overlap
from kdcmae_fast.data.manifest import read_label_csv

FEW = 5  # clips; a class with less is named
ONE_FILE_EACH = ("manifest", "sounds")  # lists that a run reads whole, a sound file for each clip


def check_list(found: ClipList) -> list[Check]:
    """Rows that cannot be read, duplicate ids and files."""
    count = len(found.problems)
    checks = [
        Check(
            "list",
            "error" if count else "ok",
            count or len(found.rows),
            "rows that a run refuses" if count else "rows, all readable",
            first_lines(found.problems),
            "correct these rows; a run stops at the first of them" if count else "",
        )
    ]
    kinds = [("duplicate ids", "id")]
    if found.source in ONE_FILE_EACH:  # elsewhere one file may hold several clips
        kinds.append(("duplicate files", "source"))
    for name, field in kinds:
        times = Counter(getattr(row, field) for row in found.rows)
        double = [value for value, number in times.items() if number > 1 and value]
        checks.append(
            Check(
                name,
                "warning" if double else "ok",
                len(double),
                f"{field}s of more than one clip" if double else "each is there once",
                first_lines(f"{value} ({times[value]} times)" for value in double),
                "keep one row each: they weigh more in training, and reports mix them up"
                if double
                else "",
            )
        )
    return checks


def check_labels(found: ClipList) -> tuple[list[Check], dict[str, int]]:
    """Labels against the CSV, and how often each class is there (display order: most first)."""
    times = Counter(mid for row in found.rows for mid in row.mids)
    histogram = dict(times.most_common())
    if not found.label_csv:
        detail = "labels, but no label CSV: a run has no labels" if times else "no labels"
        return [Check("labels", "ok", len(times), detail)], histogram
    try:
        classes = read_label_csv(found.label_csv)
    except ValueError as error:
        advice = "give a CSV with the header index,mid,display_name"
        return [Check("labels", "error", 1, str(error), advice=advice)], histogram
    histogram = {mid: times[mid] for mid in sorted(classes, key=lambda mid: (-times[mid], mid))}
    checks = [_unknown_labels(found, classes), _empty_classes(histogram)]
    without = [row.id for row in found.rows if not row.mids]
    if without and found.source == "shards":  # a manifest without labels does not open
        detail = "clips have no label: theirs is -1"
        advice = "prepare them again from a list with labels, if they are to be classified"
        checks.append(Check("no label", "warning", len(without), detail, without, advice))
    shared = [n for n, number in Counter(classes.values()).items() if number > 1]
    expected = set(range(len(classes)))
    if shared or set(classes.values()) != expected:
        wrong = sorted({*shared, *(set(classes.values()) ^ expected)})
        checks.append(
            Check(
                "class numbers",
                "warning",
                len(wrong),
                f"of {found.label_csv} are not 0 to {len(classes) - 1}, each once",
                first_lines(map(str, wrong)),
                "number the classes from 0 without gaps",
            )
        )
    return checks, histogram


def _unknown_labels(found: ClipList, classes: dict[str, int]) -> Check:
    first = [row for row in found.rows if row.mids and row.mids[0] not in classes]
    later = [row for row in found.rows if any(mid not in classes for mid in row.mids[1:])]
    result: Result = "warning" if first or later else "ok"
    if first and found.source in ONE_FILE_EACH:
        result = "error"  # in shards they are bad clips, which the media check counts
    unknown = first or later
    names = sorted({mid for row in unknown for mid in row.mids if mid not in classes})
    detail = f"{len(classes)} classes in {found.label_csv}"
    if unknown:
        detail = f"clips with labels that {found.label_csv} does not have: {len(names)} labels"
    return Check(
        "labels",
        result,
        len(unknown),
        detail,
        first_lines(f"{row.id}: {', '.join(row.mids)}" for row in unknown),
        "take the label CSV that belongs to the list, or add the classes" if unknown else "",
    )


def _empty_classes(histogram: dict[str, int]) -> Check:
    never = [mid for mid, count in histogram.items() if count == 0]
    few = sum(0 < count < FEW for count in histogram.values())
    detail = f"never seen; {few} more have less than {FEW} clips" if never else "all classes seen"
    return Check("classes", "warning" if never else "ok", len(never), detail, first_lines(never))


def check_overlap(rows: Sequence[ListRow], others: ClipList, against: str) -> Check:
    """Clips that are in both lists, by id or by file."""
    ids, sources = overlap(rows, others.rows)
    if not others.rows:
        detail = f"{against}: no clip could be read from it"
        return Check("overlap", "error", 0, detail, first_lines(others.problems), "give a list")
    count = max(len(ids), len(sources))
    return Check(
        "overlap",
        "warning" if count else "ok",
        count,
        f"{len(ids)} ids and {len(sources)} files are in {against} too",
        first_lines([*ids, *sources]),
        "remove them from one of the lists: a test on training clips tells nothing"
        if count
        else "",
    )
