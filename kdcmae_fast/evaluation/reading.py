"""Clips of a dataset in order and in batches, read ahead; bad ones are left out and named."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from kdcmae_fast.data import BadClip, Clip, ClipDataset, ClipError, RawBatch
from kdcmae_fast.data.loader import collate
from kdcmae_fast.evaluation.processes import ALONE, Processes

if TYPE_CHECKING:
    from kdcmae_fast.data.clip import ClipFrames

# Told of every batch that is read, and of the clips of it that cannot be used.
Tell = Callable[[range, list[BadClip]], object]

EVALUATION_EPOCH = 0  # the epoch a dataset is read as: fixes which frame of a clip is taken

Read = TypeVar("Read", "Clip", "ClipFrames")
Batch = TypeVar("Batch")


def read_batches(
    dataset: ClipDataset,
    *,
    num_clips: int,
    batch_size: int,
    num_workers: int,
    tell: Tell,
    processes: Processes = ALONE,
) -> Iterator[RawBatch]:
    """Clips 0 ... num_clips - 1 once each, in order; batch b is of clips b * batch_size and on.

    num_workers: threads that read ahead (0: read in this one). Clips that cannot be used are left
    out and go to `tell`; their batch is smaller. processes: only this one's batches.
    """
    check_amounts(dataset, num_clips, batch_size)
    batches = processes.batches(num_clips, batch_size)

    def read(index: int) -> Clip:
        return dataset.read(index, EVALUATION_EPOCH)

    for clips in _good_clips(read, batches, num_workers, tell):
        yield collate(clips)


def read_frame_batches(
    dataset: ClipDataset,
    *,
    num_clips: int,
    num_frames: int | None,
    batch_size: int,
    num_workers: int,
    tell: Tell,
    processes: Processes = ALONE,
) -> Iterator[list["ClipFrames"]]:
    """As `read_batches`, with all frames of every clip.

    num_frames: T (None: as many as the dataset has). A clip with another number of frames than the
    list's first one that can be read counts as bad.
    """
    check_amounts(dataset, num_clips, batch_size)
    batches = processes.batches(num_clips, batch_size)
    # Every process looks for itself: the first clip that it reads may have another number.
    expected = _frames_of_first(dataset, num_clips) if num_frames is None else num_frames

    def read(index: int) -> "ClipFrames":
        clip = dataset.read_frames(index, num_frames)
        if len(clip.frames) != expected:
            reason = f"it has {len(clip.frames)} frames, the first clip has {expected}"
            raise ClipError(clip.video_id, reason)
        return clip

    yield from _good_clips(read, batches, num_workers, tell)


def check_amounts(dataset: ClipDataset, num_clips: int, batch_size: int) -> None:
    """ValueError for amounts that the dataset does not have or that are none."""
    if not 1 <= num_clips <= len(dataset):
        raise ValueError(f"num_clips={num_clips}: the dataset has {len(dataset)} clips")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


def with_bar(
    batches: Iterable[Batch], num_clips: int, length: Callable[[Batch], int]
) -> Iterator[Batch]:
    """The same batches, with a progress bar on stderr where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield from batches
        return
    with tqdm(total=num_clips, unit="clip", desc="features", dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(length(batch))


def _frames_of_first(dataset: ClipDataset, num_clips: int) -> int:
    """T of the first clip that can be read; 0 where none can."""
    for index in range(num_clips):
        try:
            return len(dataset.read_frames(index).frames)
        except ClipError:
            continue
    return 0


def _good_clips(
    read: Callable[[int], Read], batches: Sequence[range], num_threads: int, tell: Tell
) -> Iterator[list[Read]]:
    """The clips of each batch that can be used; no batch of none."""

    def attempt(index: int) -> Read | BadClip:
        try:
            return read(index)
        except ClipError as error:
            return BadClip(error.video_id, error.reason)

    ahead = 2 * len(batches[0]) if batches else 0
    indices = [index for batch in batches for index in batch]
    results = _in_order(attempt, indices, num_threads, ahead)
    for batch in batches:
        found = [next(results) for _ in batch]
        clips = [clip for clip in found if not isinstance(clip, BadClip)]
        tell(batch, [clip for clip in found if isinstance(clip, BadClip)])
        if clips:
            yield clips


def _in_order(
    read: Callable[[int], Read | BadClip], indices: Iterable[int], num_threads: int, ahead: int
) -> Iterator[Read | BadClip]:
    """Reads clips with at most `ahead` of them under way, and gives them back in order."""
    if num_threads == 0:
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        under_way: deque[Future[Read | BadClip]] = deque()
        try:
            for index in indices:
                under_way.append(pool.submit(read, index))
                if len(under_way) > ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
