"""AudioSet, VGGSound and Kinetics: lists of YouTube segments."""

from collections.abc import Iterator
from pathlib import Path

from kdcmae_fast.data.datasets.entries import (
    YOUTUBE_ID,
    Entry,
    Files,
    LabelClass,
    Listing,
    as_mid,
    bad_line,
    csv_rows,
    csv_table,
    label_classes,
    media_files,
    seconds,
)

VGGSOUND_SECONDS = 10.0
KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "test": "test"}
KINETICS_SOUND = (
    "blowing_nose", "blowing_out_candles", "bowling", "chopping_wood", "dribbling_basketball",
    "laughing", "mowing_lawn", "playing_accordion", "playing_bagpipes", "playing_bass_guitar",
    "playing_clarinet", "playing_drums", "playing_guitar", "playing_harmonica", "playing_keyboard",
    "playing_organ", "playing_piano", "playing_saxophone", "playing_trombone", "playing_trumpet",
    "playing_violin", "playing_xylophone", "ripping_paper", "shoveling_snow", "shuffling_cards",
    "singing", "stomping_grapes", "strumming_guitar", "tap_dancing", "tapping_guitar",
    "tapping_pen", "tickling",
)  # fmt: skip


def read_audioset(root: Path, lists: tuple[str, ...], split: str) -> Listing:
    """Segments of `lists`, CSV files with a header in `# ` lines; labels in one quoted field."""
    labels = root / "class_labels_indices.csv"
    classes = [
        LabelClass(int(row["index"]), row["mid"], row["display_name"])
        if row["index"].isdecimal()
        else bad_line(labels, line, "the number of a class", row["index"])
        for line, row in csv_table(labels, "index", "mid", "display_name")
    ]
    for name in lists:
        (root / name).open().close()  # all of them, before the media are looked for
    files, cav_mae_root = media_files(root, "videos", "video")
    listing = Listing(classes, (), cav_mae_root=cav_mae_root)
    known = {row.mid for row in classes}
    listing.entries = (
        entry for name in lists for entry in _audioset_entries(root / name, split, known, files)
    )
    listing.notes += files.notes()
    return listing


def _audioset_entries(path: Path, split: str, known: set[str], files: Files) -> Iterator[Entry]:
    for line, values in csv_rows(path, comments=True):
        if len(values) != 4:
            bad_line(path, line, 'YTID, start, end, "labels"', ", ".join(values))
        name, first, last, labels = values
        start, end = seconds(path, line, first), seconds(path, line, last)
        mids = tuple(labels.split(","))
        if not YOUTUBE_ID.fullmatch(name) or end <= start:
            bad_line(path, line, "a YouTube id, and an end after the start", ", ".join(values))
        if unknown := [mid for mid in mids if mid not in known]:
            bad_line(path, line, "labels of class_labels_indices.csv", ",".join(unknown))
        yield _segment(files, name, start, end, split, mids)


def _segment(
    files: Files, name: str, start: float, end: float, split: str, labels: tuple[str, ...]
) -> Entry:
    """A segment of video `name`: cut already under one of the usual names, or still whole."""
    whole = f"{name}_{start:06.0f}"
    thousandths = f"{name}_{start * 1000:.0f}_{end * 1000:.0f}"
    cut = files.find(
        whole, f"{name}_{start:.3f}", thousandths, f"{name}_{start:g}_{end:g}", f"{name}_{start:g}"
    )
    if cut is not None:
        return Entry(whole, cut, split, labels)
    video = files.find(name)
    return Entry(
        whole,
        video or str(files.folder / whole),
        split,
        labels,
        start,
        end,
        found=video is not None,
    )


def read_vggsound(root: Path) -> Listing:
    """vggsound.csv: YouTube id, start second, label, train or test; no header."""
    path = root / "vggsound.csv"
    rows = []
    for line, values in csv_rows(path, comments=True):
        if len(values) != 4 or values[3] not in ("train", "test"):
            bad_line(path, line, "YouTube id, start, label, train or test", ",".join(values))
        if not YOUTUBE_ID.fullmatch(values[0]):
            bad_line(path, line, "a YouTube id", values[0])
        rows.append((values[0], seconds(path, line, values[1]), as_mid(values[2]), values[3]))
    classes, notes = _vggsound_classes(root, {row[2] for row in rows})
    mids = {row.display_name: row.mid for row in classes}
    files, cav_mae_root = media_files(root, "videos", "video")
    entries = (
        _segment(files, name, start, start + VGGSOUND_SECONDS, split, (mids[label],))
        for name, start, label, split in rows
    )
    return Listing(classes, entries, cav_mae_root=cav_mae_root, notes=notes + files.notes())


def _vggsound_classes(root: Path, names: set[str]) -> tuple[list[LabelClass], list[str]]:
    """Numbers of CAV-MAE's label CSV where it is there, alphabetical ones otherwise."""
    path = root / "class_labels_indices_vgg.csv"
    if not path.exists():
        classes = [
            LabelClass(index, f"vgg_{index}", name) for index, name in enumerate(sorted(names))
        ]
        return classes, [
            f"classes are numbered in alphabetical order; put {path.name} of CAV-MAE into ROOT to "
            f"have the numbers that its published checkpoints use"
        ]
    classes = []
    for line, row in csv_table(path, "index", "mid", "display_name"):
        if not row["index"].isdecimal():
            bad_line(path, line, "the number of a class", row["index"])
        classes.append(LabelClass(int(row["index"]), row["mid"], as_mid(row["display_name"])))
    if missing := sorted(names - {row.display_name for row in classes}):
        raise ValueError(f"{path}: no class {missing[0]!r}, which vggsound.csv has")
    return classes, []


def read_kinetics(root: Path, only: tuple[str, ...] = ()) -> Listing:
    """Kinetics CSV files: label,youtube_id,time_start,time_end,split.

    only: classes to keep, in this order, with _ for spaces (Kinetics-Sound); () keeps all of them.
    """
    rows, unlabelled = [], 0
    for names in (("train.csv",), ("val.csv", "validate.csv")):
        path = next((root / name for name in names if (root / name).exists()), root / names[0])
        columns = ("label", "youtube_id", "time_start", "time_end", "split")
        for line, row in csv_table(path, *columns):
            split = KINETICS_SPLITS.get(row["split"]) or bad_line(
                path, line, "train, val, validate or test", row["split"]
            )
            times = seconds(path, line, row["time_start"]), seconds(path, line, row["time_end"])
            if not YOUTUBE_ID.fullmatch(row["youtube_id"]) or times[1] <= times[0]:
                bad_line(path, line, "a YouTube id, and an end after the start", row)
            unlabelled += not row["label"]
            rows.append((row["youtube_id"], *times, row["label"].replace(" ", "_"), split))
    names_ = only or sorted({row[3] for row in rows if row[3]})
    if absent := sorted(set(names_) - {row[3] for row in rows}):
        raise ValueError(f"{root / 'train.csv'}: no clip of class {absent[0]!r}")
    classes = label_classes((as_mid(name), name.replace("_", " ")) for name in names_)
    files, cav_mae_root = media_files(root, depth=2)
    wanted = set(names_)
    entries = (_kinetics_entry(files, *row) for row in rows if row[3] in wanted)
    notes = files.notes()
    if unlabelled:
        notes.append(f"{unlabelled} rows without a label are left out")
    return Listing(classes, entries, cav_mae_root=cav_mae_root, notes=notes)


def _kinetics_entry(
    files: Files, name: str, start: float, end: float, label: str, split: str
) -> Entry:
    clip = f"{name}_{start:06.0f}_{end:06.0f}"
    found = files.find(f"{label}/{clip}", f"{label.replace('_', ' ')}/{clip}", clip)
    looked_for = str(files.folder / split / label / clip)
    return Entry(clip, found or looked_for, split, (as_mid(label),), found=found is not None)
