"""InfoNCE on one process: closed forms, gradients, precision, compile, argument errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import unavailable
from kdcmae_fast.kernels.contrastive import reference

OP = "info_nce"  # of the fixture impl


@pytest.fixture
def info_nce(impl):
    return functools.partial(kernels.info_nce, impl=impl)


cpp = pytest.mark.skipif(
    unavailable("info_nce", "cpp", "cpu") is not None, reason="kdcmae_fast._C is not built"
)


def naive(a: Tensor, b: Tensor, tau: float | Tensor, symmetric=False, normalize=True) -> Tensor:
    """(B,) losses straight from the definition."""
    if normalize:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = b @ a.t() / tau
    pairs = torch.arange(len(a))
    loss = F.cross_entropy(logits, pairs, reduction="none")
    if symmetric:
        loss = (loss + F.cross_entropy(logits.t(), pairs, reduction="none")) / 2
    return loss


def pairs(batch: int, width: int = 12, dtype=torch.float64, grad=True) -> tuple[Tensor, Tensor]:
    a = torch.randn(batch, width, dtype=torch.float64)
    b = a + torch.randn(batch, width, dtype=torch.float64)
    return a.to(dtype).requires_grad_(grad), b.to(dtype).requires_grad_(grad)


@pytest.fixture(params=[None, 24], ids=["one block", "many blocks"])
def block_elements(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("batch", [1, 3, 5, 13])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_values_and_gradients_match_the_definition(
    batch, symmetric, normalize, block_elements, info_nce
):
    a, b = pairs(batch)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(batch, dtype=torch.float64)
    options = {"symmetric": symmetric, "normalize": normalize}
    loss = info_nce(a, b, temperature=tau, reduction="none", **options)
    expected = naive(a, b, tau, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss @ weight, (a, b, tau))
    wanted = torch.autograd.grad(expected @ weight, (a, b, tau))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)
    mean = info_nce(a, b, temperature=tau, **options)
    torch.testing.assert_close(mean, expected.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck(symmetric, info_nce):
    a, b = pairs(4, 3)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b, tau: info_nce(a, b, temperature=tau, symmetric=symmetric, reduction="none"),
        (a, b, tau),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_orthonormal_pairs_have_full_relative_precision(dtype, temperature, symmetric, info_nce):
    batch = 6
    eye = torch.eye(batch, dtype=dtype, requires_grad=True)
    exact = math.log1p((batch - 1) * math.exp(-1 / temperature))
    loss = info_nce(eye, eye.detach(), temperature=temperature, symmetric=symmetric)
    assert loss.item() == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 1e-12)
    (grad,) = torch.autograd.grad(loss, eye)
    # By symmetry every off-diagonal entry is softmax probability / (temperature * batch).
    p = math.exp(-1 / temperature - exact)
    assert grad[0, 1].item() == pytest.approx(p / (temperature * batch), rel=1e-5)


def test_direction_is_softmax_over_a(info_nce):
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Both rows of a are alike: over a, each row of b sees a tie.
    assert info_nce(a, b, reduction="none") == pytest.approx(torch.full((2,), math.log(2)))
    assert info_nce(b, a, reduction="none")[0].item() == pytest.approx(0.0, abs=1e-6)


def test_accuracy_counts_strict_maxima(info_nce):
    a, b = pairs(40, 4)
    logits = F.normalize(b, dim=1) @ F.normalize(a, dim=1).t()
    target = torch.arange(40)
    over_a = (logits.argmax(1) == target).double()
    over_b = (logits.argmax(0) == target).double()
    one, both = (info_nce(a, b, symmetric=s, return_accuracy=True) for s in (False, True))
    assert 0 < one.accuracy < 1
    assert one.accuracy.item() == pytest.approx(over_a.mean().item())
    assert both.accuracy.item() == pytest.approx(((over_a + over_b) / 2).mean().item())
    assert not one.accuracy.requires_grad
    rows = info_nce(a, b, reduction="none", return_accuracy=True)
    assert torch.equal(rows.accuracy, over_a)
    collapsed = torch.ones(4, 3)
    assert info_nce(collapsed, collapsed, return_accuracy=True).accuracy == 0


def test_one_pair_and_none(info_nce):
    a, b = pairs(1)
    result = info_nce(a, b, symmetric=True, return_accuracy=True)
    assert result.loss == 0 and result.accuracy == 1
    assert all(not grad.any() for grad in torch.autograd.grad(result.loss, (a, b)))
    for reduction, shape in (("mean", ()), ("none", (0,))):
        a, b = pairs(0)
        result = info_nce(a, b, reduction=reduction, return_accuracy=True)
        assert result.loss.shape == shape and not result.loss.any() and not result.accuracy.any()
        result.loss.sum().backward()
        assert a.grad.shape == (0, 12)


def test_invariances(info_nce):
    a, b = pairs(9, grad=False)
    order = torch.randperm(9)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    loss = info_nce(a, b, symmetric=True)
    torch.testing.assert_close(info_nce(a[order], b[order], symmetric=True), loss)
    torch.testing.assert_close(info_nce(a @ rotation, 3 * b @ rotation, symmetric=True), loss)
    torch.testing.assert_close(info_nce(b, a, symmetric=True), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_low_precision_stays_within_pytorch_s_own_error(dtype, symmetric, within_budget, info_nce):
    a, b = pairs(65, 96, dtype)
    loss = info_nce(a, b, symmetric=symmetric)
    assert loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    exact = naive(*wide, 0.05, symmetric).mean()
    eager = naive(a, b, 0.05, symmetric).mean()
    within_budget(loss, eager, exact)
    grads, eager_grads, exact_grads = (
        torch.autograd.grad(value, inputs)
        for value, inputs in ((loss, (a, b)), (eager, (a, b)), (exact, wide))
    )
    for grad, same, want in zip(grads, eager_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        within_budget(grad, same, want, factor=3.0)


@pytest.mark.parametrize(
    "precision, tolerance", [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 5e-3), (None, 1e-6)]
)
def test_precision_sets_the_operands(precision, tolerance, info_nce):
    a, b = pairs(33, 64, torch.float32, grad=False)
    exact = naive(a.double(), b.double(), 0.5)
    loss = info_nce(a, b, temperature=0.5, precision=precision, reduction="none")
    error = ((loss - exact).norm() / exact.norm()).item()
    assert error <= tolerance
    if precision in ("fp16", "bf16"):
        assert error > 1e-6  # the option did something


def test_float16_gradients_survive_small_weights(info_nce):
    a, b = pairs(8, 16, torch.float16)
    small = info_nce(a, b, temperature=0.5, reduction="none") * 1e-9
    (grad,) = torch.autograd.grad(small.sum(), b)
    assert not grad.any()  # below float16: the result's dtype is the limit
    wide_a, wide_b = (x.detach().float().requires_grad_() for x in (a, b))
    loss = info_nce(wide_a, wide_b, temperature=0.5, precision="fp16", reduction="none") * 1e-9
    want = naive(wide_a, wide_b, 0.5) * 1e-9
    grads = [torch.autograd.grad(x.sum(), wide_b)[0] for x in (loss, want)]
    assert (grads[0] - grads[1]).norm() <= 2e-3 * grads[1].norm()


def test_mixed_dtypes_and_autocast(info_nce):
    a, b = pairs(6, 8, torch.float32)
    mixed = info_nce(a.bfloat16(), b)
    assert mixed.item() == pytest.approx(info_nce(a.bfloat16().float(), b).item(), rel=1e-6)
    plain = info_nce(a, b, symmetric=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(a, b, symmetric=True)
        grad_inside = torch.autograd.grad(inside, a)[0]
    assert torch.equal(inside, plain)
    assert torch.equal(grad_inside, torch.autograd.grad(plain, a)[0])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_any_strides(layout, info_nce):
    if layout == "expanded":
        a, b = torch.randn(1, 8).expand(5, 8), torch.randn(5, 8)
    else:
        make = {
            "transposed": lambda: torch.randn(8, 5).t(),
            "sliced": lambda: torch.randn(5, 16)[:, ::2],
            "offset": lambda: torch.randn(41)[1:].view(5, 8),
        }[layout]
        a, b = make(), make()
    plain = info_nce(a.contiguous(), b.contiguous(), symmetric=True)
    torch.testing.assert_close(info_nce(a, b, symmetric=True), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_partial_gradients(needed, symmetric, info_nce):
    values = [*pairs(5, grad=False), torch.tensor(0.2, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in values]
    a, b, tau = leaves
    full = torch.autograd.grad(info_nce(a, b, temperature=tau, symmetric=symmetric), leaves)
    some = [x.detach().requires_grad_(bool(n)) for x, n in zip(leaves, needed, strict=True)]
    loss = info_nce(some[0], some[1], temperature=some[2], symmetric=symmetric)
    loss.backward()
    for leaf, n, want in zip(some, needed, full, strict=True):
        assert torch.equal(leaf.grad, want) if n else leaf.grad is None


@pytest.mark.parametrize("limit, largest", [(64 * 64, 64 * 64), (64 * 64 - 1, 64 * 4)])
def test_only_logits_of_one_block_are_saved(limit, largest, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", limit)
    a, b = pairs(64, 4, torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.append(x.numel()), x)[1], lambda x: x
    ):
        kernels.info_nce(a, b, symmetric=True, impl="torch")
    assert max(saved) == largest and saved.count(64 * 64) <= 1


def test_deterministic_and_poison_free(poison_empty, info_nce):
    a, b = pairs(17, dtype=torch.float32)
    runs = []
    for _ in range(2):
        loss = info_nce(a, b, symmetric=True)
        runs.append((loss, *torch.autograd.grad(loss, (a, b))))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*runs, strict=True))


def test_non_finite_input_shows(info_nce):
    a, b = pairs(4, grad=False)
    a[1, 2] = math.nan
    assert info_nce(a, b).isnan()


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("symmetric", [False, True])
def test_compiles_without_breaks(symmetric, info_nce):
    compiled = torch.compile(
        lambda a, b, tau: info_nce(a, b, temperature=tau, symmetric=symmetric),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for batch in (4, 7):
        a, b = pairs(batch, 8, torch.float32)
        tau = torch.tensor(0.1, requires_grad=True)
        loss = info_nce(a, b, temperature=tau, symmetric=symmetric)
        grads = torch.autograd.grad(loss, (a, b, tau))
        again = compiled(a, b, tau)
        torch.testing.assert_close(again, loss)
        for grad, want in zip(torch.autograd.grad(again, (a, b, tau)), grads, strict=True):
            torch.testing.assert_close(grad, want)
    float_tau = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(float_tau(a, b), info_nce(a, b))


def test_opcheck():
    a, b = pairs(5, 4, torch.float32)
    torch.library.opcheck(torch.ops.kdcmae_fast.info_nce, (a, b, torch.tensor(0.1), True, True))
    losses, hits = torch.ops.kdcmae_fast.info_nce(a, b, torch.tensor(0.05), False, True)
    wanted = kernels.info_nce(a, b, reduction="none", return_accuracy=True, impl="torch")
    torch.testing.assert_close((losses, hits), tuple(wanted))


@cpp
@pytest.mark.parametrize("columns", [False, True])
def test_opcheck_cpp(columns):
    a, b = pairs(5, 4, torch.float32, grad=False)
    b = b[1:4].bfloat16()
    operands = (b, a, torch.rand(3), torch.rand(5), torch.tensor(9.0), 1)
    statistics = torch.ops.kdcmae_fast.info_nce_statistics_cpp.default
    torch.library.opcheck(statistics, (*operands, columns))
    by_column = [torch.rand(5 if columns else 0) for _ in range(2)]
    for logits in (torch.rand(3, 5), torch.empty(0, 0)):
        targets = (*(torch.rand(3) for _ in range(3)), *by_column, logits)
        gradients = torch.ops.kdcmae_fast.info_nce_gradients_cpp.default
        torch.library.opcheck(gradients, (*operands, *targets))


@cpp
@pytest.mark.parametrize("batch, width", [(1100, 7), (1025, 130), (513, 257)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_cpp_tiles(batch, width, symmetric):
    """More than one tile of rows and columns, kept and recomputed logits, odd remainders."""
    results = []
    for impl in ("torch", "cpp"):
        torch.manual_seed(3)
        leaves = [*pairs(batch, width), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)]
        result = kernels.info_nce(
            *leaves[:2], temperature=leaves[2], symmetric=symmetric, return_accuracy=True, impl=impl
        )
        results.append((*result, *torch.autograd.grad(result.loss, leaves)))
    for cpp_result, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(cpp_result, wanted, rtol=1e-9, atol=1e-13)


@cpp
def test_cpp_is_the_same_every_time_and_hardly_knows_the_number_of_threads():
    """Our sums are in one order; the BLAS may block a product by the threads it could have."""
    a, b = pairs(1300, 300, torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            loss = kernels.info_nce(a, b, symmetric=True, impl="cpp")
            runs.append((loss, *torch.autograd.grad(loss, (a, b))))
    finally:
        torch.set_num_threads(threads)
    one, two, again = runs
    assert all(torch.equal(x, y) for x, y in zip(two, again, strict=True))
    for x, y in zip(one, two, strict=True):
        assert (x - y).norm() <= 1e-6 * x.norm()


@cpp
def test_cpp_keeps_no_copy_of_the_features(saved_storages):
    a, b = pairs(1100, 64, torch.float32)
    saved = saved_storages(lambda: kernels.info_nce(a, b, symmetric=True, impl="cpp"))
    assert {a.data_ptr(), b.data_ptr()} <= set(saved)
    extra = sum(saved.values()) - 2 * a.numel() * a.element_size()
    assert extra <= 8 * 4 * 1100  # vectors


A = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.zeros(4), A), {}, r"a must be \(B, D\), got shape \(4,\)"),
        ((A, torch.zeros(4, 2)), {}, r"b must be .* = \(4, 3\), got \(4, 2\)"),
        ((A.long(), A), {}, "a must be one of float64, .* got torch.int64"),
        ((A, A.long()), {}, "b must be one of"),
        ((A, A.to("meta")), {}, "b is on meta, a on cpu"),
        ((A, A), {"temperature": "0.1"}, r"temperature must be a number, got .0\.1."),
        ((A, A), {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ((A, A), {"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ((A, A), {"temperature": torch.ones(1)}, r"temperature must be .* got shape \(1,\)"),
        ((A, A), {"temperature": torch.tensor(1)}, "temperature must be one of"),
        ((A, A), {"temperature": torch.ones((), device="meta")}, "temperature is on meta"),
        ((A, A), {"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ((A, A), {"precision": "int8"}, "precision='int8' is not None or one of fp32"),
        ((A, A), {"precision": "tf32"}, "precision='tf32' has no impl='torch' form"),
        ((A.double(), A), {"precision": "bf16"}, "would lower float64 inputs"),
        ((A, A), {"impl": "numpy"}, "impl='numpy' is not one of auto"),
        ((A, A), {"impl": "cuda"}, "impl='cuda' of info_nce is not available here"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.info_nce(*arguments, **options)


@pytest.mark.large
def test_more_than_2_31_logits(info_nce):
    batch = 47_000
    a, b = pairs(batch, 2, torch.float32)
    loss = info_nce(a, b, symmetric=True, reduction="none")
    last = slice(batch - 3, batch)
    unit_a, unit_b = (F.normalize(x.detach().double(), dim=1) for x in (a, b))
    positive = (unit_a[last] * unit_b[last]).sum(1) / 0.05
    over_a = (unit_b[last] @ unit_a.t() / 0.05).logsumexp(1) - positive
    over_b = (unit_a[last] @ unit_b.t() / 0.05).logsumexp(1) - positive
    torch.testing.assert_close(
        loss[last].detach().double(), (over_a + over_b) / 2, rtol=1e-5, atol=1e-5
    )
    (grad,) = torch.autograd.grad(loss[-1], b)
    assert grad[-1].any() and grad.isfinite().all()
