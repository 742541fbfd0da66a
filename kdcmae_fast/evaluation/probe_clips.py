"""The clips of a probe: which lists it trains and tests on, each clip read only once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcmae_fast.data import Clip, ClipDataset, ClipFrames, open_dataset
from kdcmae_fast.data.folder import VideoFolder
from kdcmae_fast.data.manifest import label_names
from kdcmae_fast.data.shards.layout import LABELS
from kdcmae_fast.data.synthetic import CLASS_NAMES
from kdcmae_fast.evaluation.folds import Fold, check_folds, stratified_folds
from kdcmae_fast.evaluation.source import EvaluationSource, Opened, open_source

FOLD = "{fold}"  # in a path: 1, 2, ...


class Part(NamedTuple):
    """The first `num_clips` clips of a list, and what metrics.json calls it."""

    dataset: ClipDataset
    num_clips: int
    name: str


class ProbeClips(NamedTuple):
    """What a probe is made on.

    clips: every clip once. folds: numbers of `clips` (train, test) of each fold; None: `num_folds`
    are to be drawn from all clips. opened: the model and the settings.
    """

    opened: Opened
    clips: "EachOnce"
    folds: list[Fold] | None
    num_folds: int
    train_of: str
    test_of: str

    def usable(
        self, numbers: NDArray[np.int64], labels: NDArray[np.int64], seed: int
    ) -> list[Fold]:
        """The folds in terms of the clips that could be read: `numbers` (N,) of `clips`, sorted."""
        if self.folds is None:
            return stratified_folds(labels, self.num_folds, seed)
        return [
            Fold(*(np.searchsorted(numbers, part[np.isin(part, numbers)]) for part in fold))
            for fold in self.folds
        ]


def check_probe(found: ProbeClips, seed: int) -> None:
    """ValueError for folds that no probe can be made of, as far as the lists tell."""
    count = len(found.clips)
    if found.folds is None and found.num_folds > count:
        raise ValueError(f"--folds {found.num_folds}: there are {count} clips")
    if found.clips.labels is None:
        return
    classes, labels = np.unique(found.clips.labels, return_inverse=True)
    numbers = classes.dtype.kind == "i"
    names = class_names(found.opened, classes) if numbers else classes.tolist()
    check_folds(found.usable(np.arange(count), labels, seed), labels, names)


class EachOnce:
    """Clips of several lists as one dataset, those of the same id once.

    Errors: ValueError for an id that comes twice in one list, or with other labels in another.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._clips: list[tuple[ClipDataset, int]] = []
        self._numbers: dict[str, int] = {}
        labels: dict[str, tuple] = {}
        self.labels_known = True  # without reading a clip
        self.numbers: list[NDArray[np.int64]] = []  # of each part's clips
        for part in parts:
            known = _labels_of(part)
            rows = [part.dataset.video_id(index) for index in range(part.num_clips)]
            if len(set(rows)) < len(rows):
                twice = Counter(rows).most_common(1)[0][0]
                raise ValueError(f"{part.name}: clip {twice} is listed twice")
            self.labels_known = self.labels_known and known is not None
            for index, name in enumerate(rows):
                if name not in self._numbers:
                    self._numbers[name] = len(self._clips)
                    self._clips.append((part.dataset, index))
                if known is not None and labels.setdefault(name, known[index]) != known[index]:
                    raise ValueError(f"{part.name}: clip {name} has other labels in another list")
            self.numbers.append(np.array([self._numbers[name] for name in rows]))
        self._labels = labels

    @property
    def labels(self) -> NDArray[Any] | None:
        """(N,) class numbers, of shards class ids; None where a clip must be read for its own."""
        if not self.labels_known:
            return None
        return np.array([self._labels[name][0] for name in self._numbers])

    def __len__(self) -> int:
        return len(self._clips)

    def video_id(self, index: int) -> str:
        """The clip's name in its list."""
        dataset, own = self._clips[index]
        return dataset.video_id(own)

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as `epoch` sees it."""
        dataset, own = self._clips[index]
        return dataset.read(own, epoch)._replace(index=index)

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """All frames of clip `index`."""
        dataset, own = self._clips[index]
        clip = dataset.read_frames(own, num_frames, only=only, epoch=epoch)
        return clip._replace(index=index)


def probe_clips(
    source: EvaluationSource,
    *,
    folds: int | None = None,
    test_path: str | None = None,
    test_clips: int | None = None,
) -> ProbeClips:
    """Open the model and the lists that a probe needs; see `probe` for what the arguments mean."""
    if folds is not None and folds < 2:
        raise ValueError(f"--folds {folds} must be at least 2")
    if any(FOLD in override for override in source.overrides):
        return _of_fold_lists(source, folds, test_path, test_clips)
    opened = open_source(source, needs=())
    if folds is not None:
        if test_path is not None or test_clips is not None:
            given = "--test-path" if test_path is not None else "--test-clips"
            raise ValueError(
                f"{given} and --folds: folds are drawn from one list; for lists of each fold put "
                "{fold} into data.path and --test-path"
            )
        part = _part(opened, opened.dataset, source.num_clips)
        name = f"{part.name}, drawn folds"
        return ProbeClips(opened, EachOnce([part]), None, folds, name, name)
    if opened.data.source == "synthetic":
        if source.split is not None or test_path is not None:
            given = "--split" if source.split is not None else "--test-path"
            raise ValueError(
                f"{given}: a probe of synthetic clips trains on the training clips and is tested "
                "on the held-out ones (--split goes with --folds)"
            )
        datasets = [
            open_dataset(opened.data, opened.model.config, seed=opened.seed, split=split)
            for split in ("train", "heldout")
        ]
        train = _part(opened, datasets[0], source.num_clips)._replace(name="synthetic, train")
        test = _part(opened, datasets[1], test_clips)
    elif test_path is None:
        raise ValueError(
            "--test-path is missing: the list to test on (data.path is the one to train on); or "
            "give --folds K to draw folds from data.path"
        )
    else:
        train = _part(opened, opened.dataset, source.num_clips)
        test = _listed(opened, test_path, test_clips)
    clips = EachOnce([train, test])
    return ProbeClips(opened, clips, [Fold(*clips.numbers)], 1, train.name, test.name)


def class_names(opened: Opened, labels: NDArray[np.int64]) -> list[str]:
    """Names of the classes `labels` (sorted numbers), from the label CSV where there is one."""
    data = opened.data
    names: dict[int, str] = {}
    if data.source == "synthetic":
        names = dict(enumerate(CLASS_NAMES))
    else:
        own = Path(data.path) / LABELS
        path = data.label_csv or (str(own) if data.source == "shards" and own.exists() else "")
        names = label_names(path) if path else {}
    return [names.get(label, str(label)) for label in labels.tolist()]


def _of_fold_lists(
    source: EvaluationSource, folds: int | None, test_path: str | None, test_clips: int | None
) -> ProbeClips:
    """Lists of each fold: {fold} in data.path and in --test-path is 1, 2, ..."""
    if test_path is None or FOLD not in test_path:
        raise ValueError(f"--test-path {test_path}: needs {FOLD} too, as data.path has it")
    first = replace(source, overrides=tuple(s.replace(FOLD, "1") for s in source.overrides))
    path = next(
        (s.partition("=")[2] for s in source.overrides if s.startswith("data.path=")), test_path
    )
    opened = open_source(first, needs=())
    count = 1
    while Path(path.replace(FOLD, str(count + 1))).exists():
        count += 1
    if folds is not None and folds != count:
        raise ValueError(f"--folds {folds}: there are {count} lists {path}")
    parts = []
    for number in map(str, range(1, count + 1)):
        parts += [
            _listed(opened, path.replace(FOLD, number), source.num_clips),
            _listed(opened, test_path.replace(FOLD, number), test_clips),
        ]
    clips = EachOnce(parts)
    pairs = zip(clips.numbers[::2], clips.numbers[1::2], strict=True)
    return ProbeClips(opened, clips, [Fold(*pair) for pair in pairs], count, path, test_path)


def _listed(opened: Opened, path: str, num_clips: int | None) -> Part:
    data = replace(opened.data, path=path)
    dataset = open_dataset(data, opened.model.config, seed=opened.seed)
    return _part(opened._replace(data=data), dataset, num_clips)._replace(name=path)


def _part(opened: Opened, dataset: ClipDataset, num_clips: int | None) -> Part:
    name = opened.described["clips_of"]
    wanted = len(dataset) if num_clips is None else num_clips
    if wanted > len(dataset):
        raise ValueError(f"{name}: {wanted} clips wanted, it has {len(dataset)}")
    return Part(dataset, wanted, name)


def _labels_of(part: Part) -> list[tuple] | None:
    """Labels of each clip where the list tells; ValueError for a clip without, or with several."""
    if isinstance(part.dataset, VideoFolder):
        raise ValueError(
            f"{part.name}: the videos of a folder have no labels; a probe needs a list with labels "
            "(data.source=manifest, shards or sounds)"
        )
    if not hasattr(part.dataset, "label_sets"):
        return None
    labels = [tuple(own) for own in islice(part.dataset.label_sets(), part.num_clips)]
    for index, own in enumerate(labels):
        name = part.dataset.video_id(index)
        if not own:
            raise ValueError(
                f"{part.name}: clip {name} has no label; a probe needs a list with labels and "
                "data.label_csv=CSV (index,mid,display_name)"
            )
        if len(own) > 1:
            raise ValueError(
                f"{part.name}: clip {name} has {len(own)} labels; a probe is for one label a clip"
            )
    return labels
