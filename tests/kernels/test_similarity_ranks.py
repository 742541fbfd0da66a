"""Retrieval ranks against sorting whole matrices: ties, duplicates, tiles, NaN, memory, errors."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcmae_fast.kernels import frame_similarity, retrieval_ranks

OP = "retrieval_ranks"
pytestmark = pytest.mark.usefixtures("impl")

STRATEGIES = ("diagonal_mean", "diagonal_max", "mean", "max")
TIES = ("average", "optimistic", "published")
EVERY = pytest.mark.parametrize("strategy", STRATEGIES)


def noisy_pairs(count: int, frames: int = 3, width: int = 7) -> tuple[Tensor, Tensor]:
    a = torch.randn(count, frames, width)
    return a, a + 1.5 * torch.randn(count, frames, width)


def sorted_ranks(scores: np.ndarray, ties: str) -> list[float]:
    """Ranks of the diagonal of (N, N) scores, by sorting each row; NaN scores come last."""
    ranks = []
    for query, row in enumerate(scores):
        own = row[query]
        ordered = sorted((score for score in row if not math.isnan(score)), reverse=True)
        places = [place for place, score in enumerate(ordered, 1) if score == own]
        ranks.append((np.mean(places) if ties == "average" else places[0]) if places else math.nan)
    return ranks


def assert_ranks(ranks, scores: np.ndarray, ties: str) -> None:
    for side, matrix in ((ranks.a_to_b, scores), (ranks.b_to_a, scores.T)):
        np.testing.assert_array_equal(side.rank.numpy(), sorted_ranks(matrix, ties))
        own = matrix.diagonal()[:, None]
        np.testing.assert_array_equal(side.above.numpy(), (matrix > own).sum(1))
        np.testing.assert_array_equal(side.equal.numpy(), (matrix == own).sum(1))


@EVERY
@pytest.mark.parametrize("count", [1, 3, 65, 257])
@pytest.mark.parametrize("tile_size", [None, 1, 32])
def test_equals_sorting(strategy, count, tile_size):
    if count > 3 and tile_size == 1:
        tile_size = count // 3
    a, b = noisy_pairs(count)
    scores = frame_similarity(a.double(), b.double(), strategy=strategy, impl="torch").numpy()
    for tolerance in (1e-10, 0.0):
        for ties in TIES:
            ranks = retrieval_ranks(
                a, b, strategy=strategy, ties=ties, tolerance=tolerance, tile_size=tile_size
            )
            assert_ranks(ranks, scores, ties)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@EVERY
def test_every_dtype_is_ranked_in_float64(strategy, dtype):
    a, b = (x.to(dtype) for x in noisy_pairs(70))
    scores = frame_similarity(a.double(), b.double(), strategy=strategy, impl="torch").numpy()
    assert_ranks(retrieval_ranks(a, b, strategy=strategy), scores, "average")
    mixed = retrieval_ranks(a.float(), b, strategy=strategy)
    assert_ranks(mixed, scores, "average")


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 23),
    frames=st.integers(1, 4),
    tile_size=st.one_of(st.none(), st.integers(1, 30)),
    strategy=st.sampled_from(STRATEGIES),
    ties=st.sampled_from(TIES),
    seed=st.integers(0, 999),
)
def test_ties_equal_sorting(count, frames, tile_size, strategy, ties, seed):
    # Axis-aligned unit vectors: sums of cosines are exact and most queries are tied.
    rng = np.random.default_rng(seed)
    a, b = (torch.eye(3)[rng.integers(0, 3, (count, frames))] for _ in range(2))
    products = np.einsum("nkd,mld->nmkl", a.numpy(), b.numpy())
    if strategy.startswith("diagonal"):
        products = np.diagonal(products, axis1=2, axis2=3)[..., None]
    scores = products.max((2, 3)) if strategy.endswith("max") else products.sum((2, 3))
    ranks = retrieval_ranks(a, b, strategy=strategy, ties=ties, tile_size=tile_size)
    assert_ranks(ranks, scores, ties)


@EVERY
@pytest.mark.parametrize("tile_size", [None, 37])
def test_duplicates_tie_whatever_the_tile(strategy, tile_size):
    b = torch.randn(401, 4, 65)
    b[300:] = b[:101] * 4  # the same directions, other lengths
    ranks = retrieval_ranks(b.clone(), b, strategy=strategy, tile_size=tile_size)
    twice = torch.ones(401, dtype=torch.bool)
    twice[101:300] = False
    if strategy == "mean":  # a clip need not be nearest to itself
        assert torch.equal(ranks.a_to_b.equal, twice + 1)
        return
    for side in ranks:
        assert torch.equal(side.equal, twice + 1) and not side.above.any()
        assert torch.equal(side.rank, 1 + twice / 2)
    exact = retrieval_ranks(b[:300], b[:300].clone(), strategy=strategy, tolerance=0)
    assert all((side.rank == 1).all() and (side.equal == 1).all() for side in exact)


@EVERY
def test_constant_features_are_in_the_middle(strategy):
    a = torch.ones(50, 2, 4)
    for ties, rank in (("average", 25.5), ("optimistic", 1), ("published", 1)):
        ranks = retrieval_ranks(a, a, strategy=strategy, ties=ties)
        assert all((side.rank == rank).all() and (side.equal == 50).all() for side in ranks)


@EVERY
def test_published_lets_not_a_number_through(strategy):
    a, b = noisy_pairs(43)
    b[3, 1, 2] = math.nan
    a[41, 0, 0] = math.inf
    ranks = retrieval_ranks(a, b, strategy=strategy, ties="published", tile_size=20)
    scores = frame_similarity(a.double(), b.double(), strategy=strategy, impl="torch").numpy()
    assert_ranks(ranks, scores, "published")
    for side in ranks:
        assert side.rank.isnan().nonzero().flatten().tolist() == [3, 41]
    for ties in ("average", "optimistic"):
        with pytest.raises(ValueError, match=r"a is not finite in 1 of 43 clips \(rows 41\)"):
            retrieval_ranks(a, b, strategy=strategy, ties=ties)
    with pytest.raises(ValueError, match=r"b is not finite in 1 of 43 clips \(rows 3\)"):
        retrieval_ranks(b.nan_to_num(), b, strategy=strategy, normalize=False)


def test_overflowing_norms_are_not_mistaken_for_bad_features():
    a = torch.full((3, 1, 4), 1e200, dtype=torch.float64)
    assert torch.equal(retrieval_ranks(a, a).a_to_b.equal, torch.full((3,), 3))


@EVERY
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_products_tie_relative_to_their_size(strategy, scale):
    a, b = (scale * x for x in noisy_pairs(30))
    b[20:] = b[:10]
    scores = frame_similarity(
        a.double(), b.double(), strategy=strategy, normalize=False, impl="torch"
    ).numpy()
    scores[:, 20:] = scores[:, :10]  # free of rounding
    ranks = retrieval_ranks(a, b, strategy=strategy, normalize=False, tile_size=7)
    np.testing.assert_array_equal(ranks.a_to_b.rank.numpy(), sorted_ranks(scores, "average"))


@EVERY
def test_threads_and_strides_change_nothing(strategy):
    a, b = noisy_pairs(150, 2, 12)
    wanted, threads = retrieval_ranks(a, b, strategy=strategy), torch.get_num_threads()
    odd = torch.empty(150 * 24 + 1)[1:].view(12, 2, 150).permute(2, 1, 0).copy_(b)
    try:
        torch.set_num_threads(3)
        again = retrieval_ranks(a, odd.requires_grad_(), strategy=strategy)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for u, v in zip(wanted, again, strict=True)
               for x, y in zip(u, v, strict=True))  # fmt: skip


@EVERY
def test_no_clips(strategy):
    empty = torch.empty(0, 2, 5)
    for side in retrieval_ranks(empty, empty, strategy=strategy):
        assert [x.shape for x in side] == [(0,)] * 3


def test_compiles_without_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(retrieval_ranks, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (5, 8):
        a, b = noisy_pairs(count)
        for side, want in zip(compiled(a, b), retrieval_ranks(a, b), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(side, want, strict=True))


@EVERY
def test_opcheck(strategy, impl):
    a, b = noisy_pairs(9)
    inverses = [torch.rand(9, 3, dtype=torch.float64) for _ in "ab"]
    op = getattr(torch.ops.kdcmae_fast, f"similarity_counts_{impl}").default
    torch.library.opcheck(op, (a, b, *inverses, strategy, 1e-10, False, 4))


MEMORY = """
import resource, torch
from kdcmae_fast.kernels import retrieval_ranks
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
a = torch.randn({count}, {frames}, 4)
retrieval_ranks(a[:300], a[:300], strategy="{strategy}")
before = peak()
assert (retrieval_ranks(a, a, strategy="{strategy}").a_to_b.above >= 0).all()
print(peak() - before)
"""


@pytest.mark.parametrize("strategy, count, frames", [("mean", 12_000, 2), ("max", 800, 16)])
def test_memory_grows_with_the_clips_not_with_their_square(strategy, count, frames):
    code = MEMORY.format(strategy=strategy, count=count, frames=frames)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # In float64 the whole matrix takes 1.1 GB (mean), the frames' one 1.3 GB (max).
    assert int(done.stdout) < 100, f"{done.stdout} MiB"


@pytest.mark.parametrize(
    "sides, options, message",
    [
        ((3, 4), {}, "a and b must be the same clips, got 3 and 4 of them"),
        ((3, 3), {"ties": "first"}, "ties='first' is not one of average, optimistic, published"),
        ((3, 3), {"strategy": "sum"}, "strategy='sum' is not one of diagonal_mean"),
        ((3, 3), {"tolerance": -1.0}, "tolerance must be finite and at least 0, got -1.0"),
        ((3, 3), {"tile_size": 0}, "tile_size=0 must be positive"),
        ((3, 3), {"impl": "cuda"}, "impl='cuda' of retrieval_ranks is not available here"),
    ],
)
def test_errors_name_the_argument(sides, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(*(torch.ones(n, 2, 5) for n in sides), **options)


@pytest.mark.large
def test_past_int32():
    """2.2e9 half-precision elements, the same tensor on both sides: 4.3 GB."""
    count, frames, width = 2740, 1024, 768
    a = torch.zeros(count, frames, width, dtype=torch.float16)
    assert a.numel() > 2**31
    a[-2:] = torch.randn(2, frames, width)
    ranks = retrieval_ranks(a, a, strategy="mean").a_to_b
    assert ranks.equal[-2:].tolist() == [1, 1] and (ranks.equal[:-2] == count).all()
