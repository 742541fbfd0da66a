"""kernels/similarity in Triton, beside the reference."""

import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import frame_similarity, retrieval_ranks

STRATEGIES = ("diagonal_mean", "diagonal_max", "mean", "max")
EVERY = pytest.mark.parametrize("strategy", STRATEGIES)

pytestmark = pytest.mark.triton


def clips(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def run(a, b, device, **options):
    """(scores, gradient by a, gradient by b) on the CPU."""
    a, b = (x.detach().to(device).requires_grad_() for x in (a, b))
    scores = frame_similarity(a, b, **options)
    weight = torch.linspace(1, 2, scores.numel(), dtype=scores.dtype, device=device)
    total = (scores * weight.view(scores.shape)).sum()
    return [x.detach().cpu() for x in (scores, *torch.autograd.grad(total, (a, b)))]


@EVERY
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 70, 3, 19), (18, 4, 5, 40)], ids=str)
def test_float64_equals_the_reference(strategy, normalize, shape, triton_device):
    n, m, frames, width = shape
    a, b = clips(n, frames, width), clips(m, frames, width)
    options = {"strategy": strategy, "normalize": normalize}
    results = run(a, b, triton_device, impl="triton", **options)
    for result, wanted in zip(results, run(a, b, "cpu", impl="torch", **options), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-11, atol=1e-13)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(strategy, dtype, triton_device, within_budget):
    a, b = clips(3, 4, 96, dtype=dtype), clips(5, 4, 96, dtype=dtype)
    results = run(a, b, triton_device, strategy=strategy, impl="triton")
    eager = run(a, b, "cpu", strategy=strategy, impl="torch")
    exact = run(a.double(), b.double(), "cpu", strategy=strategy, impl="torch")
    for index, triple in enumerate(zip(results, eager, exact, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        within_budget(*triple, factor=2.0 if index == 0 else 3.0)


# NumPy has its say in the interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")
@EVERY
def test_equal_maxima_empty_sides_and_not_a_number(strategy, triton_device):
    same = clips(3, 1, 8).repeat(1, 4, 1), clips(5, 1, 8).repeat(1, 4, 1)
    for n, m in ((0, 3), (3, 0), (0, 0)):
        empty = run(clips(n, 2, 5), clips(m, 2, 5), triton_device, strategy=strategy, impl="triton")
        assert empty[0].shape == (n, m) and not empty[1].any() and not empty[2].any()
    results = run(*same, triton_device, strategy=strategy, impl="triton")
    for result, wanted in zip(
        results, run(*same, "cpu", strategy=strategy, impl="torch"), strict=True
    ):
        torch.testing.assert_close(result, wanted)
    same[0][2, 1, 0], same[1][1, 3, 5] = math.nan, math.inf
    bad = run(*same, triton_device, strategy=strategy, impl="triton")[0].isnan()
    wanted = torch.zeros(3, 5, dtype=torch.bool)
    wanted[2], wanted[:, 1] = True, True
    assert torch.equal(bad, wanted)


@EVERY
def test_any_strides_mixed_dtypes_and_unwritten_memory(strategy, triton_device, poison_empty):
    a = torch.randn(11, 6, 4).transpose(0, 2)[:, ::2].to(triton_device)
    b = torch.randn(5, 3, 22).half().to(triton_device)[..., ::2].requires_grad_()
    scores = frame_similarity(a, b, strategy=strategy, impl="triton")
    wanted = frame_similarity(a.cpu(), b.detach().cpu(), strategy=strategy, impl="torch")
    torch.testing.assert_close(scores.detach().cpu(), wanted)
    scores.sum().backward()
    assert b.grad.isfinite().all() and b.grad.any() and b.grad.dtype == torch.float16


@EVERY
@pytest.mark.parametrize("ties", ["average", "published"])
def test_ranks_equal_the_reference_s(strategy, ties, triton_device):
    a = torch.randn(133, 3, 9)
    b = a + 1.5 * torch.randn(133, 3, 9)
    b[70:90] = b[:20] * 4
    if ties == "published":
        b[100, 1, 1] = math.nan
    for x, y in ((a, b), (a.bfloat16(), b.bfloat16()), (a.double(), b)):
        sides = x.to(triton_device), y.to(triton_device)
        ranks = retrieval_ranks(*sides, strategy=strategy, ties=ties, impl="triton")
        wanted = retrieval_ranks(x, y, strategy=strategy, ties=ties, impl="torch")
        for side, want in zip(ranks, wanted, strict=True):
            for result, expected in zip(side, want, strict=True):
                torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@EVERY
def test_ranks_of_products_and_without_tolerance(strategy, triton_device):
    a, b = (1e4 * torch.randn(67, 2, 5).to(triton_device) for _ in "ab")
    for options in ({"normalize": False}, {"tolerance": 0.0}):
        ranks = retrieval_ranks(a, b, strategy=strategy, impl="triton", **options)
        wanted = retrieval_ranks(a.cpu(), b.cpu(), strategy=strategy, impl="torch", **options)
        for side, want in zip(ranks, wanted, strict=True):
            assert torch.equal(side.rank.cpu(), want.rank)
            assert torch.equal(side.equal.cpu(), torch.ones(67, dtype=torch.int64))
    empty = torch.empty(0, 2, 5, device=triton_device)
    assert retrieval_ranks(empty, empty, strategy=strategy, impl="triton").b_to_a.rank.shape == (0,)


@EVERY
def test_opcheck(strategy, triton_device):
    ops, check = torch.ops.kdcmae_fast, torch.library.opcheck
    a, b = (clips(n, 2, 5, dtype=torch.float32).to(triton_device) for n in (3, 4))
    inverses = [ops.frame_inverse_norms(x, torch.float32, True, "") for x in (a, b)]
    check(ops.frame_similarity_triton.default, (a, b, *inverses, strategy))
    grad, index = ops.frame_similarity_triton(a, b, *inverses, strategy)
    backward = ops.frame_similarity_grad_triton.default
    for of_b, normalize in ((False, True), (True, False)):
        check(backward, (grad, index, a, b, *inverses, strategy, normalize, of_b))
    inverse = inverses[0].double()
    counts = ops.similarity_counts_triton.default
    check(counts, (a, a, inverse, inverse, strategy, 1e-10, False, 0))


@EVERY
def test_deterministic(strategy, triton_device):
    a, b = clips(9, 3, 20, dtype=torch.float32), clips(66, 3, 20, dtype=torch.float32)
    once, again = (run(a, b, triton_device, strategy=strategy, impl="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_limits_are_said(triton_device):
    long = torch.randn(2, 65, 3, device=triton_device)
    with pytest.raises(ValueError, match="at most 64 frames for strategy='max', a has 65"):
        frame_similarity(long, long, strategy="max", impl="triton")
    scores = frame_similarity(long, long, impl="triton")  # the other strategies have no limit
    torch.testing.assert_close(scores.cpu(), frame_similarity(long.cpu(), long.cpu(), impl="torch"))
    with pytest.raises(ValueError, match="tile_size=4: the Triton kernel has its own"):
        retrieval_ranks(long, long, tile_size=4, impl="triton")
