"""From a dataset to an endless stream of batches whose content depends on the seed alone.

The order of an epoch is a permutation drawn from (seed, epoch). Micro step s takes the next
G = micro_batch_size * world_size places of it, rank r the r-th part of those; what is left over at
the end of an epoch (less than G) waits for another epoch's order. Workers, ranks and resuming share
this one arithmetic, so none of them can change which clips a step sees.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.bad import BadClip, TooManyBadClips
from kdcmae_fast.data.clip import ORDER_STREAM, Clip, ClipDataset, ClipError, keyed_rng
from kdcmae_fast.data.frontend import RawBatch

MAX_SUBSTITUTES = 50  # clips tried in place of one bad clip before the run stops
PREFETCH = 4  # batches each worker keeps ready


@dataclass(frozen=True)
class StepOrder:
    """Which clips each rank reads at each micro step; numbers only.

    num_clips: of the dataset. global_size: clips of a micro step over all ranks.
    shard_sizes: clips of each shard, () without shards. window: clips shuffled together then.
    """

    num_clips: int
    global_size: int
    seed: int
    shard_sizes: tuple[int, ...] = ()
    window: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Micro steps of one epoch."""
        return self.num_clips // self.global_size

    def epoch_order(self, epoch: int) -> Tensor:
        """(num_clips,) int64, clips in the order of `epoch`.

        Shards come in random order, and clips are shuffled within windows of that sequence: the
        clips read together lie in few shards, and the order is still known without reading any.
        """
        rng = keyed_rng(self.seed, ORDER_STREAM, epoch)
        if not self.shard_sizes:
            return torch.from_numpy(rng.permutation(self.num_clips))
        sizes = np.asarray(self.shard_sizes)
        ends = np.cumsum(sizes)
        shards = rng.permutation(len(sizes))
        clips = np.concatenate([np.arange(ends[s] - sizes[s], ends[s]) for s in shards])
        window = np.arange(self.num_clips) // self.window
        return torch.from_numpy(clips[np.lexsort((rng.random(self.num_clips), window))])

    def place(self, step: int) -> tuple[int, int]:
        """Epoch of micro step `step`, and the place in its order where the step begins."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return epoch, step * self.global_size

    def substitutes(self, place: int) -> Iterator[int]:
        """Places to try, in order, when the clip at `place` is bad; none is in the same step.

        First the same slot of the steps after it, round to those before: two slots of one step can
        never get the same clip that way. Only then (very small or very bad datasets) the others.
        """
        size = self.global_size
        step = place // size
        for later in range(1, self.steps_per_epoch):
            yield (place + later * size) % (self.steps_per_epoch * size)
        for other in range(place + 1, place + self.num_clips):
            other %= self.num_clips
            in_slot = other < self.steps_per_epoch * size and (other - place) % size == 0
            if other // size != step and not in_slot:
                yield other


class _Steps(Dataset[RawBatch | str]):
    """Item s is rank `rank`'s RawBatch of micro step s, or the message of a fatal error."""

    def __init__(self, dataset: ClipDataset, order: StepOrder, size: int, rank: int) -> None:
        self.dataset = dataset
        self.order = order
        self.size = size
        self.rank = rank
        self._epoch_order: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> RawBatch | str:
        # A message instead of an exception: from a worker that would arrive as a traceback.
        epoch, start = self.order.place(step)
        start += self.rank * self.size
        bad: list[BadClip] = []
        try:
            clips = [self._clip(epoch, start + slot, bad) for slot in range(self.size)]
        except TooManyBadClips as error:
            return str(error)
        return collate(clips, tuple(bad))

    def _clip(self, epoch: int, place: int, bad: list[BadClip]) -> Clip:
        """The clip at `place`, or the first good one of its substitutes."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, self.order.epoch_order(epoch)
        places = self._epoch_order[1]
        reasons: list[str] = []
        try:
            return self.dataset.read(int(places[place]), epoch)
        except ClipError as error:
            bad.append(BadClip(error.video_id, error.reason))
            reasons.append(str(error))
        for _, other in zip(range(MAX_SUBSTITUTES), self.order.substitutes(place), strict=False):
            try:
                return self.dataset.read(int(places[other]), epoch)
            except ClipError as error:
                bad.append(BadClip(error.video_id, error.reason))
                reasons.append(str(error))
        raise TooManyBadClips(
            f"no readable clip for one slot of a batch: {len(reasons)} tried of "
            f"{self.order.num_clips}, batches of {self.order.global_size} over all ranks; "
            f"repair the files or lower the batch size. Last: {'; '.join(reasons[-3:])}"
        )


class _FromStep(Sampler[int]):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count(self.start)


class Loader:
    """Endless iterable of RawBatch; iterating again starts over at the same step.

    steps_per_epoch: micro steps. num_clips: size of the dataset.
    Iterating raises TooManyBadClips when no readable clip is found for a slot.
    """

    def __init__(self, batches: DataLoader[RawBatch | str], order: StepOrder) -> None:
        self._batches = batches
        self.num_clips = order.num_clips
        self.steps_per_epoch = order.steps_per_epoch

    def __iter__(self) -> Iterator[RawBatch]:
        for batch in self._batches:
            if isinstance(batch, str):
                raise TooManyBadClips(batch)
            yield batch


def make_loader(
    dataset: ClipDataset,
    *,
    data: DataConfig,
    seed: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_sample: int = 0,
) -> Loader:
    """Batches of `micro_batch_size` clips for one rank, in the order fixed by (seed, epoch).

    start_sample: clips all ranks have consumed so far; the stream goes on there. With an equal
    micro_batch_size * world_size it goes on exactly, whatever the number of ranks.
    data.num_workers: processes that read ahead (0: read in this one).
    A clip that raises ClipError is replaced and listed in the batch's `bad`.
    Raises ValueError for a dataset smaller than one global batch and for impossible numbers.
    """
    global_size = micro_batch_size * world_size
    if micro_batch_size < 1 or not 0 <= rank < world_size or min(seed, data.num_workers) < 0:
        raise ValueError(
            f"micro_batch_size={micro_batch_size} must be at least 1, rank={rank} in "
            f"0..world_size-1 (world_size={world_size}), seed={seed} and "
            f"num_workers={data.num_workers} at least 0"
        )
    if len(dataset) < global_size:
        raise ValueError(
            f"the dataset has {len(dataset)} clips but one micro step takes {global_size} "
            f"(micro_batch_size={micro_batch_size} on each of world_size={world_size} ranks): "
            f"lower train_micro_batch_size_per_gpu to {len(dataset) // world_size} or less, "
            f"or add clips"
        )
    if start_sample < 0 or start_sample % global_size:
        raise ValueError(
            f"start_sample={start_sample} must be a multiple of micro_batch_size * world_size = "
            f"{global_size}: resume with the batch size the run was started with"
        )
    sizes = getattr(dataset, "shard_sizes", ())
    order = StepOrder(len(dataset), global_size, seed, sizes, data.shuffle_window)
    workers = data.num_workers
    return Loader(
        DataLoader(
            _Steps(dataset, order, micro_batch_size, rank),
            sampler=_FromStep(start_sample // global_size),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=_worker_context() if workers else None,
            worker_init_fn=_prepare_worker,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its draws must not move the global generator
        ),
        order,
    )


def collate(clips: list[Clip], bad: tuple[BadClip, ...] = ()) -> RawBatch:
    """Clips as one batch, waveforms filled up with zeros to the longest."""
    lengths = torch.tensor([len(clip.waveform) for clip in clips])
    return RawBatch(
        waveforms=torch.nn.utils.rnn.pad_sequence([c.waveform for c in clips], batch_first=True),
        lengths=lengths,
        frames=torch.stack([clip.frame for clip in clips]),
        sample_ids=torch.tensor([clip.index for clip in clips]),
        labels=torch.tensor([clip.label for clip in clips]),
        bad=bad,
    )


def _as_is(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when the training process is gone, killed for instance.

    DataLoader's own watch looks at the process that forked the worker, which is the fork server;
    and that stays as long as there are workers.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _worker_context() -> multiprocessing.context.BaseContext:
    """How workers start: from a clean server process, because forking a process that runs threads
    (a training process always does) can deadlock, and Python 3.12 warns about it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context
