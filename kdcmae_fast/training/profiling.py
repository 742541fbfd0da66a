"""`--profile`: a torch profiler trace of a few steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity

from kdcmae_fast.training.distributed import World

SKIPPED, WARM_UP, TRACED = 2, 1, 3  # steps


class Stepped(Protocol):
    """Told once per training step."""

    def step(self) -> None: ...


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def profiler(output: Path, world: World, *, enabled: bool) -> Iterator[Stepped]:
    """Trace steps 4 to 6 of this launch into `output`/profile/rank_<r>.json (chrome://tracing)."""
    if not enabled:
        yield _Off()
        return
    folder = output / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=TRACED, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(
            str(folder / f"rank_{world.rank}.json")
        ),
    ) as trace:
        yield trace
