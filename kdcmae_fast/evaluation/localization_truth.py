"""Which clips have boxes, and the boxes of each: synthetic clips, Flickr-SoundNet, VGG-SS."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch

from kdcmae_fast.data import Clip, ClipDataset, ClipError, SyntheticClips
from kdcmae_fast.data.clip import ClipFrames
from kdcmae_fast.data.datasets.boxes import (
    PICTURES,
    ClipBoxes,
    read_flickr_boxes,
    read_vggss_boxes,
)
from kdcmae_fast.data.datasets.entries import EXTENSIONS, SOUND_EXTENSIONS, Files, csv_rows
from kdcmae_fast.data.media import MediaError, MediaOptions, read_sound, stretched_picture
from kdcmae_fast.evaluation.localization_scores import Truth

ENDINGS = EXTENSIONS | SOUND_EXTENSIONS


class BoxTruth(Protocol):
    """Boxes of a dataset's clips."""

    @property
    def indices(self) -> Sequence[int]:
        """Numbers of the clips that have boxes."""
        ...

    @property
    def rule(self) -> Truth:
        """How boxes make a map."""
        ...

    def boxes(self, index: int, time: float) -> ClipBoxes:
        """Boxes of clip `index` at `time` in seconds."""
        ...


class SyntheticTruth:
    """The sounding shape's box; the silent grey shapes beside it have none."""

    rule: Truth = "union"

    def __init__(self, clips: SyntheticClips) -> None:
        self.clips = clips
        self.indices = range(len(clips))

    def boxes(self, index: int, time: float) -> ClipBoxes:
        """The box where the shape is at `time`."""
        size = self.clips.img_size
        box = self.clips.truth(index).box(time, size)
        return ClipBoxes(self.clips.video_id(index), (box,), float(size), (0,))


class AnnotatedTruth:
    """Boxes of annotation files, matched to clips by name; they hold at any time of a clip.

    missing: annotated clips that the dataset does not have.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        boxes: Sequence[ClipBoxes],
        rule: Truth,
        *,
        where: str,
        allow_missing: bool = False,
    ) -> None:
        self.rule = rule
        names = {clip_name(dataset.video_id(i)): i for i in reversed(range(len(dataset)))}
        absent = [clip.id for clip in boxes if clip.id not in names]
        if len(absent) == len(boxes):
            example = dataset.video_id(0) if len(dataset) else "none"
            raise ValueError(
                f"{where}: none of its {len(boxes)} clips is in the dataset (it has "
                f"{boxes[0].id!r}, the dataset {example!r})"
            )
        if absent and not allow_missing:
            raise ValueError(
                f"{where}: {len(absent)} of {len(boxes)} clips are not in the dataset, the first "
                f"is {absent[0]}; add them, or leave them out with --allow-missing"
            )
        self.missing = absent
        self._boxes = {names[clip.id]: clip for clip in boxes if clip.id in names}
        self.indices = sorted(self._boxes)

    def boxes(self, index: int, time: float) -> ClipBoxes:
        """The clip's boxes, whatever the time."""
        return self._boxes[index]


def read_annotations(path: str, ids: str | None = None) -> tuple[list[ClipBoxes], Truth]:
    """Boxes and the rule that belongs to them, of a VGG-SS JSON file or a folder of XML files.

    path: vggss.json ("union"), one XML file, or Flickr-SoundNet's folder of them ("consensus").
    ids: CSV file whose first column names the clips to keep, as flickr_test.csv.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".xml")
        if not files:
            raise ValueError(f"--annotations {path}: there is no XML file in the folder")
    elif place.is_file():
        files = [place] if place.suffix.lower() == ".xml" else []
    else:
        raise FileNotFoundError(
            f"--annotations {path} is not there; give vggss.json or the folder of XML files"
        )
    wanted = None if ids is None else {row[0] for _, row in csv_rows(Path(ids))}
    if files:
        kept = [file for file in files if wanted is None or file.stem in wanted]
        boxes, rule = [read_flickr_boxes(file) for file in kept], "consensus"
    else:
        found = read_vggss_boxes(place)
        boxes, rule = [b for b in found if wanted is None or b.id in wanted], "union"
    if wanted is not None:
        absent = sorted(wanted - {clip.id for clip in boxes})
        if absent:
            raise ValueError(f"--ids {ids}: {path} has no boxes of {absent[0]}")
    if not boxes:
        raise ValueError(f"--annotations {path}: there are no boxes in it")
    return boxes, rule  # type: ignore[return-value]  # the two names are of Truth


class PictureClips:
    """A benchmark's clips: one picture <id>.jpg and one sound <id>.wav each.

    Pictures are stretched to img_size pixels a side, because the boxes were drawn on squares. The
    sound is taken from the middle of the file, as long as the model hears.
    """

    def __init__(
        self, names: Iterable[str], pictures: str, sounds: str, options: MediaOptions
    ) -> None:
        for option, folder in (("--frames", pictures), ("--sounds", sounds)):
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"{option} {folder} is not a folder")
        found, heard = Files(Path(pictures), PICTURES), Files(Path(sounds), SOUND_EXTENSIONS)
        self.options = options
        self._files = [
            (name, picture, sound)
            for name in names
            if (picture := found.find(name)) and (sound := heard.find(name))
        ]

    def __len__(self) -> int:
        return len(self._files)

    def video_id(self, index: int) -> str:
        """The annotation's id."""
        return self._files[index][0]

    def read(self, index: int, epoch: int) -> Clip:
        """The clip with its picture; the same in every epoch."""
        clip = self.read_frames(index)
        return Clip(clip.video_id, index, clip.waveform, clip.frames[0], -1)

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """Sound and the one picture, said to be in the middle of it."""
        if num_frames not in (None, 1):
            raise ValueError(f"num_frames={num_frames}: a clip of a picture folder has 1 frame")
        name, picture, sound = self._files[index]
        try:
            waveform, _, _ = read_sound(sound, self.options, None)
            frame = stretched_picture(picture, self.options.img_size)
        except MediaError as error:
            raise ClipError(name, str(error)) from error
        wanted = round(self.options.seconds * 16_000)
        first = max(0, len(waveform) - wanted) // 2
        waveform = waveform[first : first + wanted]
        times = np.array([len(waveform) / 2 / 16_000])
        return ClipFrames(name, index, waveform, torch.as_tensor(frame)[None], times, -1)


def clip_name(video_id: str) -> str:
    """A clip's name without folders and without a media file's ending."""
    path = PurePosixPath(video_id)
    return path.stem if path.suffix.lower() in ENDINGS else path.name
