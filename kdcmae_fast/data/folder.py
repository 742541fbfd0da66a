"""A plain folder of videos as a dataset, each video decoded when it is needed."""

from collections.abc import Sequence
from pathlib import Path

from kdcmae_fast.data.clip import (
    FRAME_STREAM,
    Clip,
    ClipError,
    ClipFrames,
    checked_numbers,
    keyed_rng,
)
from kdcmae_fast.data.media import MediaError, MediaOptions
from kdcmae_fast.data.video import read_video, read_video_frames

KINDS = "3gp avi flv m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv"  # known file extensions
EXTENSIONS = frozenset(f".{kind}" for kind in KINDS.split())


class VideoFolder:
    """Every video under `path`, subfolders included, in the order of their relative paths.

    Videos longer than a clip: each epoch takes another window. Labels are unknown (-1).
    """

    def __init__(self, path: str, options: MediaOptions, *, seed: int) -> None:
        root = Path(path)
        if not path or not root.is_dir():
            raise ValueError(f"data.path={path!r} is not a folder; give the folder of videos")
        self.root = root.resolve()
        self.options = options
        self.seed = seed
        self.names = sorted(
            file.relative_to(self.root).as_posix()
            for file in self.root.rglob("*")
            if file.suffix.lower() in EXTENSIONS and file.is_file()
        )
        if not self.names:
            raise ValueError(f"data.path={path!r} holds no videos (looked for {KINDS})")

    def __len__(self) -> int:
        return len(self.names)

    def video_id(self, index: int) -> str:
        """Path of the video, relative to the folder."""
        # A name that is not UTF-8 must not break the report it is written to.
        return self.names[index].encode("utf-8", "replace").decode()

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as `epoch` sees it."""
        name = self.video_id(index)
        rng = keyed_rng(self.seed, FRAME_STREAM, epoch, index)
        try:
            waveform, frame = read_video(str(self.root / self.names[index]), self.options, rng)
        except MediaError as error:
            raise ClipError(name, str(error)) from error
        return Clip(name, index, waveform, frame, -1)

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """Sound and frames of clip `index`, CLIP_ROWS of sound or less; see ClipDataset.

        num_frames: None is data.num_frames; they are those shown in the middles of equal parts.
        """
        name = self.video_id(index)
        count = self.options.num_frames if num_frames is None else num_frames
        numbers = checked_numbers(only, count)
        rng = None if epoch is None else keyed_rng(self.seed, FRAME_STREAM, epoch, index)
        path = str(self.root / self.names[index])
        try:
            waveform, frames, times = read_video_frames(path, self.options, numbers, count, rng)
        except MediaError as error:
            raise ClipError(name, str(error)) from error
        return ClipFrames(name, index, waveform, frames, times, -1)
