"""UCF101 and HMDB51: short action videos with three official train and test splits."""

import re
from collections.abc import Iterator
from pathlib import Path

from kdcmae_fast.data.datasets.entries import (
    Entry,
    Files,
    Listing,
    as_mid,
    bad_line,
    label_classes,
    media_files,
    plain_name,
    text_lines,
)

SPLITS = (1, 2, 3)
HMDB_LIST = re.compile(r"(?P<label>.+)_test_split(?P<fold>[123])\.txt")
HMDB_MARKS = {"0": "", "1": "train", "2": "test"}  # 0: not used in this split


def read_ucf101(root: Path) -> Listing:
    """ucfTrainTestlist: classInd.txt (from 1), trainlist01..03.txt, testlist01..03.txt."""
    lists = root / "ucfTrainTestlist"
    names: list[str] = []
    for line, text in text_lines(lists / "classInd.txt"):
        number, _, name = text.partition(" ")
        if number != str(len(names) + 1) or not name:
            bad_line(lists / "classInd.txt", line, f"`{len(names) + 1} ClassName`", text)
        names.append(name)
    rows = [
        (*row, split, fold)
        for fold in SPLITS
        for split in ("train", "test")
        for row in _ucf_list(lists / f"{split}list{fold:02d}.txt", names, split == "train")
    ]
    files, cav_mae_root = media_files(root, "UCF-101", "videos", depth=2)
    entries = (_entry(files, label, name, split, fold) for label, name, split, fold in rows)
    classes = label_classes((as_mid(name), name) for name in names)
    return Listing(classes, entries, cav_mae_root=cav_mae_root, notes=files.notes())


def _ucf_list(path: Path, names: list[str], numbered: bool) -> Iterator[tuple[str, str]]:
    """Class and file name of each line: `Class/v_Class_g01_c01.avi`, and its number in training."""
    expected = "`Class/video.avi number`" if numbered else "`Class/video.avi`"
    for line, text in text_lines(path):
        file, *number = text.split()
        label, _, name = file.partition("/")
        if label not in names or len(number) != numbered:
            bad_line(path, line, f"{expected} with a class of classInd.txt", text)
        if numbered and number[0] != str(names.index(label) + 1):
            bad_line(path, line, f"the number of {label}, {names.index(label) + 1}", number[0])
        yield label, plain_name(path, line, name)


def read_hmdb51(root: Path) -> Listing:
    """testTrainMulti_7030_splits: <class>_test_split<1..3>.txt with `video.avi 0|1|2` lines."""
    lists = root / "testTrainMulti_7030_splits"
    found = {}
    for path in sorted(lists.glob("*.txt")):
        match = HMDB_LIST.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path}: expected a name like <class>_test_split1.txt")
        found[match["label"], int(match["fold"])] = path
    labels = sorted({label for label, _ in found})
    for label in labels or ["<class>"]:
        for fold in SPLITS:
            if (label, fold) not in found:
                raise FileNotFoundError(2, "", str(lists / f"{label}_test_split{fold}.txt"))
    rows, unused = [], 0
    for (label, fold), path in found.items():
        for line, text in text_lines(path):
            name, _, mark = text.rpartition(" ")
            if mark not in HMDB_MARKS:
                bad_line(path, line, "`video.avi 0`, 1 (train) or 2 (test)", text)
            name = plain_name(path, line, name.strip())
            if split := HMDB_MARKS[mark]:
                rows.append((label, name, split, fold))
            else:
                unused += 1
    files, cav_mae_root = media_files(root, "videos", "hmdb51_org", depth=2)
    entries = (_entry(files, label, name, split, fold) for label, name, split, fold in rows)
    notes = [*files.notes(), f"{unused} lines are marked 0: not used in that split"]
    classes = label_classes((as_mid(label), label) for label in labels)
    return Listing(classes, entries, cav_mae_root=cav_mae_root, notes=notes)


def _entry(files: Files, label: str, name: str, split: str, fold: int) -> Entry:
    stem = name.rpartition(".")[0] or name
    found = files.find(f"{label}/{stem}", stem)
    media = found or str(files.folder / label / name)
    return Entry(
        f"{label}/{stem}", media, split, (as_mid(label),), fold=fold, found=found is not None
    )
