"""Audio and video features of a dataset's clips, in dataset order."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdcmae_fast.batch import Batch
from kdcmae_fast.config import DataConfig
from kdcmae_fast.data import BadClip, BadClips, Clip, ClipDataset, ClipError, FrontEnd, RawBatch
from kdcmae_fast.data.loader import collate

if TYPE_CHECKING:
    from kdcmae_fast.models.cav_mae import CavMae

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
    model: "CavMae",
    dataset: ClipDataset,
    data: DataConfig,
    *,
    num_clips: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
    modalities: tuple[str, ...] = ("audio", "video"),
) -> ClipFeatures:
    """Encode the first clips of a dataset, unmasked, with `model.encode`.

    model: on its device, in its dtype; its training mode is put back afterwards.
    data: fbank normalisation, worker processes, and the share of bad clips that is tolerated.
    num_clips: how many clips to take from the start (None: all). Unreadable ones among them are
        left out and named in `.bad`.
    batch_size: clips encoded at once. progress: show a bar on stderr.
    modalities: what to encode; the features of the other one are (N, 0).

    Raises ValueError when the dataset has fewer clips, TooManyBadClips past data.max_bad_share.
    """
    wanted = len(dataset) if num_clips is None else num_clips
    bad = BadClips(len(dataset), data.max_bad_share)
    batches = read_clips(dataset, data, num_clips=wanted, batch_size=batch_size, bad=bad)
    front_end = FrontEnd(data, model.config)
    device = next(model.parameters()).device
    rows: list[tuple[Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for raw in _with_bar(batches, wanted) if progress else batches:
                batch = front_end(raw, device)
                pooled = encode_pooled(model, batch, modalities)
                rows.append((raw.sample_ids, raw.labels, *(f.float().cpu() for f in pooled)))
                bad.check(sum(len(row[0]) for row in rows))
    finally:
        model.train(was_training)
    bad.check(wanted - len(bad))
    if not rows:
        raise ValueError(f"none of the {wanted} clips could be used; first: {bad.rows()[0]}")
    sample_ids, labels, audio, video = (torch.cat(column) for column in zip(*rows, strict=True))
    names = tuple(dataset.video_id(index) for index in sample_ids.tolist())
    return ClipFeatures(names, sample_ids, labels, audio, video, tuple(bad.rows()))


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
    """Clips 0 ... num_clips - 1 once each, in order, in batches (the last may be smaller).

    data.num_workers: threads that read ahead (0: read in this one). Clips that cannot be used are
    left out and added to `bad`.
    """
    if not 1 <= num_clips <= len(dataset):
        raise ValueError(f"num_clips={num_clips}: the dataset has {len(dataset)} clips")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    clips: list[Clip] = []
    for clip in _in_order(dataset, num_clips, data.num_workers, 2 * batch_size):
        if isinstance(clip, BadClip):
            bad.add([clip])
            continue
        clips.append(clip)
        if len(clips) == batch_size:
            yield collate(clips)
            clips = []
    if clips:
        yield collate(clips)


def _in_order(
    dataset: ClipDataset, num_clips: int, num_threads: int, ahead: int
) -> Iterator[Clip | BadClip]:
    """Reads clips with at most `ahead` of them under way, and gives them back in order."""

    def read(index: int) -> Clip | BadClip:
        try:
            return dataset.read(index, EVALUATION_EPOCH)
        except ClipError as error:
            return BadClip(error.video_id, error.reason)

    if num_threads == 0:
        yield from map(read, range(num_clips))
        return
    with ThreadPoolExecutor(num_threads) as pool:
        under_way: deque[Future[Clip | BadClip]] = deque()
        try:
            for index in range(num_clips):
                under_way.append(pool.submit(read, index))
                if len(under_way) > ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _with_bar(batches: Iterable[RawBatch], num_clips: int) -> Iterator[RawBatch]:
    """The same batches, with a progress bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield from batches
        return
    with tqdm(total=num_clips, unit="clip", desc="features", dynamic_ncols=True) as bar:
        for raw in batches:
            yield raw
            bar.update(len(raw.sample_ids))
