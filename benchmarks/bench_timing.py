"""How long one step takes, always from a cold cache.

A step works on the same tensors each time. Rotating through copies of them would keep small ones
out of the cache; overwriting a buffer larger than the cache before each round does the same for
every step, whatever it reads.
"""

import time
from collections.abc import Callable

import torch

FLUSHED = {"cpu": 2**26, "cuda": 2**28}  # bytes: 16 times a core's second level, 4 times an H200's
WARMUP = 1  # beside the steps that were checked and whose memory was measured
ROUNDS = (5, 100)  # at least, at most


def rounds_for(step: Callable[[], None], flush: Callable[[], None], budget: float) -> int:
    """Rounds that take `budget` seconds in all, within `ROUNDS`; warms the step up."""
    for _ in range(WARMUP):
        step()
    start = time.perf_counter()
    flush()
    step()
    return min(max(ROUNDS[0], int(budget / (time.perf_counter() - start))), ROUNDS[1])


def cold_cache(device: str) -> Callable[[], None]:
    """A function that drives a step's tensors out of the cache (CPU: of a core's own caches)."""
    buffer = torch.empty(FLUSHED[device] // 4, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


def device_seconds(step: Callable[[], None], flush: Callable[[], None], rounds: int) -> list[float]:
    """Time on the GPU between events around each of `rounds` steps that nobody waits for.

    The host launches while the flush still runs: a step shows its launches as far as they are not
    hidden behind that.
    """
    times = []
    for _ in range(rounds):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in times]


def graph_seconds(step: Callable[[], None], flush: Callable[[], None], rounds: int) -> list[float]:
    """The same for replays of a CUDA graph of the step: no launch by the host takes part.

    Raises RuntimeError where the step cannot be captured, and leaves the random generator usable.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception:
        # A capture that fails leaves the default generator waiting for its end.
        fresh = torch.Generator(device="cuda").manual_seed(0)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return device_seconds(graph.replay, flush, rounds)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and minimum in milliseconds."""
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(wanted).mul(1e3).tolist()
    found = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "min_ms": min(seconds) * 1e3}
    return {name: round(value, 5) for name, value in found.items()}
