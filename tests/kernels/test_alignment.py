"""MMD: the formulas pair by pair, closed forms, gradients, close pairs, compile, errors."""

import functools
import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import mmd_loss
from kdcmae_fast.kernels.alignment import reference
from kdcmae_fast.kernels.common import unavailable

OP = "mmd_loss"
DECADES = tuple(10.0**k for k in range(-3, 4))
EVERY = pytest.mark.parametrize("variant", reference.VARIANTS)
# Dynamo itself instantiates the autograd.Function it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def features(n: int, m: int, width: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Distances around 1, where all decades have something to say."""
    x = torch.randn(n, width, dtype=torch.float64) / width**0.5
    y = 0.7 * torch.randn(m, width, dtype=torch.float64) / width**0.5 + 0.2 / width**0.5
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def published(x: Tensor, y: Tensor, variant: str) -> Tensor:
    """The published op sequences: three matrices of distances, a matrix per kernel."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        squares = (a * a).sum(1, keepdim=True) + (b * b).sum(1) - 2 * a @ b.t()
        return squares.clamp_min(1e-30)

    if variant == "kdc_tiled":
        kernel = lambda a, b: torch.exp(-(a[:, None] - b).square().mean(2) / a.shape[1])  # noqa: E731
        return kernel(x, x).mean() + kernel(y, y).mean() + 2 * kernel(x, y).mean()
    if variant == "kdc_rbf":
        z = torch.cat([x, y])
        squares = torch.cdist(z, z) ** 2
        bandwidth = squares.data.sum() / (len(z) ** 2 - len(z))
        k = sum(torch.exp(-squares / (bandwidth * 2.0**e)) for e in range(-2, 3))
        n = len(x)
        return k[:n, :n].mean() - 2 * k[:n, n:].mean() + k[n:, n:].mean()
    kernel = lambda a, b: sum(torch.exp(-g * distances(a, b)) for g in DECADES)  # noqa: E731
    if variant == "xkd":
        return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()

    def others(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return others(x) + others(y) - 2 * kernel(x, y).mean()


def pair_by_pair(x: Tensor, y: Tensor, variant: str) -> float:
    """Straight from the definition, in Python floats."""
    z = [*x.tolist(), *y.tolist()]
    squared = lambda a, b: math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))  # noqa: E731
    gammas = list(DECADES)
    if variant == "kdc_rbf":
        pairs = [squared(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        gammas = [1 / (s * math.fsum(pairs) / len(pairs)) for s in (0.25, 0.5, 1, 2, 4)]
    elif variant == "kdc_tiled":
        gammas = [1 / x.shape[1] ** 2]

    def mean(a: list, b: list, skip_own: bool = False) -> float:
        values = [
            sum(math.exp(-g * squared(p, q)) for g in gammas)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (skip_own and i == j)
        ]
        return math.fsum(values) / len(values)

    a, b = x.tolist(), y.tolist()
    own = variant == "unbiased"
    sign = 2 if variant == "kdc_tiled" else -2
    return mean(a, a, own) + mean(b, b, own) + sign * mean(a, b)


@EVERY
@pytest.mark.parametrize("shape", [(2, 3, 4), (7, 5, 1), (4, 9, 33)], ids=str)
def test_matches_the_definition(variant, shape, impl):
    x, y = (t.detach() for t in features(*shape))
    want = pair_by_pair(x, y, variant)
    assert mmd_loss(x, y, variant=variant).item() == pytest.approx(want, rel=1e-11, abs=1e-13)


@EVERY
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 6, 1)], ids=str)
def test_gradcheck(variant, shape, impl):
    # The bandwidth is detached: finite differences would see it move.
    widths = {"bandwidths": (0.5, 2.0)} if variant in ("xkd", "unbiased") else {}
    x, y = features(*shape)
    if variant == "kdc_rbf":
        grads = torch.autograd.grad(mmd_loss(x, y, variant=variant), (x, y))
        wants = torch.autograd.grad(published(x, y, variant), (x, y))
        for grad, want in zip(grads, wants, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)
        return
    loss = functools.partial(mmd_loss, variant=variant, **widths)
    assert torch.autograd.gradcheck(loss, (x, y))


@EVERY
@pytest.mark.parametrize(
    "shape", [(1, 3, 96), (3, 1, 512), (65, 65, 768), (257, 300, 96), (64, 64, 1023)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_within_pytorch_s_own_error(
    variant, shape, dtype, impl, value_and_grads, within_budget
):
    if variant == "unbiased":
        shape = (max(2, shape[0]), max(2, shape[1]), shape[2])
    leaves = tuple(x.detach() for x in features(*shape, dtype))
    results = value_and_grads(functools.partial(mmd_loss, variant=variant), leaves)
    plain = functools.partial(published, variant=variant)
    eager = value_and_grads(plain, leaves)
    exact = value_and_grads(plain, tuple(leaf.double() for leaf in leaves))
    for index, triple in enumerate(zip(results, eager, exact, strict=True)):
        assert triple[0].dtype == dtype and triple[0].shape == triple[2].shape
        slack = 1e-9 if dtype == torch.float64 else 1e-6 if index == 0 else 1e-7
        within_budget(*triple, factor=2.0 if index == 0 else 3.0, slack=slack)
        if index > 0 and dtype == torch.float32:
            error = (triple[0] - triple[2]).norm() / triple[2].norm().clamp_min(1e-12)
            assert error < 2e-5


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_compute_in_float32(variant, dtype, impl):
    x, y = features(40, 33, 96, dtype)
    loss = mmd_loss(x, y, variant=variant)
    wide = [t.detach().float().requires_grad_() for t in (x, y)]
    want = mmd_loss(*wide, variant=variant)
    assert loss.dtype == torch.float32 and torch.equal(loss, want)
    grads = torch.autograd.grad(loss, (x, y))
    for grad, full in zip(grads, torch.autograd.grad(want, wide), strict=True):
        assert torch.equal(grad, full.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd_loss(x, y, variant=variant), want)
    mixed = mmd_loss(x, wide[1], variant=variant)
    assert torch.equal(mixed, want)
    assert [g.dtype for g in torch.autograd.grad(mixed, (x, wide[1]))] == [dtype, torch.float32]


@pytest.mark.parametrize("variant", ["xkd", "kdc_rbf"])
def test_equal_sets_have_no_discrepancy(variant, impl):
    # Rows as XKD's: squared norm 8192. A difference of products would be off by a few units.
    x = torch.nn.functional.layer_norm(torch.randn(64, 8192), (8192,)).requires_grad_()
    loss = mmd_loss(x, x.detach(), variant=variant)
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert x.grad.norm() < 1e-3


def test_unrelated_rows_leave_the_constant_of_the_diagonals(impl):
    x, y = (torch.nn.functional.layer_norm(torch.randn(64, 8192), (8192,)) for _ in range(2))
    assert 0.21 <= mmd_loss(x, y).item() <= 0.22  # 7 / 64 + 7 / 64, less what is left of k(x, y)


def test_two_points_in_closed_form(impl):
    x, y = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    want = 2 * sum(1 - math.exp(-3 * g) for g in (0.1, 0.7))
    assert mmd_loss(x, y, bandwidths=(0.1, 0.7)).item() == pytest.approx(want, rel=1e-14)
    tiled = mmd_loss(x, y, variant="kdc_tiled").item()
    assert tiled == pytest.approx(2 + 2 * math.exp(-3 / 9), rel=1e-14)


@EVERY
def test_close_pairs_far_from_the_origin(variant, impl):
    """Differences of products lose everything here; the truth is float64's."""
    base = 100 + torch.randn(8, 64)
    x = (base + 1e-3 * torch.randn(8, 64)).requires_grad_()
    y = (base + 1e-3 * torch.randn(8, 64)).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    loss, want = mmd_loss(x, y, variant=variant), mmd_loss(*exact, variant=variant, impl="torch")
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    for grad, full in zip(
        torch.autograd.grad(loss, (x, y)), torch.autograd.grad(want, exact), strict=True
    ):
        assert (grad - full).norm() <= 1e-2 * full.norm()


@pytest.mark.parametrize(
    "bandwidths",
    [(1.0,), (1e-3, 1e3), (2.0, 2.0, 4.0), (3.0, 1.0, 2.0), (0.1, 0.3, 0.5), (1.0, 17.0), DECADES]
    + [tuple(1.0 * power**k for k in range(3)) for power in (3, 7, 10, 13, 15, 16)],
    ids=str,
)
def test_families_of_bandwidths(bandwidths, impl):
    x, y = features(20, 17, 5)
    x32, y32 = (t.detach().float().requires_grad_() for t in (x, y))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        d2 = (a[:, None] - b).square().sum(2)
        return sum(torch.exp(-g * d2) for g in bandwidths).mean()

    wide = [t.detach().double().requires_grad_() for t in (x32, y32)]
    want = kernel(wide[0], wide[0]) + kernel(wide[1], wide[1]) - 2 * kernel(*wide)
    loss = mmd_loss(x32, y32, bandwidths=bandwidths)
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=2e-6)
    for grad, full in zip(
        torch.autograd.grad(loss, (x32, y32)), torch.autograd.grad(want, wide), strict=True
    ):
        assert (grad - full).norm() <= 5e-6 * full.norm()


def test_chains_take_small_integer_ratios_only():
    assert reference.chain(list(DECADES)) == [0, 10, 10, 10, 10, 10, 10]
    assert reference.chain([0.25, 0.5, 1.0, 2.0, 4.0]) == [0, 2, 2, 2, 2]
    assert reference.chain([1.0, 1.0, 16.0, 272.0, 300.0]) == [0, 1, 16, 0, 0]


@EVERY
def test_invariances(variant, impl):
    x, y = (t.detach() for t in features(30, 21, 8))
    want = mmd_loss(x, y, variant=variant)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    for a, b in ((x.flip(0), y.roll(3, 0)), (x @ rotation, y @ rotation), (x + 5, y + 5), (y, x)):
        torch.testing.assert_close(mmd_loss(a, b, variant=variant), want, rtol=1e-9, atol=1e-11)


@EVERY
def test_rows_that_are_all_equal(variant, impl):
    x, y = torch.ones(3, 4, requires_grad=True), torch.ones(2, 4)
    loss = mmd_loss(x, y, variant=variant)
    assert loss.item() == (4.0 if variant == "kdc_tiled" else 0.0)
    loss.backward()
    assert not x.grad.any()


@EVERY
def test_rows_that_repeat_do_not_move_each_other(variant, impl):
    x, y = features(9, 1, 8, torch.float32)
    y = y.detach().expand(20, -1).clone().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    grads = torch.autograd.grad(mmd_loss(x, y, variant=variant), (x, y))
    wants = torch.autograd.grad(mmd_loss(*wide, variant=variant, impl="torch"), wide)
    for grad, want in zip(grads, wants, strict=True):
        assert (grad - want).norm() <= 2e-6 * want.norm()


@EVERY
def test_empty_sets_give_zero(variant, impl):
    for n, m in ((0, 3), (3, 0), (0, 0)):
        x, y = features(n, m, 4, torch.float32)
        loss = mmd_loss(x, y, variant=variant)
        assert loss.shape == () and loss.item() == 0
        loss.backward()
        assert not x.grad.any() and not y.grad.any() and y.grad.shape == (m, 4)


@EVERY
def test_partial_gradients_are_those_of_both(variant, impl):
    x, y = features(300, 70, 12, torch.float32)
    loss = mmd_loss(x, y, variant=variant)
    both = torch.autograd.grad(loss, (x, y))
    for one, leaf, want in ((x, "x", both[0]), (y, "y", both[1])):
        a, b = (x, y.detach()) if leaf == "x" else (x.detach(), y)
        part = mmd_loss(a, b, variant=variant)
        torch.testing.assert_close(part, loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(part, one)[0], want, rtol=1e-4, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(mmd_loss(x, y, variant=variant), loss, rtol=1e-5, atol=1e-7)


def test_upstream_gradients_scale(impl):
    x, y = features(5, 6, 7)
    (once,) = torch.autograd.grad(mmd_loss(x, y), x)
    (scaled,) = torch.autograd.grad(-3 * mmd_loss(x, y), x)
    torch.testing.assert_close(scaled, -3 * once)


@EVERY
def test_any_strides(variant, impl):
    x, y = (t.detach() for t in features(9, 6, 10))
    want = mmd_loss(x, y, variant=variant)
    padded = torch.randn(9 * 20 + 1, dtype=torch.float64)
    odd = padded[1:].view(9, 20)[:, ::2]
    odd.copy_(x)
    assert torch.equal(mmd_loss(odd, y.t().contiguous().t(), variant=variant), want)
    same = y[:1].expand(6, -1)
    expanded = mmd_loss(x, same, variant=variant)
    assert torch.equal(expanded, mmd_loss(x, same.contiguous(), variant=variant))


@EVERY
def test_repeats_to_the_bit_whatever_the_threads(variant, impl):
    x, y = features(520, 300, 40, torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2) if impl == "cpp" else (1, 1):
            torch.set_num_threads(count)
            loss = mmd_loss(x, y, variant=variant)
            runs.append((loss, *torch.autograd.grad(loss, (x, y))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@EVERY
def test_not_a_number_shows(variant, impl):
    x, y = (t.detach() for t in features(4, 5, 6))
    x[1, 2] = math.nan
    assert mmd_loss(x, y, variant=variant).isnan()
    assert mmd_loss(y, x, variant=variant).isnan()


@EVERY
def test_compiles_without_breaks(variant, impl):
    torch._dynamo.reset()
    loss = functools.partial(mmd_loss, variant=variant)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, m in ((4, 6), (5, 9)):
        x, y = features(n, m, 8, torch.float32)
        want, again = loss(x, y), compiled(x, y)
        torch.testing.assert_close(again, want)
        pairs = (torch.autograd.grad(value, (x, y)) for value in (again, want))
        for grad, full in zip(*pairs, strict=True):
            torch.testing.assert_close(grad, full)


@EVERY
def test_opcheck(variant, impl):
    x, y = features(3, 4, 5, torch.float32)
    gammas, powers = reference.family(None, variant)
    ops = torch.ops.kdcmae_fast
    if impl == "torch":
        torch.library.opcheck(ops.mmd_loss, (x, y, variant, gammas))
        return
    arguments = (x.detach().bfloat16(), y.detach(), variant, gammas, powers)
    torch.library.opcheck(ops.mmd_cpp.default, arguments)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.mmd_grads_cpp.default, (*arguments, *needed))


def test_cpp_keeps_the_gradients_and_nothing_else(saved_storages):
    if unavailable(OP, "cpp", "cpu"):
        pytest.skip(unavailable(OP, "cpp", "cpu"))
    x, y = features(300, 200, 16, torch.float32)
    saved = saved_storages(lambda: mmd_loss(x, y, impl="cpp"))
    assert sum(saved.values()) == 500 * 16 * 4
    saved = saved_storages(lambda: mmd_loss(x, y.detach(), impl="cpp"))
    assert sum(saved.values()) == 300 * 16 * 4


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.zeros(4), X), {}, r"x must be \(N, D\), got shape \(4,\)"),
        ((X, torch.zeros(4)), {}, r"y must be \(M, D\), got shape \(4,\)"),
        ((X, torch.zeros(4, 2)), {}, r"y must have the D = 3 features of x, got \(4, 2\)"),
        ((X.int(), X), {}, "x must be one of float64"),
        ((X, X.int()), {}, "y must be one of float64"),
        ((X, X.to("meta")), {}, "y is on meta, x on cpu"),
        ((X[:, :0], X[:, :0]), {}, r"x has no features: shape \(4, 0\)"),
        ((X, X), {"variant": "rbf"}, "variant='rbf' is not one of xkd, unbiased"),
        ((X[:1], X), {"variant": "unbiased"}, "needs at least 2 rows in x and in y, got 1 and 4"),
        ((X, X), {"bandwidths": ()}, "bandwidths must be 1 to 32 numbers, got 0"),
        ((X, X), {"bandwidths": (1.0, -2.0)}, r"positive and finite, got \(1.0, -2.0\)"),
        ((X, X), {"bandwidths": (1.0,), "variant": "kdc_tiled"}, "mean nothing to variant='kdc_"),
        ((X, X), {"reduction": "none"}, "reduction must be 'mean', got 'none'"),
        ((X, X), {"impl": "cuda"}, "impl='cuda' of mmd_loss is not available here"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        mmd_loss(*arguments, **options)


def test_compiles_with_bandwidths_of_one_s_own(impl):
    torch._dynamo.reset()
    loss = functools.partial(mmd_loss, bandwidths=(0.5, 2.0, 3.0))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (4, 5, 7):
        x, y = features(n, 6, 8, torch.float32)
        torch.testing.assert_close(compiled(x, y), loss(x, y))
