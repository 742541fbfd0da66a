"""Max-pooled InfoNCE on one process: the definition, gradients, ties, precision, memory, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast import kernels
from kdcmae_fast.kernels import diagonal_maps, max_pooled_info_nce
from kdcmae_fast.kernels.common import unavailable
from kdcmae_fast.kernels.contrastive import reference
from kdcmae_fast.kernels.contrastive.max_pooled import OP

# Without impl=, every test runs with each implementation the fixture sets.
pytestmark = pytest.mark.usefixtures("impl")

cpp = pytest.mark.skipif(
    unavailable(OP, "cpp", "cpu") is not None, reason="kdcmae_fast._C is not built"
)


def similarities(maps: Tensor, vectors: Tensor, tau=0.03, normalize=True) -> Tensor:
    """(N, M, P) logits before the maximum."""
    if normalize:
        maps, vectors = F.normalize(maps, dim=2), F.normalize(vectors, dim=1)
    return torch.einsum("npd,md->nmp", maps, vectors) / tau


def naive(maps: Tensor, vectors: Tensor, tau=0.03, symmetric=True, normalize=True) -> Tensor:
    """(B,) losses straight from the definition."""
    logits = similarities(maps, vectors, tau, normalize).max(2).values
    pairs = torch.arange(len(maps))
    loss = F.cross_entropy(logits, pairs, reduction="none")
    if symmetric:
        loss = (loss + F.cross_entropy(logits.t(), pairs, reduction="none")) / 2
    return loss


def pairs(batch: int, cells=6, width=12, dtype=torch.float64, grad=True) -> tuple[Tensor, Tensor]:
    """Maps of which one cell resembles the vector."""
    vectors = torch.randn(batch, width, dtype=torch.float64)
    maps = torch.randn(batch, cells, width, dtype=torch.float64)
    maps[:, cells // 2] += 2 * vectors
    return maps.to(dtype).requires_grad_(grad), vectors.to(dtype).requires_grad_(grad)


@pytest.fixture(params=[None, 150], ids=["one block", "many blocks"])
def block_elements(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("batch, cells", [(1, 1), (3, 49), (5, 7), (13, 300)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_values_and_gradients_match_the_definition(
    batch, cells, symmetric, normalize, block_elements
):
    leaves = [*pairs(batch, cells), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
    maps, vectors, tau = leaves
    weight = torch.randn(batch, dtype=torch.float64)
    options = {"symmetric": symmetric, "normalize": normalize}
    loss = max_pooled_info_nce(maps, vectors, temperature=tau, reduction="none", **options)
    expected = naive(maps, vectors, tau, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss @ weight, leaves)
    wanted = torch.autograd.grad(expected @ weight, leaves)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)
    mean = max_pooled_info_nce(maps, vectors, temperature=tau, **options)
    torch.testing.assert_close(mean, expected.mean(), rtol=1e-12, atol=1e-12)


def test_default_is_half_of_the_published_sum_of_directions():
    maps, vectors = pairs(9, grad=False)
    logits = similarities(maps, vectors).amax(2)
    target = torch.arange(9)
    published = F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)
    torch.testing.assert_close(2 * max_pooled_info_nce(maps, vectors), published)


def test_one_sided_is_the_softmax_over_vectors():
    maps = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = max_pooled_info_nce(maps, vectors, symmetric=False, reduction="none")
    assert loss == pytest.approx(torch.full((2,), math.log(2)))


@pytest.mark.parametrize("cells", [1, 5])
def test_gradcheck(cells):
    maps, vectors = pairs(4, cells, 3)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *leaves: max_pooled_info_nce(*leaves[:2], temperature=leaves[2], reduction="none"),
        (maps, vectors, tau),
    )


def test_one_cell_is_info_nce():
    maps, vectors = pairs(17, 1, grad=False)
    for symmetric in (False, True):
        result = max_pooled_info_nce(maps, vectors, symmetric=symmetric, return_accuracy=True)
        # The softmax over vectors for each map, as info_nce's over a for each row of b.
        wanted = kernels.info_nce(
            vectors, maps[:, 0], temperature=0.03, symmetric=symmetric, return_accuracy=True
        )
        torch.testing.assert_close(result, wanted)


def test_of_equal_cells_the_first_takes_the_gradient():
    maps, vectors = pairs(5, 3, grad=False)
    twice = maps.repeat_interleave(2, dim=1).requires_grad_()  # cells 0, 0, 1, 1, 2, 2
    loss = max_pooled_info_nce(twice, vectors)
    torch.testing.assert_close(loss, max_pooled_info_nce(maps, vectors))
    (grad,) = torch.autograd.grad(loss, twice)
    once = maps.requires_grad_()
    (wanted,) = torch.autograd.grad(max_pooled_info_nce(once, vectors), once)
    torch.testing.assert_close(grad[:, ::2], wanted)
    assert not grad[:, 1::2].any()


def test_accuracy_counts_strict_maxima():
    maps, vectors = pairs(40, 5, 4, grad=False)
    maps[:, 2] -= vectors  # not too easy
    logits = similarities(maps, vectors).amax(2)
    target = torch.arange(40)
    over_vectors = (logits.argmax(1) == target).double()
    over_maps = (logits.argmax(0) == target).double()
    one, both = (
        max_pooled_info_nce(maps, vectors, symmetric=s, return_accuracy=True) for s in (False, True)
    )
    assert 0 < one.accuracy < 1
    assert one.accuracy.item() == pytest.approx(over_vectors.mean().item())
    assert both.accuracy.item() == pytest.approx(((over_vectors + over_maps) / 2).mean().item())
    assert not both.accuracy.requires_grad
    collapsed = max_pooled_info_nce(torch.ones(4, 5, 3), torch.ones(4, 3), return_accuracy=True)
    assert collapsed.accuracy == 0


def test_one_pair_and_none():
    maps, vectors = pairs(1)
    result = max_pooled_info_nce(maps, vectors, return_accuracy=True)
    assert result.loss == 0 and result.accuracy == 1
    assert all(not grad.any() for grad in torch.autograd.grad(result.loss, (maps, vectors)))
    for reduction, shape in (("mean", ()), ("none", (0,))):
        maps, vectors = pairs(0)
        loss = max_pooled_info_nce(maps, vectors, reduction=reduction)
        assert loss.shape == shape and not loss.any()
        loss.sum().backward()
        assert maps.grad.shape == (0, 6, 12) and vectors.grad.shape == (0, 12)


def test_invariances():
    maps, vectors = pairs(9, grad=False)
    order, places = torch.randperm(9), torch.randperm(6)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    loss = max_pooled_info_nce(maps, vectors)
    torch.testing.assert_close(max_pooled_info_nce(maps[order], vectors[order]), loss)
    torch.testing.assert_close(max_pooled_info_nce(maps[:, places], vectors), loss)
    torch.testing.assert_close(max_pooled_info_nce(maps @ rotation, 3 * vectors @ rotation), loss)


def test_matched_orthonormal_pairs_have_full_relative_precision():
    eye = torch.eye(6)
    maps = torch.stack([eye, -eye], dim=1).requires_grad_()
    loss = max_pooled_info_nce(maps, eye, temperature=0.05)
    # An unlike pair's best cell is either of two zeros.
    assert loss.item() == pytest.approx(math.log1p(5 * math.exp(-20)), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, maps)
    assert grad[0, 0, 1].item() == pytest.approx(math.exp(-20) / (0.05 * 6), rel=1e-4)


@pytest.mark.parametrize("batch, cells, width", [(65, 49, 96), (3, 196, 1023), (9, 5, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(batch, cells, width, dtype, within_budget):
    maps, vectors = pairs(batch, cells, width, dtype)
    loss = max_pooled_info_nce(maps, vectors, temperature=0.1)
    assert loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (maps, vectors)]
    exact, eager = naive(*wide, 0.1).mean(), naive(maps, vectors, 0.1).mean()
    within_budget(loss, eager, exact)
    grads, eager_grads, exact_grads = (
        torch.autograd.grad(value, inputs)
        for value, inputs in ((loss, (maps, vectors)), (eager, (maps, vectors)), (exact, wide))
    )
    for grad, same, want in zip(grads, eager_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        within_budget(grad, same, want, factor=3.0)


@pytest.mark.parametrize(
    "precision, tolerance", [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 8e-3), (None, 1e-6)]
)
def test_precision_sets_the_operands(precision, tolerance):
    maps, vectors = pairs(33, 9, 64, torch.float32, grad=False)
    exact = naive(maps.double(), vectors.double(), 0.5)
    loss = max_pooled_info_nce(
        maps, vectors, temperature=0.5, precision=precision, reduction="none"
    )
    error = ((loss - exact).norm() / exact.norm()).item()
    assert error <= tolerance
    if precision in ("fp16", "bf16"):
        assert error > 1e-6  # the option did something


def test_mixed_dtypes_and_autocast():
    maps, vectors = pairs(6, 5, 8, torch.float32)
    mixed = max_pooled_info_nce(maps.bfloat16(), vectors)
    wanted = max_pooled_info_nce(maps.bfloat16().float(), vectors)
    assert mixed.item() == pytest.approx(wanted.item(), rel=1e-6)
    plain = max_pooled_info_nce(maps, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = max_pooled_info_nce(maps, vectors)
        grad_inside = torch.autograd.grad(inside, maps)[0]
        assert torch.equal(diagonal_maps(maps, vectors), diagonal_maps(maps, vectors))
    assert torch.equal(inside, plain)
    assert torch.equal(grad_inside, torch.autograd.grad(plain, maps)[0])


@pytest.mark.parametrize("layout", ["channels first", "sliced", "expanded", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(layout, dtype):
    maps, vectors = {
        "channels first": lambda: (torch.randn(5, 8, 6).transpose(1, 2), torch.randn(8, 5).t()),
        "sliced": lambda: (torch.randn(5, 12, 16)[:, ::2, ::2], torch.randn(5, 16)[:, ::2]),
        "expanded": lambda: (torch.randn(1, 6, 1).expand(5, 6, 8), torch.randn(1, 8).expand(5, 8)),
        "offset": lambda: (torch.randn(241)[1:].view(5, 6, 8), torch.randn(41)[1:].view(5, 8)),
    }[layout]()
    maps, vectors = maps.to(dtype), vectors.to(dtype)
    results = []
    for inputs in ((maps, vectors), (maps.contiguous(), vectors.contiguous())):
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = max_pooled_info_nce(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for strided, plain in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_partial_gradients(needed):
    leaves = [*pairs(5), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)]
    loss = max_pooled_info_nce(*leaves[:2], temperature=leaves[2])
    full = torch.autograd.grad(loss, leaves)
    some = [x.detach().requires_grad_(bool(n)) for x, n in zip(leaves, needed, strict=True)]
    max_pooled_info_nce(*some[:2], temperature=some[2]).backward()
    for leaf, n, want in zip(some, needed, full, strict=True):
        assert torch.equal(leaf.grad, want) if n else leaf.grad is None


def test_no_product_of_all_maps_and_vectors_is_saved(saved_storages):
    maps, vectors = pairs(64, 49, 16, torch.float32)
    saved = saved_storages(lambda: max_pooled_info_nce(maps, vectors))
    assert maps.data_ptr() in saved  # as it came, not a copy
    extra = sum(saved.values()) - maps.numel() * 4
    assert extra <= 64 * 64 * (4 + 2) + 64 * 49 * 4 + 64 * 16 * 4 + 10 * 64 * 4


def test_peak_memory_does_not_grow_with_the_product(monkeypatch):
    """The largest single allocation stays below N * P * M elements, in both passes."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 2**16)
    batch, cells, width = 256, 49, 8
    maps, vectors = pairs(batch, cells, width, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(max_pooled_info_nce(maps, vectors), (maps, vectors))
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(sizes) < batch * cells * batch * 4 / 4


def test_deterministic_and_poison_free(poison_empty):
    maps, vectors = pairs(17, dtype=torch.float32)
    runs = []
    for _ in range(2):
        loss = max_pooled_info_nce(maps, vectors)
        runs.append((loss, *torch.autograd.grad(loss, (maps, vectors))))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("place", [(1, 0, 2), (1, 4, 2)])
def test_non_finite_input_shows(place):
    maps, vectors = pairs(4, grad=False)
    maps[place] = math.nan
    losses = max_pooled_info_nce(maps, vectors, symmetric=False, reduction="none")
    assert losses[1].isnan() and losses[[0, 2, 3]].isfinite().all()
    maps, vectors = pairs(1, grad=False)
    vectors[0, 0] = math.nan
    assert max_pooled_info_nce(maps, vectors).isnan()


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_breaks():
    compiled = torch.compile(
        lambda maps, vectors, tau: max_pooled_info_nce(maps, vectors, temperature=tau),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for batch in (4, 7):
        leaves = [*pairs(batch, 5, 8, torch.float32), torch.tensor(0.1, requires_grad=True)]
        loss = max_pooled_info_nce(*leaves[:2], temperature=leaves[2])
        grads = torch.autograd.grad(loss, leaves)
        again = compiled(*leaves)
        torch.testing.assert_close(again, loss)
        for grad, want in zip(torch.autograd.grad(again, leaves), grads, strict=True):
            torch.testing.assert_close(grad, want)


def test_opcheck():
    maps, vectors = pairs(5, 3, 4, torch.float32)
    op = torch.ops.kdcmae_fast.max_pooled_info_nce
    torch.library.opcheck(op, (maps, vectors, torch.tensor(0.1), True, True))
    losses, hits = op(maps, vectors, torch.tensor(0.03), True, True)
    wanted = max_pooled_info_nce(maps, vectors, reduction="none", return_accuracy=True)
    torch.testing.assert_close((losses, hits), tuple(wanted))


@cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_cpp(dtype):
    maps, vectors = pairs(3, 4, 5, torch.float32, grad=False)
    rows = (maps.to(dtype), torch.rand(3, 4), torch.randn(6, 5), torch.tensor(9.0))
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.max_pooled_scores_cpp.default, rows)
    grad, logits = torch.randn(3, 6), torch.randn(3, 6)
    cells = torch.randint(4, (3, 6), dtype=torch.int16)
    by_maps = (*rows, torch.tensor(0.5), grad, logits, cells, True, dtype)
    torch.library.opcheck(ops.max_pooled_gradient_by_maps_cpp.default, by_maps)
    by_vectors = (*rows, torch.tensor(0.5), grad, cells)
    torch.library.opcheck(ops.max_pooled_gradient_by_vectors_cpp.default, by_vectors)


@cpp
@pytest.mark.parametrize("batch, cells, width", [(515, 3, 70), (33, 300, 257), (257, 49, 130)])
def test_cpp_tiles(batch, cells, width):
    """Several blocks of vectors, maps and width, with odd remainders."""
    results = []
    for impl in ("torch", "cpp"):
        torch.manual_seed(3)
        leaves = [
            *pairs(batch, cells, width),
            torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
        ]
        result = max_pooled_info_nce(
            *leaves[:2], temperature=leaves[2], return_accuracy=True, impl=impl
        )
        results.append((*result, *torch.autograd.grad(result.loss, leaves)))
    for cpp_result, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(cpp_result, wanted, rtol=1e-9, atol=1e-13)


@cpp
def test_cpp_results_do_not_depend_on_the_number_of_threads():
    maps, vectors = pairs(130, 49, 300, torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss = max_pooled_info_nce(maps, vectors, reduction="none", impl="cpp")
            runs.append((loss, *torch.autograd.grad(loss.sum(), (maps, vectors))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.large
def test_past_int32(impl):
    """2.15e9 map values in half precision and as many gradients; 9 GB."""
    if impl == "torch":
        pytest.skip("minutes of float16 products")
    batch, cells, width = 64, 512, 65_600
    maps = torch.zeros(1, cells, 1, dtype=torch.float16).expand(batch, cells, width).contiguous()
    assert maps.numel() > 2**31
    maps[-1, -1] = torch.randn(width).half()
    vectors = torch.randn(batch, width)
    vectors[-1] = maps[-1, -1].float()
    maps.requires_grad_()
    losses = max_pooled_info_nce(maps, vectors, symmetric=False, reduction="none")
    others = vectors[:-1].double() @ vectors[-1].double()
    logits = others / vectors.double().norm(dim=1)[:-1] / vectors[-1].double().norm() / 0.03
    wanted = (logits.clamp_min(0) - 1 / 0.03).exp().sum().log1p()
    assert losses[-1].item() == pytest.approx(wanted.item(), rel=1e-3)
    (grad,) = torch.autograd.grad(losses[-2:].sum(), maps)
    assert grad[-1, -1].isfinite().all() and not grad[0].any()
