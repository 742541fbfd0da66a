"""Clip similarities and retrieval ranks, both directions, beside the published Python loop.

The full shape is the CAV-MAE Sync test set, N=1545, T=16, D=768. The published loop would take
half an hour to ten there, so it is timed on a sample of pairs and extrapolated; its rows say so.
"""

import published_similarity as published
import pytest
import torch

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable

STRATEGIES = ("diagonal_mean", "diagonal_max", "mean", "max")
EVERY = pytest.mark.parametrize("strategy", STRATEGIES)


def skip_unavailable(op: str, impl: str, device: str) -> None:
    problem = impl not in ("eager",) and unavailable(op, impl, device)
    if problem:
        pytest.skip(problem)


@pytest.fixture
def sides(full, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit frames of N clips, the pairs related so that ranks are neither all 1 nor chance."""
    shape = (1545, 16, 768) if full else (48, 4, 96)
    a = torch.randn(shape, device=device)
    b = a + 8 * torch.randn(shape, device=device)
    return tuple(torch.nn.functional.normalize(x, dim=2) for x in (a, b))


def described(op: str, a: torch.Tensor, strategy: str) -> str:
    clips, frames, width = a.shape
    return f"{op} {strategy} N={clips} T={frames} D={width}"


def eager_scores(a: torch.Tensor, b: torch.Tensor, strategy: str) -> torch.Tensor:
    """The plain lines of PyTorch; "max" holds the (N T)^2 products."""
    if strategy == "diagonal_mean":
        return a.flatten(1) @ b.flatten(1).t() / a.shape[1]
    if strategy == "mean":
        return a.mean(1) @ b.mean(1).t()
    if strategy == "diagonal_max":
        return torch.einsum("nkd,mkd->knm", a, b).amax(0)
    products = a.flatten(0, 1) @ b.flatten(0, 1).t()
    frames = a.shape[1]
    return products.unflatten(1, (-1, frames)).unflatten(0, (-1, frames)).amax((1, 3))


def eager_ranks(a: torch.Tensor, b: torch.Tensor, strategy: str) -> torch.Tensor:
    """Average ranks, both directions, from the whole matrix in float64."""
    scores = eager_scores(a.double(), b.double(), strategy)
    ranks = []
    for matrix in (scores, scores.t()):
        own = matrix.diagonal()[:, None]
        ranks.append((matrix > own).sum(1) + ((matrix == own).sum(1) + 1) / 2)
    return torch.stack(ranks).double()


@EVERY
def test_published_loop(strategy, sides, benchmark, record):
    """Not through `measure`: a sample of pairs, extrapolated to all pairs of both directions."""
    a, b = (x.cpu() for x in sides)
    few = a[:6], b[:6]
    same = published.similarity(*few, strategy)
    ours = kernels.frame_similarity(*(x.double() for x in few), strategy=strategy)
    torch.testing.assert_close(same, ours, rtol=1e-5, atol=1e-6)
    ranks = kernels.retrieval_ranks(*few, strategy=strategy, ties="optimistic")
    assert torch.equal(published.ranks(same) + 1, ranks.a_to_b.rank.long())
    pairs = 100 if strategy.startswith("diagonal") else 15
    seconds = list(published.seconds_of_both_directions(a, b, strategy, pairs, 5))
    extra = {
        "provider": "published", "peak_bytes": None, "extrapolated": True, "sampled_pairs": pairs,
        "extrapolated_to_pairs": 2 * len(a) * len(b),
    }  # fmt: skip
    group = described("retrieval_ranks", a, strategy)
    # pytest's own table shows one pair; the row has the extrapolation.
    benchmark.group = f"published loop, one pair of {group}"
    benchmark.pedantic(published.pair_similarity, (a[0], b[1], strategy), rounds=5)
    record(group=group, seconds=seconds, mode="fwd", **extra)


@EVERY
@pytest.mark.parametrize("impl", ("eager", *implementations("retrieval_ranks")))
def test_retrieval_ranks(impl, strategy, sides, full, measure):
    a, b = sides
    skip_unavailable("retrieval_ranks", impl, a.device.type)
    if impl == "eager" and strategy == "max" and full:
        pytest.skip("the float64 products of all frames take 4.9 GB, and as much to reduce")

    def ours():
        ranks = kernels.retrieval_ranks(a, b, strategy=strategy, impl=impl)
        return torch.stack([side.rank for side in ranks])

    forward = (lambda: eager_ranks(a, b, strategy)) if impl == "eager" else ours
    few = a[:40], b[:40]
    checked = kernels.retrieval_ranks(
        *few, strategy=strategy, impl="torch" if impl == "eager" else impl
    )
    torch.testing.assert_close(
        torch.stack([side.rank for side in checked]), eager_ranks(*few, strategy), rtol=0, atol=0
    )
    measure(described("retrieval_ranks", a, strategy), impl, forward)


@EVERY
@pytest.mark.parametrize("impl", ("eager", *implementations("frame_similarity")))
def test_frame_similarity(impl, strategy, full, device, measure):
    """Forward and backward at the size of a training batch."""
    skip_unavailable("frame_similarity", impl, device)
    batch, frames, width = (64, 10, 768) if full else (16, 4, 96)
    a, b = (torch.randn(batch, frames, width, device=device, requires_grad=True) for _ in "ab")

    def eager():
        units = (torch.nn.functional.normalize(x, dim=2) for x in (a, b))
        return eager_scores(*units, strategy)

    def ours():
        return kernels.frame_similarity(a, b, strategy=strategy, impl=impl)

    group = f"frame_similarity {strategy} B={batch} T={frames} D={width}"
    measure(group, impl, eager if impl == "eager" else ours, (a, b), eager())
