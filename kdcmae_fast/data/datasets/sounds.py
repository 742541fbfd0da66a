"""ESC-50, FSD50K and FSDD: sound without pictures."""

import re
from collections.abc import Iterator
from pathlib import Path

from kdcmae_fast.data.datasets.entries import (
    Entry,
    Listing,
    as_mid,
    bad_line,
    csv_rows,
    csv_table,
    label_classes,
    plain_name,
)

ESC50_FOLDS = range(1, 6)
FSDD_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)")
FSDD_TEST_TAKES = 5  # of each digit and speaker, the first
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_esc50(root: Path) -> Listing:
    """meta/esc50.csv: filename,fold,target,category; each fold is once the test set."""
    path = root / "meta" / "esc50.csv"
    rows = []
    names: dict[int, str] = {}
    for line, row in csv_table(path, "filename", "fold", "target", "category"):
        if row["fold"] not in map(str, ESC50_FOLDS) or not row["target"].isdecimal():
            bad_line(path, line, "a fold from 1 to 5 and the number of a class", row)
        name = names.setdefault(int(row["target"]), row["category"])
        if name != row["category"]:
            bad_line(path, line, f"category {name} for target {row['target']}", row["category"])
        rows.append((plain_name(path, line, row["filename"]), int(row["fold"]), row["category"]))
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: targets must be 0 to {len(names) - 1}, found {sorted(names)}")
    classes = label_classes((as_mid(names[i]), names[i]) for i in range(len(names)))
    return Listing(classes, _esc50_entries(root / "audio", rows), kind="sound")


def _esc50_entries(folder: Path, rows: list[tuple[str, int, str]]) -> Iterator[Entry]:
    found = {name: (folder / name).is_file() for name, _, _ in rows}
    for fold in ESC50_FOLDS:
        for name, own, category in rows:
            yield Entry(
                name.rpartition(".")[0] or name,
                str(folder / name),
                "test" if own == fold else "train",
                (as_mid(category),),
                fold=fold,
                found=found[name],
            )


def read_fsd50k(root: Path) -> Listing:
    """FSD50K.ground_truth: vocabulary.csv (index,label,mid; no header), dev.csv and eval.csv."""
    folder = root / "FSD50K.ground_truth"
    vocabulary = folder / "vocabulary.csv"
    names: list[tuple[str, str]] = []
    for line, values in csv_rows(vocabulary):
        if len(values) != 3 or values[0] != str(len(names)):
            bad_line(vocabulary, line, f"`{len(names)},label,mid`", ",".join(values))
        names.append((values[2], values[1]))
    known = {mid for mid, _ in names}
    rows = [
        *_fsd50k_rows(folder / "dev.csv", known, ("train", "val")),
        *_fsd50k_rows(folder / "eval.csv", known, ()),
    ]
    entries = (_fsd50k_entry(root, *row) for row in rows)
    return Listing(label_classes(names), entries, kind="sound")


def _fsd50k_rows(
    path: Path, known: set[str], splits: tuple[str, ...]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """File number, split and mids; without `splits` all are "eval"."""
    columns = ("fname", "labels", "mids", *(("split",) if splits else ()))
    for line, row in csv_table(path, *columns):
        mids = tuple(row["mids"].split(","))
        if unknown := [mid for mid in mids if mid not in known]:
            bad_line(path, line, "mids of vocabulary.csv", ",".join(unknown))
        if not row["fname"].isdecimal() or (splits and row["split"] not in splits):
            bad_line(path, line, "a file's number, and a split train or val", row)
        yield row["fname"], row["split"] if splits else "eval", mids


def _fsd50k_entry(root: Path, name: str, split: str, mids: tuple[str, ...]) -> Entry:
    part = "eval" if split == "eval" else "dev"
    path = root / f"FSD50K.{part}_audio" / f"{name}.wav"
    return Entry(name, str(path), split, mids, found=path.is_file())


def read_fsdd(root: Path) -> Listing:
    """recordings/<digit>_<speaker>_<take>.wav: takes 0 to 4 are the test set, the others train."""
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    files = sorted(folder.glob("*.wav"))
    if not files:
        raise FileNotFoundError(2, "", str(folder / "0_<speaker>_0.wav"))
    entries = []
    for file in files:
        name = FSDD_NAME.fullmatch(file.stem)
        if name is None:
            raise ValueError(f"{file}: expected a name like 7_george_12.wav (digit_speaker_take)")
        split = "test" if int(name["take"]) < FSDD_TEST_TAKES else "train"
        entries.append(Entry(file.stem, str(file), split, (DIGITS[int(name["digit"])],)))
    return Listing(label_classes((name, name) for name in DIGITS), entries, kind="sound")
