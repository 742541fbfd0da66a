"""Length of a run and learning-rate schedules, as pure functions of the step: nothing to save."""

import math
from typing import NamedTuple

from kdcmae_fast.config import OptimConfig, TrainConfig


class RunLength(NamedTuple):
    """How steps, epochs and clips of a run relate.

    total_steps: optimizer steps. batches_per_epoch: global micro batches in an epoch (drop-last).
    accumulation: micro batches in an optimizer step. global_batch: clips in a micro batch, all
    ranks together.
    """

    total_steps: int
    batches_per_epoch: int
    accumulation: int
    global_batch: int

    @property
    def samples_per_step(self) -> int:
        """Clips in an optimizer step, all ranks together."""
        return self.global_batch * self.accumulation

    def epoch(self, step: int) -> int:
        """The epoch, from 0, in which optimizer step `step` (from 0) begins."""
        return step * self.accumulation // self.batches_per_epoch

    def epoch_ended(self, done: int) -> int:
        """The epoch, from 1, that ends with the first `done` steps; 0 if none does.

        The last step of the run ends the epoch it is in.
        """
        epoch = self.epoch(done - 1) + 1
        return epoch if done == self.total_steps or self.epoch(done) >= epoch else 0


def run_length(
    train: TrainConfig, *, num_clips: int, global_batch: int, accumulation: int
) -> RunLength:
    """Resolve `train.steps` or `train.epochs` for a dataset of `num_clips`.

    Raises ValueError when an epoch would hold no batch, or no length is set.
    """
    batches = num_clips // global_batch
    if batches < 1:
        raise ValueError(
            f"data has {num_clips} clips, fewer than the {global_batch} of one batch over all "
            "processes; use more data or a smaller ds.train_micro_batch_size_per_gpu"
        )
    if train.steps is not None:
        return RunLength(train.steps, batches, accumulation, global_batch)
    if train.epochs is None:
        raise ValueError("train.steps=None, train.epochs=None: one must say how long to train")
    total_steps = train.epochs * batches // accumulation
    if total_steps < 1:
        raise ValueError(
            f"train.epochs={train.epochs}: {train.epochs * batches} batches are fewer than one "
            f"step's ds.gradient_accumulation_steps={accumulation}"
        )
    return RunLength(total_steps, batches, accumulation, global_batch)


def lr_factor(step: int, *, total_steps: int, epoch: int, optim: OptimConfig) -> float:
    """The rate of `step` (from 0), which begins in `epoch` (from 0), as a share of `optim.lr`.

    With N = total_steps and f = final_lr:
    warm-up: (s + 1) / W over the first W = warmup * N steps, under every schedule.
    constant: 1.
    cosine: f + (1 - f) (1 + cos(pi (s - W) / (N - W))) / 2; f from N on.
    halving: 1/2 from epoch `halving_start` on and again every `halving_every` epochs, constant
        within an epoch (CAV-MAE, arXiv 2210.07839).
    """
    warmup_steps = optim.warmup * total_steps
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
        return optim.final_lr + (1.0 - optim.final_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    past = epoch - optim.halving_start
    return 0.5 ** (past // optim.halving_every + 1) if past >= 0 else 1.0
