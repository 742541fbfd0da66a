"""Audio and video features of a dataset's clips, in dataset order."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import BadClip, BadClips, Clip, ClipDataset, ClipError, FrontEnd, RawBatch

EVALUATION_EPOCH = 0  # the epoch a dataset is read as: fixes which frame of a clip is taken


class ClipFeatures(NamedTuple):
    """Pooled features of N readable clips, on the CPU in fp32, not normalised.

    video_ids: N names. sample_ids: (N,) int64 positions in the dataset. labels: (N,) int64, -1
    unknown. audio, video: (N, D). bad: the clips that could not be used, and why.
    """

    video_ids: tuple[str, ...]
    sample_ids: Tensor
    labels: Tensor
    audio: Tensor
    video: Tensor
    bad: tuple[BadClip, ...]


def extract_features(
    model: torch.nn.Module,
    dataset: ClipDataset,
    data: DataConfig,
    *,
    num_clips: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> ClipFeatures:
    """Encode the first clips of a dataset, unmasked, with `model.encode`.

    model: on its device, in its dtype; its training mode is put back afterwards.
    data: fbank normalisation, worker processes, and the share of bad clips that is tolerated.
    num_clips: how many clips to take from the start (None: all). Unreadable ones among them are
        left out and named in `.bad`.
    batch_size: clips encoded at once. progress: show a bar on stderr.

    Raises ValueError when the dataset has fewer clips, TooManyBadClips past data.max_bad_share.
    """
    wanted = len(dataset) if num_clips is None else num_clips
    batches = read_clips(dataset, data, num_clips=wanted, batch_size=batch_size)
    if progress:
        batches = _with_bar(batches, wanted, batch_size)
    front_end = FrontEnd(data, model.config)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    bad = BadClips(len(dataset), data.max_bad_share)
    rows: list[tuple[Tensor, ...]] = []
    try:
        with torch.inference_mode():
            for raw in batches:
                bad.add(raw.bad)
                if len(raw.sample_ids):
                    batch = front_end(raw, device)
                    features = model.encode(fbank=batch.fbank, frames=batch.frames)
                    pooled = (features.audio.float().cpu(), features.video.float().cpu())
                    rows.append((raw.sample_ids, raw.labels, *pooled))
    finally:
        model.train(was_training)
    bad.check(wanted - len(bad))
    if not rows:
        raise ValueError(f"none of the {wanted} clips could be read; first: {bad.rows()[0]}")
    sample_ids, labels, audio, video = (torch.cat(column) for column in zip(*rows, strict=True))
    names = tuple(dataset.video_id(index) for index in sample_ids.tolist())
    return ClipFeatures(names, sample_ids, labels, audio, video, tuple(bad.rows()))


def read_clips(
    dataset: ClipDataset, data: DataConfig, *, num_clips: int, batch_size: int
) -> Iterable[RawBatch]:
    """Clips 0 ... num_clips - 1 once each, in order, in batches; bad ones left out and listed.

    A batch may be smaller than `batch_size`, or empty when all its clips are bad.
    """
    if not 1 <= num_clips <= len(dataset):
        raise ValueError(f"num_clips={num_clips}: the dataset has {len(dataset)} clips")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return DataLoader(
        _InOrder(dataset, num_clips),
        batch_size=batch_size,
        num_workers=min(data.num_workers, -(-num_clips // batch_size)),
        collate_fn=_collate,
    )


class _InOrder:
    """A map-style dataset for torch's loader in which a bad clip is a value, not an exception."""

    def __init__(self, dataset: ClipDataset, num_clips: int) -> None:
        self.dataset = dataset
        self.num_clips = num_clips

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> Clip | BadClip:
        try:
            return self.dataset.read(index, EVALUATION_EPOCH)
        except ClipError as error:
            return BadClip(error.video_id, error.reason)


def _with_bar(
    batches: Iterable[RawBatch], num_clips: int, batch_size: int
) -> Iterator[RawBatch]:
    """The same batches, with a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield from batches
        return
    with tqdm(total=num_clips, unit="clip", desc="features", dynamic_ncols=True) as bar:
        for raw in batches:
            yield raw
            bar.update(len(raw.sample_ids) + len(raw.bad))
