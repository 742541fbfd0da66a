"""The classes of a labelled dataset, and datasets all of whose clips must have a label."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.clip import Clip, ClipDataset, ClipError, ClipFrames
from kdcmae_fast.data.manifest import read_label_csv
from kdcmae_fast.data.shards.layout import LABELS
from kdcmae_fast.data.synthetic import CLASS_NAMES, SyntheticClips

NO_LABEL = "it has no label"  # why a clip is left out


class Classes(NamedTuple):
    """Classes 0 ... C - 1. mids: their ids in lists and shards. names: for people."""

    mids: tuple[str, ...]
    names: tuple[str, ...]


def classes_of_data(data: DataConfig) -> Classes:
    """The classes that the labels of `data` are of.

    Synthetic clips: the kinds of shapes. Manifests and shards: data.label_csv, for shards by
    default the labels.csv among them. Raises ValueError naming the setting or the file where there
    are none, or their numbers are not 0 ... C - 1.
    """
    if data.source == "synthetic":
        return Classes(CLASS_NAMES, CLASS_NAMES)
    path = label_csv_of(data)
    if not path:
        raise ValueError(
            f"data.label_csv='': {data.path} has no labels of its own; give index,mid,display_name"
        )
    return read_classes(path)


def label_csv_of(data: DataConfig) -> str:
    """The label CSV that `data` names, or that lies among its shards; "" without one."""
    own = Path(data.path) / LABELS
    has_own = data.source == "shards" and not data.label_csv and own.is_file()
    return str(own) if has_own else data.label_csv


def read_classes(path: str) -> Classes:
    """The classes of a label CSV (index,mid,display_name)."""
    numbers = read_label_csv(path)
    mids = sorted(numbers, key=lambda mid: numbers[mid])
    for expected, mid in enumerate(mids):
        if numbers[mid] != expected:
            raise ValueError(
                f"data.label_csv={path}: class numbers must be 0 to {len(mids) - 1}, each once; "
                f"{mid} has {numbers[mid]}, {expected} was expected"
            )
    if not mids:
        raise ValueError(f"data.label_csv={path}: no class in it")
    with open(path, newline="", encoding="utf-8") as file:
        names = {row["mid"]: row["display_name"] or row["mid"] for row in csv.DictReader(file)}
    return Classes(tuple(mids), tuple(names[mid] for mid in mids))


class LabelledClips:
    """A dataset in which a clip without a label counts as one that cannot be used."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # as pickle asks before there is one
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def video_id(self, index: int) -> str:
        """Name of clip `index`."""
        return self.dataset.video_id(index)

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as `epoch` sees it; ClipError also where it has no label."""
        clip = self.dataset.read(index, epoch)
        if clip.label < 0:
            raise ClipError(clip.video_id, NO_LABEL)
        return clip

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """Clip `index` with several frames; ClipError also where it has no label."""
        clip = self.dataset.read_frames(index, num_frames, only=only, epoch=epoch)
        if clip.label < 0:
            raise ClipError(clip.video_id, NO_LABEL)
        return clip

    def label_sets(self) -> Iterator[tuple[Any, ...]]:
        """The labels of every clip, for balanced sampling."""
        if isinstance(self.dataset, SyntheticClips):
            scenes = (self.dataset.truth(index) for index in range(len(self)))
            return ((scene.label,) for scene in scenes)
        labels: Iterator[tuple[Any, ...]] = self.__getattr__("label_sets")()
        return labels
