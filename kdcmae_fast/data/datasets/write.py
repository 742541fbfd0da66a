"""What `kdcmae datasets` prints and writes."""

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import kdcmae_fast
from kdcmae_fast.data.datasets.boxes import BoxListing
from kdcmae_fast.data.datasets.entries import FRAME_FOLDER, Entry, Listing
from kdcmae_fast.data.datasets.known import KNOWN, find_dataset, read_dataset_lists
from kdcmae_fast.messages import require_folder

MISSING = "missing.csv"
NAMED = 5  # missing files that the text names


def datasets_table() -> str:
    """All known datasets, a line each."""
    rows = [("name", "classes", "metric", "splits")]
    rows += [
        (key, str(known.num_classes or "-"), known.metric, known.splits)
        for key, known in KNOWN.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    return "\n".join([*lines, "", "`kdcmae datasets NAME` tells the expected files and the rest."])


def dataset_text(name: str) -> str:
    """Everything known of one dataset."""
    key, known = find_dataset(name)
    lines = [f"{known.title}", "  expected under --root:"]
    lines += [f"    {line}" for line in known.layout]
    for label, text in (
        ("label CSV", known.label_csv),
        ("classes", str(known.num_classes or "none")),
        ("splits", known.splits),
        ("metric", known.metric),
        ("normalisation", known.normalisation),
        ("used by", known.used_by),
    ):
        lines.append(f"  {label}: {text}")
    lines.append(f"  lists: kdcmae datasets {key} --root DIR --output DIR")
    return "\n".join(lines)


def write_lists(name: str, root: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the lists of a dataset to `output`; returns what its metrics.json holds.

    labels.csv (index,mid,display_name). A list for each split, `fold<k>_` in front where there are
    folds: videos as <split>.csv (path,start,end,labels,id) for `kdcmae prepare`; clips in the
    CAV-MAE layout, and sound without pictures, as <split>.json in the form of its manifest.
    boxes.json where there are boxes. missing.csv: every clip of a list whose file is not there.
    """
    require_folder(output)
    key, known = find_dataset(name)
    listing = read_dataset_lists(key, root)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter[str]] = {}
    classes: set[str] = set()
    named: list[str] = []
    with contextlib.ExitStack() as stack:
        missing = csv.writer(stack.enter_context(_text_file(folder / MISSING)))
        missing.writerow(["list", "id", "looked for"])
        lists: dict[str, _ListFile] = {}
        for entry in listing.entries:
            part = f"fold{entry.fold}_{entry.split}" if entry.fold else entry.split
            if part not in lists:
                lists[part] = stack.enter_context(_list_file(folder, part, listing))
                counts[part] = Counter(clips=0, missing=0)
            if entry.found and _has_frames(entry, listing):
                lists[part].add(entry)
                counts[part]["clips"] += 1
                classes.update(entry.labels)
            else:
                missing.writerow([part, entry.id, entry.media])
                counts[part]["missing"] += 1
                if len(named) < NAMED and entry.media not in named:
                    named.append(entry.media)
    written = sorted(path.path.name for path in lists.values())
    written += _write_more(folder, listing)
    metrics = {
        "command": "datasets",
        "version": kdcmae_fast.__version__,
        "dataset": key,
        "root": str(root),
        "classes": len(listing.classes),
        "classes_expected": known.num_classes,
        "classes_with_clips": len(classes),
        "lists": {part: dict(count) for part, count in counts.items()},
        "files": [*written, MISSING],
        "missing_examples": named,
        "notes": _notes(listing, known.num_classes),
    }
    _write_json(folder / "metrics.json", metrics)
    return metrics


def lists_text(metrics: dict[str, Any], output: str | Path) -> str:
    """The count table of `write_lists` and what to do next."""
    width = max(map(len, metrics["lists"]), default=4)
    lines = [f"{'list':{width}}  {'clips':>9}  {'missing':>9}"]
    for part, count in metrics["lists"].items():
        lines.append(f"{part:{width}}  {count['clips']:>9,}  {count['missing']:>9,}")
    lines.append(
        f"{metrics['classes_with_clips']} of {metrics['classes']} classes have clips"
        + (f"; expected {metrics['classes_expected']}" if metrics["classes_expected"] else "")
    )
    if examples := metrics["missing_examples"]:
        lines.append(f"missing (all are in {Path(output) / MISSING}), the first:")
        lines += [f"  {path}" for path in examples]
    lines += [f"note: {note}" for note in metrics["notes"]]
    lines.append(f"wrote {', '.join(metrics['files'])} and metrics.json to {output}")
    videos = [name for name in metrics["files"] if name.endswith(".csv")]
    videos = [name for name in videos if name not in (MISSING, "labels.csv")]
    if videos:
        first = next((name for name in videos if "train" in name), videos[0])
        labels = f" --label-csv {Path(output) / 'labels.csv'}"
        lines.append(f"next: kdcmae prepare {Path(output) / first}{labels} --output DIR")
    return "\n".join(lines)


class _ListFile:
    """One list that is being written, row by row."""

    def __init__(self, path: Path, file: TextIO, cav_mae_root: str) -> None:
        self.path = path
        self.file = file
        self.cav_mae_root = cav_mae_root
        self.rows = 0
        self._csv = csv.writer(file) if path.suffix == ".csv" else None
        if self._csv is None:
            file.write('{"data": [')
        else:
            self._csv.writerow(["path", "start", "end", "labels", "id"])

    def add(self, entry: Entry) -> None:
        """Write a clip that is there."""
        media, labels = os.path.abspath(entry.media), ",".join(entry.labels)
        if self._csv is not None:
            times = ("" if time is None else f"{time:g}" for time in (entry.start, entry.end))
            self._csv.writerow([media, *times, labels, entry.id])
        else:
            row = {
                "video_id": _stem(media) if self.cav_mae_root else entry.id,
                "wav": media,
                "video_path": os.path.abspath(self.cav_mae_root) if self.cav_mae_root else "",
                "labels": labels,
            }
            self.file.write(("," if self.rows else "") + "\n" + json.dumps(row, ensure_ascii=False))
        self.rows += 1

    def finish(self) -> None:
        """Write what comes after the last clip."""
        if self._csv is None:
            self.file.write("\n]}\n")


@contextlib.contextmanager
def _list_file(folder: Path, part: str, listing: Listing) -> Iterator[_ListFile]:
    manifest = listing.kind == "sound" or listing.cav_mae_root
    path = folder / f"{part}{'.json' if manifest else '.csv'}"
    with _text_file(path) as file:
        rows = _ListFile(path, file, listing.cav_mae_root)
        yield rows
        rows.finish()


@contextlib.contextmanager
def _text_file(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name when the block ends well, and is removed otherwise."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _has_frames(entry: Entry, listing: Listing) -> bool:
    """Whether a clip in the CAV-MAE layout has its first picture; others need none."""
    root = listing.cav_mae_root
    return not root or os.path.isfile(f"{root}/{FRAME_FOLDER}/{_stem(entry.media)}.jpg")


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _write_more(folder: Path, listing: Listing) -> list[str]:
    """labels.csv and boxes.json, where there are any; their names."""
    written = []
    if listing.classes:
        with _text_file(folder / "labels.csv") as file:
            table = csv.writer(file)
            table.writerow(["index", "mid", "display_name"])
            table.writerows(listing.classes)
        written.append("labels.csv")
    if isinstance(listing, BoxListing) and listing.frames is not None:
        rows = [
            {
                "id": row.id,
                "picture": listing.frames.find(row.id),
                "label": row.label,
                "frame": row.frame,
                "boxes": row.boxes,
                "annotators": row.annotators,
            }
            for row in listing.boxes
        ]
        _write_json(folder / "boxes.json", rows)
        written.append("boxes.json")
        if absent := sum(row["picture"] is None for row in rows):
            listing.notes.append(f"{absent} of {len(rows)} clips have no picture in frames/")
    return written


def _notes(listing: Listing, expected: int) -> list[str]:
    notes = list(listing.notes)
    if expected and len(listing.classes) != expected:
        notes.append(f"{len(listing.classes)} classes found, the published dataset has {expected}")
    if listing.kind == "sound":
        notes.append(
            "sound without pictures: train and probe with data.source=sounds (configs/fsdd.yaml)"
        )
    return notes


def _write_json(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    with _text_file(path) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
