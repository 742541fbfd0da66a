"""Which clips a step reads: arithmetic on (seed, epoch) alone, no data, no state."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcmae_fast.data.clip import ORDER_STREAM, keyed_rng


@dataclass(frozen=True)
class StepOrder:
    """Which clips each rank reads at each micro step; numbers only.

    num_clips: of the dataset. global_size: clips of a micro step over all ranks.
    shard_sizes: clips of each shard, () without shards. window: clips shuffled together then.
    weights: (num_clips,) how often each clip is drawn, with replacement; None: once an epoch each.
    """

    num_clips: int
    global_size: int
    seed: int
    shard_sizes: tuple[int, ...] = ()
    window: int = 0
    weights: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

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
        drawn = None if self.weights is None else _draw(self.weights, rng)
        if not self.shard_sizes:
            return torch.from_numpy(rng.permutation(self.num_clips) if drawn is None else drawn)
        shards = rng.permutation(len(self.shard_sizes))
        if drawn is None:
            ends = self._ends()
            clips = np.concatenate(
                [np.arange(ends[s] - self.shard_sizes[s], ends[s]) for s in shards]
            )
        else:
            turn = np.argsort(shards)  # of each shard
            clips = drawn[np.argsort(turn[self._shard_of(drawn)], kind="stable")]
        window = np.arange(self.num_clips) // self.window
        return torch.from_numpy(clips[np.lexsort((rng.random(self.num_clips), window))])

    def place(self, step: int) -> tuple[int, int]:
        """Epoch of micro step `step`, and the place in its order where the step begins."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return epoch, step * self.global_size

    def visit(self, epoch: int, place: int) -> int:
        """Number of a clip's appearance, for what is drawn anew each time it is read.

        The epoch; but with weights a clip can come several times an epoch, so then every place of
        every epoch has a number of its own.
        """
        return epoch if self.weights is None else epoch * self.num_clips + place

    def partner(self, clips: Tensor, place: int, rng: np.random.Generator) -> int:
        """A clip to mix with the one at `place` of the epoch order `clips`.

        Any clip, equally likely; with shards any clip of a shard that is being read.
        """
        if not self.shard_sizes:
            return int(rng.integers(self.num_clips))
        start = place // self.window * self.window
        near = int(clips[int(rng.integers(start, min(start + self.window, self.num_clips)))])
        shard = int(self._shard_of(np.asarray(near)))
        return int(self._ends()[shard] - 1 - rng.integers(self.shard_sizes[shard]))

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

    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.shard_sizes)

    def _shard_of(self, clips: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._ends(), clips, side="right")


def _draw(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """len(weights) clips with replacement, each as likely as its weight says."""
    ends = np.cumsum(weights)
    clips = np.searchsorted(ends, rng.random(len(weights)) * ends[-1], side="right")
    return np.minimum(clips, np.flatnonzero(weights)[-1])  # where the product was rounded up
