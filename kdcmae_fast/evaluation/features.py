"""Audio and video features of a dataset's clips, in dataset order."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import BadClip, BadClips, ClipDataset, FrontEnd, RawBatch
from kdcmae_fast.evaluation.clips import collate_frames, encode_frames
from kdcmae_fast.evaluation.processes import ALONE, Processes, SharedBadClips
from kdcmae_fast.evaluation.ranking import not_finite
from kdcmae_fast.evaluation.reading import (
    check_amounts,
    read_batches,
    read_frame_batches,
    with_bar,
)

if TYPE_CHECKING:
    from kdcmae_fast.models.cav_mae import CavMae


class ClipFeatures(NamedTuple):
    """Features of N readable clips, on the CPU in fp32, not normalised.

    video_ids: N names. sample_ids: (N,) int64 positions in the dataset. labels: (N,) int64, -1
    unknown. audio, video: (N, D), pooled; frame by frame video is (N, T, D), and so is audio of a
    model that hears segments (CAV-MAE Sync). bad: the clips that could not be used, and why.
    times: (N, T) float64 seconds of the frames from each clip's start; None for pooled features.
    """

    video_ids: tuple[str, ...]
    sample_ids: Tensor
    labels: Tensor
    audio: Tensor
    video: Tensor
    bad: tuple[BadClip, ...] = ()
    times: Tensor | None = None


def broken_clips(features: ClipFeatures) -> list[str]:
    """Names of the clips whose sound or picture features are not finite."""
    rows = {*not_finite(features.audio), *not_finite(features.video)}
    return [features.video_ids[row] for row in sorted(rows)]


def require_finite(features: ClipFeatures) -> None:
    """ValueError naming a clip whose features are not finite."""
    broken = broken_clips(features)
    if broken:
        raise ValueError(
            f"features of {len(broken)} of {len(features.video_ids)} clips are not finite, the "
            f"first is {broken[0]}; check that clip and the checkpoint"
        )


class _Rows(NamedTuple):
    """What one batch adds to `ClipFeatures`."""

    sample_ids: Tensor
    labels: Tensor
    audio: Tensor
    video: Tensor
    times: Tensor | None = None


def extract_features(
    model: "CavMae",
    dataset: ClipDataset,
    data: DataConfig,
    *,
    num_clips: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
    processes: Processes = ALONE,
    modalities: tuple[str, ...] = ("audio", "video"),
) -> ClipFeatures:
    """Encode one frame and the sound of each of the first clips, unmasked, with `model.encode`.

    model: on its device, in its dtype; its training mode is put back afterwards.
    data: fbank normalisation, worker threads, and the share of bad clips that is tolerated.
    num_clips: how many clips to take from the start (None: all). Unreadable ones among them are
        left out and named in `.bad`.
    batch_size: clips encoded at once. progress: show a bar on stderr.
    processes: those that share the work (`launched_processes`). Only the first of them gets the
        features of all; the others get none (N = 0). They do not depend on their number.
    modalities: what to encode; the features of the other one are (N, 0).

    Raises ValueError when the dataset has fewer clips, TooManyBadClips past data.max_bad_share.
    """
    wanted = len(dataset) if num_clips is None else num_clips
    check_amounts(dataset, wanted, batch_size)
    bad = SharedBadClips(len(dataset), wanted, data.max_bad_share, processes)
    batches: Iterable[RawBatch] = read_batches(
        dataset,
        num_clips=wanted,
        batch_size=batch_size,
        num_workers=data.num_workers,
        tell=bad.add,
        processes=processes,
    )
    if progress and processes.is_main:
        batches = with_bar(batches, wanted // processes.size, lambda raw: len(raw.sample_ids))
    front_end = FrontEnd(data, model.config)
    device = next(model.parameters()).device

    def encoded() -> Iterator[_Rows]:
        for raw in batches:
            batch = front_end(raw, device)
            yield _Rows(raw.sample_ids, raw.labels, *encode_pooled(model, batch, modalities))

    return _extract(model, dataset, encoded(), bad)


def extract_frame_features(
    model: "CavMae",
    dataset: ClipDataset,
    data: DataConfig,
    *,
    num_clips: int | None = None,
    num_frames: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
    processes: Processes = ALONE,
) -> ClipFeatures:
    """Encode all frames of each of the first clips and the sound around each, unmasked.

    num_frames: T of every clip (None: as many as the dataset has). data.time_base: see
    `encode_frames`. batch_size: clips at once. A model that is no CAV-MAE Sync hears a clip as a
    whole: its audio is (N, D). Everything else as in `extract_features`.
    """
    wanted = len(dataset) if num_clips is None else num_clips
    check_amounts(dataset, wanted, batch_size)
    bad = SharedBadClips(len(dataset), wanted, data.max_bad_share, processes)
    batches = read_frame_batches(
        dataset,
        num_clips=wanted,
        num_frames=num_frames,
        batch_size=batch_size,
        num_workers=data.num_workers,
        tell=bad.add,
        processes=processes,
    )
    if progress and processes.is_main:
        batches = with_bar(batches, wanted // processes.size, len)

    def encoded() -> Iterator[_Rows]:
        for clips in batches:
            batch = collate_frames(clips)
            features = encode_frames(model, data, batch)
            yield _Rows(
                torch.tensor([clip.index for clip in clips]),
                torch.tensor([clip.label for clip in clips]),
                features.audio,
                features.video,
                batch.times,
            )

    return _extract(model, dataset, encoded(), bad)


def encode_pooled(
    model: "CavMae", batch: Batch, modalities: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Pooled audio and video features of a batch, (B, D); (B, 0) of what is not in `modalities`."""
    features = model.encode(
        fbank=batch.fbank if "audio" in modalities else None,
        frames=batch.frames if "video" in modalities else None,
    )
    nothing = batch.fbank.new_empty(batch.fbank.shape[0], 0)
    audio, video = (nothing if f is None else f for f in (features.audio, features.video))
    return audio, video


def read_clips(
    dataset: ClipDataset, data: DataConfig, *, num_clips: int, batch_size: int, bad: BadClips
) -> Iterator[RawBatch]:
    """Clips 0 ... num_clips - 1 once each, in order, `batch_size` of them at a time.

    data.num_workers: threads that read ahead (0: read in this one). Clips that cannot be used are
    left out and added to `bad`; their batch is smaller.
    """
    return read_batches(
        dataset,
        num_clips=num_clips,
        batch_size=batch_size,
        num_workers=data.num_workers,
        tell=lambda _, clips: bad.add(clips),
    )


def _extract(
    model: "CavMae", dataset: ClipDataset, batches: Iterator[_Rows], bad: SharedBadClips
) -> ClipFeatures:
    """Collects the batches of all processes; stops as soon as too many clips are bad."""
    wanted, processes = bad.wanted, bad.processes
    collected = _Collected(wanted)
    with _inference(model):
        for rows in batches:
            collected.add(rows)
    left_out = bad.gathered()
    found = {name: processes.gather_rows(rows) for name, rows in collected.columns(processes)}
    if not found:
        first = left_out[0]
        raise ValueError(
            f"none of the {wanted} clips could be used; first: {first.video_id}: {first.reason}"
        )
    columns = {
        name: collected.none_of(name) if rows is None else rows for name, rows in found.items()
    }
    names = tuple(dataset.video_id(index) for index in columns["sample_ids"].tolist())
    return ClipFeatures(video_ids=names, bad=tuple(left_out), **columns)


class _Collected:
    """Rows of batches in memory that is taken once, for all of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self._store: dict[str, Tensor] = {}

    def add(self, rows: _Rows) -> None:
        last = self.count + len(rows.sample_ids)
        for name, column in rows._asdict().items():
            if column is None:
                continue
            column = column.float() if name in ("audio", "video") else column
            if name not in self._store:  # pages that are never written to take no memory
                shape = (self.most, *column.shape[1:])
                with torch.inference_mode(False):  # whoever gets them may train on them
                    self._store[name] = torch.empty(shape, dtype=column.dtype)
            self._store[name][self.count : last] = column
        self.count = last

    def columns(self, processes: Processes) -> Iterator[tuple[str, Tensor]]:
        """Every column that any of the processes has; empty here if it has no rows."""
        names = dict.fromkeys(processes.gather_lists(list(self._store)))
        for name in names:
            yield name, self._store.get(name, torch.empty(0))[: self.count]

    def none_of(self, name: str) -> Tensor:
        """A column of no rows."""
        return self._store.get(name, torch.empty(0))[:0]


@contextlib.contextmanager
def _inference(model: "CavMae") -> Iterator[None]:
    """Evaluation mode and no gradients; the training mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
