"""One optimizer step, and the rare moments at which the ranks look at what happened."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kdcmae_fast.batch import Batch
from kdcmae_fast.data import BadClip, RawBatch
from kdcmae_fast.training.contrast import CachedContrast, contrast_over_step
from kdcmae_fast.training.distributed import World, sum_over_ranks
from kdcmae_fast.training.schedule import RunLength

STOPS = "; the run stops here. Lower optim.lr, raise optim.warmup, or set ds.gradient_clipping=1.0"
MAX_LOST = 20  # steps in a row without a finite gradient


def train_step(
    engine: Any,
    batches: Iterator[RawBatch],
    front_end: Callable[[RawBatch, torch.device], Any],
    world: World,
    step: int,
    *,
    contrast_over: str = "micro_batch",
    forward: Callable[[Any, Any], Any] | None = None,
) -> tuple[dict[str, Tensor], list[BadClip]]:
    """All micro steps of optimizer step `step` (from 0); nothing here waits for the device.

    Masks follow from (seed, step, sample id), so the micro steps share `step`: their clips differ,
    and splitting a batch into more micro steps or ranks leaves every clip's masks as they were.

    contrast_over: the clips that InfoNCE compares, those of a "micro_batch" or of the whole "step".
    forward: (engine, batch) -> losses; None: those of a masked autoencoder.

    Returns the mean of each loss over the micro steps, on the device, and this rank's bad clips.
    """
    accumulation = engine.gradient_accumulation_steps()
    sums: dict[str, Tensor] = {}
    bad: list[BadClip] = []

    def load() -> Batch:
        with stage("data"):
            raw = next(batches)
            bad.extend(raw.bad)
            return front_end(raw, world.device)

    micro_steps: Iterable[tuple[Batch, CachedContrast | None]]
    if contrast_over == "step" and accumulation > 1:
        loaded = [load() for _ in range(accumulation)]
        with stage("features"):
            micro_steps = zip(loaded, contrast_over_step(engine, loaded, step), strict=True)
    else:
        micro_steps = ((load(), None) for _ in range(accumulation))
    for batch, contrast in micro_steps:
        with stage("forward"):
            if contrast is not None:
                contrast.random_state.restore()
            if forward is None:
                losses = engine(batch, step=step, contrast=contrast)
            else:
                losses = forward(engine, batch)
        with stage("backward"):
            engine.backward(losses.total)
        with stage("optimizer"):
            engine.step()
        for name, value in losses.named().items():
            value = value.detach().float() / accumulation
            sums[name] = sums[name] + value if name in sums else value
    return sums, bad


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A named range in profiles: the torch profiler's trace, and NVTX on CUDA."""
    on_cuda = torch.cuda.is_available()
    nvtx = torch.cuda.nvtx.range(name) if on_cuda else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield


class Meter:
    """Turns a step's device scalars into a record for the logs, the same on every rank."""

    def __init__(self, length: RunLength, world: World, step: int, *, skipped: int = 0) -> None:
        self._length = length
        self._world = world
        self._step = step
        self._skipped = skipped
        self._lost = 0  # steps in a row
        self._since = time.perf_counter()

    def gradients(self, step: int, engine: Any) -> dict[str, float]:
        """The norm of the last gradient, for the record; to be called before `record`.

        The engine leaves out steps whose gradient is not finite. Raises FloatingPointError when it
        took such a step, or when it has left out `MAX_LOST` steps and more without one between.
        """
        norm = engine.get_global_grad_norm()
        finite = norm is None or math.isfinite(norm)
        if not finite and engine.was_step_applied():
            raise FloatingPointError(f"step {step}: the gradient is not finite{STOPS}")
        lost = engine.skipped_steps - self._skipped
        self._skipped = engine.skipped_steps
        self._lost = self._lost + lost if lost == step - self._step else 0
        if self._lost >= MAX_LOST:
            raise FloatingPointError(
                f"step {step}: the gradients of the last {self._lost} steps were not finite, and "
                f"none of them changed the weights{STOPS}"
            )
        return {} if norm is None or not finite else {"grad_norm": float(norm)}

    def restart(self) -> None:
        """Leave what happened since the last record (a checkpoint, say) out of the clips/s."""
        self._since = time.perf_counter()

    def record(
        self, step: int, losses: Mapping[str, Tensor], lr: float, flags: Mapping[str, int]
    ) -> tuple[dict[str, float], dict[str, int]]:
        """The record after `step` optimizer steps, and `flags` summed over ranks.

        Waits for the device. Raises FloatingPointError naming the step and the first term that is
        not finite.
        """
        values = sum_over_ranks([*losses.values(), *flags.values()], self._world.device)
        means = [value / self._world.size for value in values[: len(losses)]]
        named = dict(zip(losses, means, strict=True))
        for name in sorted(named, key=lambda name: name == "total"):
            if not math.isfinite(named[name]):
                raise FloatingPointError(
                    f"step {step}: the loss term {name} is {named[name]}{STOPS}"
                )
        seconds = time.perf_counter() - self._since
        rate = (step - self._step) * self._length.samples_per_step / max(seconds, 1e-9)
        left = (self._length.total_steps - step) * self._length.samples_per_step / max(rate, 1e-9)
        self._step, self._since = step, time.perf_counter()
        record = {
            "step": step,
            "epoch": self._length.epoch(step - 1),
            "samples": step * self._length.samples_per_step,
            "lr": lr,
            **named,
            "clips_per_second": rate,
            "seconds_left": left,
        }
        counts = [round(value) for value in values[len(losses) :]]
        return record, dict(zip(flags, counts, strict=True))
