"""Sound files without pictures as a dataset, for models of sound alone and for probes of sound."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kdcmae_fast.data.clip import FRAME_STREAM, Clip, ClipError, ClipFrames, keyed_rng
from kdcmae_fast.data.manifest import Entry, ListedClips, read_label_csv, read_manifest
from kdcmae_fast.data.media import MediaError, MediaOptions, read_sound

KINDS = "aif aiff flac mp3 ogg opus wav"  # known file extensions
EXTENSIONS = frozenset(f".{kind}" for kind in KINDS.split())
MIN_SECONDS = 0.1  # a spoken word may be short; a video's sound is not (`media.MIN_SECONDS`)


class SoundClips(ListedClips):
    """Sounds of a JSON list or of a folder; a sound longer than a clip: each epoch another window.

    path: a list as `kdcmae datasets` writes it for sounds, {"data": [{"video_id", "wav", "labels"},
        ...]}, or a folder, whose sound files (subfolders included) are the clips, in the order of
        their paths and without labels. label_csv: as for `ManifestClips`.
    A clip of a folder is named by its path in it. Its frame is an empty picture, (3, 0, 0).
    """

    def __init__(self, path: str, label_csv: str, options: MediaOptions, *, seed: int) -> None:
        if Path(path).is_dir():
            if label_csv:
                raise ValueError(
                    f"data.label_csv={label_csv}: data.path={path!r} is a folder, and its sounds "
                    "have no labels; give a JSON list as data.path"
                )
            entries = _folder_entries(Path(path))
        else:
            classes = read_label_csv(label_csv) if label_csv else None
            entries = read_manifest(path, classes, pictures=False)
        super().__init__(path, entries, replace(options, min_seconds=MIN_SECONDS), seed)

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index` as `epoch` sees it."""
        entry = self.entries[index]
        rng = keyed_rng(self.seed, FRAME_STREAM, epoch, index)
        try:
            waveform, _, _ = read_sound(entry.wav, self.options, rng)
        except MediaError as error:
            raise ClipError(entry.video_id, str(error)) from error
        picture = torch.empty(3, 0, 0, dtype=torch.uint8)
        return Clip(entry.video_id, index, waveform, picture, entry.label, entry.classes)

    def read_frames(
        self,
        index: int,
        num_frames: int | None = None,
        *,
        only: Sequence[int] | None = None,
        epoch: int | None = None,
    ) -> ClipFrames:
        """Raises ValueError: there are no pictures."""
        raise ValueError(
            f"data.source=sounds: {self.video_id(index)} has no pictures, and this needs them"
        )


def _folder_entries(root: Path) -> list[Entry]:
    files = sorted(
        (file for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file()),
        key=lambda file: file.relative_to(root).as_posix(),
    )
    if not files:
        raise ValueError(f"data.path={str(root)!r} holds no sound files (looked for {KINDS})")
    # A name that is not UTF-8 must not break the report it is written to.
    names = (
        file.relative_to(root).as_posix().encode("utf-8", "replace").decode() for file in files
    )
    return [Entry(name, str(file), "", ()) for name, file in zip(names, files, strict=True)]
