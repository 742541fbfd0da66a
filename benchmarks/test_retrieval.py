"""What `kdcmae retrieve` does once it has features: ranks and recalls, both directions.

The full shape is the CAV-MAE Sync test set, N=1545, T=16, D=768. The published loop is timed on a
sample of pairs and extrapolated; its rows say so. `peak_rss_bytes` is what the process grew by,
C++ code included.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import published_similarity as published
import pytest
import torch

from kdcmae_fast.evaluation.ranking import STRATEGIES, retrieval_scores

EVERY = pytest.mark.parametrize("strategy", STRATEGIES)
BARS = {"diagonal_mean": 5.0, "diagonal_max": 10.0, "mean": 5.0, "max": 120.0}  # seconds, 2 cores
MOST_BYTES = 300e6  # of "max"


@pytest.fixture
def sides(full, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of N clips, the pairs related so that ranks are neither all 1 nor chance."""
    shape = (1545, 16, 768) if full else (48, 4, 96)
    a = torch.randn(shape, device=device)
    return a, a + 8 * torch.randn(shape, device=device)


def described(a: torch.Tensor, strategy: str) -> str:
    clips, frames, width = a.shape
    return f"retrieval {strategy} N={clips} T={frames} D={width}, both directions"


@EVERY
def test_published(strategy, sides, benchmark, record):
    """A sample of pairs, extrapolated to all pairs of both directions."""
    a, b = (x.cpu() for x in sides)
    few = a[:6], b[:6]
    found = published.ranks(published.similarity(*few, strategy)) + 1
    ours = retrieval_scores(*few, strategy=strategy, ties="optimistic").audio_to_video
    assert ours.recall[1] == (found == 1).double().mean()
    assert ours.median_rank == np.median(found)
    pairs = 100 if strategy.startswith("diagonal") else 15
    seconds = list(published.seconds_of_both_directions(a, b, strategy, pairs, 5))
    benchmark.group = f"published loop, one pair of {described(a, strategy)}"
    benchmark.pedantic(published.pair_similarity, (a[0], b[1], strategy), rounds=5)
    record(
        group=described(a, strategy), seconds=seconds, mode="fwd", provider="published",
        peak_bytes=None, extrapolated=True, sampled_pairs=pairs,
        extrapolated_to_pairs=2 * len(a) * len(b),
    )  # fmt: skip


@EVERY
def test_ours(strategy, sides, full, device, benchmark, record):
    a, b = sides
    retrieval_scores(a[:40], b[:40], strategy=strategy)

    def run():
        return retrieval_scores(a, b, strategy=strategy)

    grown = None if device == "cuda" else peak_rss(run)
    benchmark.group = described(a, strategy)
    benchmark.pedantic(run, rounds=1 if full and strategy == "max" else 5)
    record(mode="fwd", provider="ours", dtype="float32", peak_rss_bytes=grown)
    if full and not benchmark.disabled:
        assert benchmark.stats.stats.min < BARS[strategy]
        assert strategy != "max" or grown is None or grown < MOST_BYTES


def peak_rss(run: Callable[[], object]) -> int | None:
    """Bytes of memory by which the process grows at most; None where Linux cannot tell."""
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        forget.write_text("5")  # start the peak anew
    except OSError:
        if sys.platform != "linux":
            return None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    before = kibibytes(status, "VmRSS")
    run()
    return 1024 * (kibibytes(status, "VmHWM") - before)


def kibibytes(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
