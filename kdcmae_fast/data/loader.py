"""From a dataset to an endless stream of batches whose content depends on the seed alone.

The order of an epoch is drawn from (seed, epoch). Micro step s takes the next
G = micro_batch_size * world_size places of it, rank r the r-th part of those; what is left over at
the end of an epoch (less than G) waits for another epoch's order. Workers, ranks and resuming share
this one arithmetic, so none of them can change which clips a step sees.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcmae_fast.config import DataConfig
from kdcmae_fast.data.augment import (
    Augment,
    ClipDraws,
    classes_of,
    collate_draws,
    draws_of,
    is_augmenting,
    pad,
)
from kdcmae_fast.data.bad import BadClip, TooManyBadClips
from kdcmae_fast.data.clip import AUGMENT_STREAM, Clip, ClipDataset, ClipError, keyed_rng
from kdcmae_fast.data.frontend import RawBatch
from kdcmae_fast.data.order import StepOrder
from kdcmae_fast.data.pairs import read_pairs
from kdcmae_fast.data.sampling import sampling_weights
from kdcmae_fast.messages import one_line

MAX_SUBSTITUTES = 50  # clips tried in place of one bad clip before the run stops
PREFETCH = 4  # batches each worker keeps ready


class DatasetLost(RuntimeError):
    """The dataset itself, rather than a clip of it, cannot be read any more."""


class WorkerLost(RuntimeError):
    """A process that reads clips ahead has ended."""


Fatal = TooManyBadClips | DatasetLost


class _Steps(Dataset[RawBatch | Fatal]):
    """Item s is rank `rank`'s RawBatch of micro step s, or what ends the run."""

    def __init__(
        self,
        dataset: ClipDataset,
        data: DataConfig,
        order: StepOrder,
        size: int,
        rank: int,
        frames_per_clip: int | None,
    ) -> None:
        self.dataset = dataset
        self.data = data
        self.order = order
        self.frames_per_clip = frames_per_clip
        self.size = size
        self.rank = rank
        self._epoch_order: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> RawBatch | Fatal:
        # Returned, not raised: from a worker that would arrive as a traceback.
        epoch, start = self.order.place(step)
        start += self.rank * self.size
        bad: list[BadClip] = []
        try:
            clips = [self._clip(epoch, start + slot, bad) for slot in range(self.size)]
            augment = self._augment(epoch, start, clips, bad) if is_augmenting(self.data) else None
        except (TooManyBadClips, DatasetLost) as error:
            return error
        return collate(clips, tuple(bad), augment)

    def _read(self, index: int, visit: int) -> Clip:
        if self.frames_per_clip is None:
            return self.dataset.read(index, visit)
        return read_pairs(
            self.dataset,
            index,
            visit,
            seed=self.order.seed,
            num_frames=self.data.num_frames,
            frames_per_clip=self.frames_per_clip,
        )

    def _places(self, epoch: int) -> Tensor:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, self.order.epoch_order(epoch)
        return self._epoch_order[1]

    def _clip(self, epoch: int, place: int, bad: list[BadClip]) -> Clip:
        """The clip at `place`, or the first good one of its substitutes."""
        places = self._places(epoch)
        others = islice(self.order.substitutes(place), MAX_SUBSTITUTES)
        candidates = (int(places[other]) for other in chain([place], others))
        return self._first_good(candidates, self.order.visit(epoch, place), bad)

    def _augment(self, epoch: int, start: int, clips: list[Clip], bad: list[BadClip]) -> Augment:
        """What will happen to each clip, and the clips to mix them with."""
        places = self._places(epoch)
        draws: list[ClipDraws] = []
        for place, clip in enumerate(clips, start):
            visit = self.order.visit(epoch, place)
            rng = keyed_rng(self.order.seed, AUGMENT_STREAM, visit, clip.index)
            drawn = draws_of(rng, self.data)
            if drawn.weight < 1:
                others = (
                    self.order.partner(places, place, rng) for _ in range(MAX_SUBSTITUTES + 1)
                )
                drawn = drawn._replace(partner=self._first_good(others, visit, bad))
            draws.append(drawn)
        return collate_draws(draws)

    def _first_good(self, candidates: Iterable[int], visit: int, bad: list[BadClip]) -> Clip:
        """The first of the clips that can be read; the others are added to `bad`."""
        reasons: list[str] = []
        for index in candidates:
            try:
                return self._read(index, visit)
            except ClipError as error:
                bad.append(BadClip(error.video_id, error.reason))
                reasons.append(str(error))
            except (OSError, ValueError) as error:
                raise DatasetLost(one_line(error)) from error
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
    Iterating raises TooManyBadClips when no readable clip is found for a slot, DatasetLost when the
    dataset itself cannot be read any more, WorkerLost when a worker has died.
    """

    def __init__(self, batches: DataLoader[RawBatch | Fatal], order: StepOrder) -> None:
        self._batches = batches
        self.num_clips = order.num_clips
        self.steps_per_epoch = order.steps_per_epoch

    def __iter__(self) -> Iterator[RawBatch]:
        batches = iter(self._batches)
        while True:
            try:
                batch = next(batches)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if self._batches.num_workers == 0 or "Original Traceback" in str(error):
                    raise
                said = " ".join(str(error).split())
                raise WorkerLost(
                    f"a loader process has died ({said}); was it killed for want of memory? "
                    "data.num_workers sets how many there are"
                ) from error
            if isinstance(batch, TooManyBadClips | DatasetLost):
                raise batch
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
    frames_per_clip: int | None = None,
) -> Loader:
    """Batches of `micro_batch_size` clips for one rank, in the order fixed by (seed, epoch).

    frames_per_clip: n of the data.num_frames frames of each clip, with all its sound, which
        FrontEnd cuts into segments (CAV-MAE Sync); None: one frame and the sound of its window.

    start_sample: clips all ranks have consumed so far; the stream goes on there. With an equal
    micro_batch_size * world_size it goes on exactly, whatever the number of ranks.
    data.num_workers: processes that read ahead (0: read in this one). data.sampling, data.mixup,
    data.freq_mask, data.time_mask, data.noise: as DataConfig says; FrontEnd applies the last four.
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
    weights = sampling_weights(dataset) if data.sampling == "balanced" else None
    order = StepOrder(len(dataset), global_size, seed, sizes, data.shuffle_window, weights)
    workers = data.num_workers
    return Loader(
        DataLoader(
            _Steps(dataset, data, order, micro_batch_size, rank, frames_per_clip),
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


def collate(
    clips: list[Clip], bad: tuple[BadClip, ...] = (), augment: Augment | None = None
) -> RawBatch:
    """Clips as one batch, waveforms filled up with zeros to the longest."""
    return RawBatch(
        waveforms=pad([clip.waveform for clip in clips]),
        lengths=torch.tensor([len(clip.waveform) for clip in clips]),
        frames=torch.stack([clip.frame for clip in clips]),
        sample_ids=torch.tensor([clip.index for clip in clips]),
        labels=torch.tensor([clip.label for clip in clips]),
        bad=bad,
        classes=classes_of(clips),
        augment=augment,
        numbers=_stacked([clip.numbers for clip in clips]),
        times=_stacked([clip.times for clip in clips]),
    )


def _stacked(columns: Sequence[NDArray[Any] | None]) -> Tensor | None:
    """(B, n) of one (n,) per clip, or None where clips have none."""
    rows = [torch.from_numpy(column) for column in columns if column is not None]
    return torch.stack(rows) if rows else None


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
