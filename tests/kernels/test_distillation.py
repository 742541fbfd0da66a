"""Distillation losses: the released values, closed forms, gradients, compile, errors."""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import unavailable

OP = "distillation_loss"  # of the fixture impl
GOLDEN = Path(__file__).parents[1] / "golden" / "cav_mae" / "io.safetensors"
OPTIONS = [
    {"divergence": divergence, "distribution": distribution}
    for divergence, distribution in itertools.product(
        ("kl", "kl_12", "js"), ("softmax", "shift", "batch_shift")
    )
]
SHAPES = [(1, 1), (3, 17), (65, 96), (2, 1023)]
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))


@pytest.fixture
def distillation_loss(impl):
    return functools.partial(kernels.distillation_loss, impl=impl)


def features(batch: int, width: int = 7, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    p = torch.randn(batch, width, dtype=torch.float64)
    q = p + 0.5 * torch.randn(batch, width, dtype=torch.float64)
    return p.to(dtype).requires_grad_(), q.to(dtype).requires_grad_()


def row_loop(p: Tensor, q: Tensor, divergence: str, distribution: str) -> Tensor:
    """One row and one feature at a time, straight from the formulas."""

    def probabilities(z: Tensor, row: int) -> list[float]:
        low = {"softmax": 0.0, "shift": abs(min(z[row].tolist()))}.get(
            distribution, abs(z.min().item())
        )
        values = [math.exp(x) if distribution == "softmax" else x + low for x in z[row].tolist()]
        return [x / sum(values) for x in values]

    def kl(x: list[float], y: list[float]) -> float:
        eps = 0.0 if distribution == "softmax" and divergence != "js" else 1e-12
        return sum(a * math.log((a + eps) / (b + eps)) for a, b in zip(x, y, strict=True))

    losses = []
    for row in range(len(p)):
        x, y = probabilities(p, row), probabilities(q, row)
        if divergence == "js":
            middle = [(a + b) / 2 for a, b in zip(x, y, strict=True)]
            losses.append((kl(x, middle) + kl(y, middle)) / 2)
        else:
            losses.append(kl(x, y) if divergence == "kl_12" else (kl(x, y) + kl(y, x)) / 2)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("run", ["released", "corrected"])
def test_matches_the_released_js_of_batch_shifted_features(run, distillation_loss):
    with safe_open(GOLDEN, framework="pt") as golden:
        z = [golden.get_tensor(f"kdc.{run}.latent_joint{v}").double().mean(1) for v in (1, 2)]
        want = golden.get_tensor(f"kdc.{run}.js_batch_shift_per_sample_times_10") / 10
    loss = distillation_loss(*z, divergence="js", distribution="batch_shift", reduction="none")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # latents are stored in float32


@EVERY
@pytest.mark.parametrize("batch", [1, 3, 10])
def test_matches_the_formulas(options, batch, distillation_loss):
    p, q = features(batch)
    want = row_loop(p, q, **options)
    rows = distillation_loss(p, q, reduction="none", **options)
    torch.testing.assert_close(rows.detach(), want, rtol=1e-10, atol=1e-12)
    assert distillation_loss(p, q, **options).item() == pytest.approx(want.mean().item())


@EVERY
def test_gradcheck(options, distillation_loss):
    p, q = features(4, 5)
    assert torch.autograd.gradcheck(
        lambda p, q: distillation_loss(p, q, reduction="none", **options), (p, q), atol=1e-4
    )


def test_two_classes_in_closed_form(distillation_loss):
    # softmax([log 3, 0]) = (3/4, 1/4), softmax([0, 0]) = (1/2, 1/2)
    p = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    q = torch.zeros(1, 2, dtype=torch.float64)
    kl_pq = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    kl_qp = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert distillation_loss(p, q, divergence="kl_12").item() == pytest.approx(kl_pq)
    assert distillation_loss(q, p, divergence="kl_12").item() == pytest.approx(kl_qp)
    assert distillation_loss(p, q).item() == pytest.approx((kl_pq + kl_qp) / 2)
    assert distillation_loss(2 * p, q, temperature=2.0).item() == pytest.approx(
        distillation_loss(p, q).item()
    )
    # All mass on different features: log 2, the largest Jensen-Shannon divergence.
    far = [torch.tensor([row], dtype=torch.float64) for row in ([1.0, 0.0], [0.0, 1.0])]
    js = distillation_loss(*far, divergence="js", distribution="shift")
    assert js.item() == pytest.approx(math.log(2), rel=1e-10)


@EVERY
def test_equal_views_give_zero_and_symmetric_ones_commute(options, distillation_loss):
    p, q = features(6)
    assert distillation_loss(p, p.detach(), **options).item() == pytest.approx(0, abs=1e-15)
    there, back = distillation_loss(p, q, **options), distillation_loss(q, p, **options)
    assert (there.item() == pytest.approx(back.item())) == (options["divergence"] != "kl_12")
    assert there > 0


def test_batch_shift_couples_the_batch_and_shift_does_not(distillation_loss):
    p, q = (x.detach() for x in features(6))
    p[4, 0] = -10.0
    for distribution, coupled in (("batch_shift", True), ("shift", False), ("softmax", False)):
        options = {"divergence": "js", "distribution": distribution, "reduction": "none"}
        whole, part = distillation_loss(p, q, **options), distillation_loss(p[:1], q[:1], **options)
        assert torch.allclose(whole[:1], part) != coupled


def test_small_softmax_kl_keeps_its_relative_precision(distillation_loss):
    p = torch.randn(4, 768)
    q = p + 1e-3 * torch.randn(4, 768)
    exact = distillation_loss(p.double(), q.double(), reduction="none")
    loss = distillation_loss(p, q, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=0)
    assert (loss > 0).all()


def test_stop_gradient_is_for_the_teacher_only(distillation_loss):
    p, q = features(3)
    loss = distillation_loss(p, q, divergence="kl_12", stop_gradient=True)
    loss.backward()
    assert p.grad is None and q.grad.abs().sum() > 0
    assert loss.item() == distillation_loss(p, q, divergence="kl_12").item()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_compute_in_float32(options, dtype, distillation_loss):
    p, q = features(5, 33, dtype)
    loss = distillation_loss(p, q, **options)
    assert loss.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in (p, q)]
    want = distillation_loss(*wide, **options)
    assert torch.equal(loss, want)
    for grad, full in zip(
        torch.autograd.grad(loss, (p, q)), torch.autograd.grad(want, wide), strict=True
    ):
        assert torch.equal(grad, full.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distillation_loss(p, q, **options), want)
    mixed = distillation_loss(p, wide[1], **options)
    assert mixed.dtype == torch.float32


@EVERY
def test_empty_batches_and_rows_without_mass(options, distillation_loss):
    for reduction, shape in (("mean", ()), ("none", (0,))):
        p, q = features(0)
        loss = distillation_loss(p, q, reduction=reduction, **options)
        assert loss.shape == shape and not loss.any()
        loss.sum().backward()
        assert p.grad.shape == (0, 7)
    flat = torch.full((2, 3), -1.0, requires_grad=True)
    loss = distillation_loss(flat, flat.detach() - 1, **options)
    loss.backward()
    assert loss.isfinite() and flat.grad.isfinite().all()


def test_any_strides_and_partial_gradients(distillation_loss):
    p, q = torch.randn(9, 6).t(), torch.randn(6, 18)[:, ::2].requires_grad_()
    loss = distillation_loss(p, q, divergence="js")
    again = distillation_loss(p.contiguous(), q.detach().contiguous(), divergence="js")
    torch.testing.assert_close(loss.detach(), again)
    loss.backward()
    assert q.grad.shape == q.shape and not p.requires_grad


@EVERY
def test_deterministic(options, distillation_loss):
    p, q = features(4, dtype=torch.float32)
    runs = [torch.autograd.grad(distillation_loss(p, q, **options), (p, q)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS[::4], ids=lambda o: "-".join(o.values()))
def test_compiles_without_breaks(options, distillation_loss):
    torch._dynamo.reset()
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 6):
        p, q = features(batch, dtype=torch.float32)
        loss = distillation_loss(p, q, **options)
        again = compiled(p, q, **options)
        torch.testing.assert_close(again, loss)
        grads = torch.autograd.grad(loss, (p, q))
        for grad, want in zip(torch.autograd.grad(again, (p, q)), grads, strict=True):
            torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("divergence, distribution", [("kl", "softmax"), ("js", "batch_shift")])
def test_opcheck(divergence, distribution, impl):
    p, q = features(3, 4, torch.float32)
    options = (divergence, distribution, 1.0)
    if impl == "torch":
        torch.library.opcheck(torch.ops.kdcmae_fast.distillation_loss, (p, q, *options))
        return
    ops = torch.ops.kdcmae_fast
    p, q = p.detach(), q.detach().bfloat16()
    torch.library.opcheck(getattr(ops, f"distillation_rows_{impl}").default, (p, q, *options))
    backward = getattr(ops, f"distillation_rows_grad_{impl}").default
    torch.library.opcheck(backward, (torch.randn(3), p, q, *options))


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(options, shape, dtype, distillation_loss, three_way):
    p, q = (x.detach() for x in features(*shape, dtype))

    def plain(p, q):
        return kernels.distillation_loss(p, q, reduction="none", impl="torch", **options)

    three_way(functools.partial(distillation_loss, reduction="none", **options), plain, (p, q))


@EVERY
def test_results_do_not_depend_on_the_number_of_threads(options, distillation_loss):
    p, q = features(700, 16, torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss = distillation_loss(p, q, reduction="none", **options)
            runs.append((loss, *torch.autograd.grad(loss.sum(), (p, q))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 80.0, 1e4])
def test_cpp_exponentials_and_logarithms_reach_over_the_range(scale):
    if unavailable("distillation_loss", "cpp", "cpu"):
        pytest.skip(unavailable("distillation_loss", "cpp", "cpu"))
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-13)):
        p, q = (scale * torch.randn(5, 40, dtype=dtype) for _ in range(2))
        for options in OPTIONS:
            want = kernels.distillation_loss(p.double(), q.double(), impl="torch", **options)
            loss = kernels.distillation_loss(p, q, impl="cpp", **options)
            torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


@EVERY
def test_not_a_number_shows(options, distillation_loss):
    p, q = (x.detach() for x in features(3))
    p[1, 2] = math.nan
    assert distillation_loss(p, q, reduction="none", **options)[1].isnan()
    assert distillation_loss(q, p, reduction="none", **options)[1].isnan()


def test_cpp_keeps_only_the_inputs_for_backward(saved_storages):
    if unavailable("distillation_loss", "cpp", "cpu"):
        pytest.skip(unavailable("distillation_loss", "cpp", "cpu"))
    p, q = features(6, dtype=torch.bfloat16)
    saved = saved_storages(lambda: kernels.distillation_loss(p, q, impl="cpp"))
    assert set(saved) == {p.data_ptr(), q.data_ptr()}


P = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.zeros(4), P), {}, r"p must be \(B, D\), got shape \(4,\)"),
        ((P, torch.zeros(4, 2)), {}, r"q must be .* = \(4, 3\), got \(4, 2\)"),
        ((P.int(), P), {}, "p must be one of float64"),
        ((P, P.int()), {}, "q must be one of float64"),
        ((P, P.to("meta")), {}, "q is on meta, p on cpu"),
        ((P[:, :0], P[:, :0]), {}, r"p has no features: shape \(4, 0\)"),
        ((P, P), {"divergence": "mse"}, "divergence='mse' is not one of kl, kl_12, js"),
        ((P, P), {"distribution": "l1"}, "distribution='l1' is not one of softmax"),
        ((P, P), {"temperature": "1"}, "temperature must be a number, got '1'"),
        ((P, P), {"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        (
            (P, P),
            {"temperature": 2.0, "distribution": "shift"},
            "temperature=2.0 has no meaning for distribution='shift'",
        ),
        ((P, P), {"stop_gradient": True}, "stop_gradient needs a teacher: .* got 'kl'"),
        ((P, P), {"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ((P, P), {"impl": "cuda"}, "impl='cuda' of distillation_loss is not available here"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.distillation_loss(*arguments, **options)
