"""Residual + LayerNorm: values, gradients, norms by segment, what is kept, compile, errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast import kernels

OP = "add_layer_norm"  # of the fixture impl
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])


@pytest.fixture
def add_layer_norm(impl):
    return functools.partial(kernels.add_layer_norm, impl=impl)


def operands(
    rows: int, width: int, norms: int = 1, dtype=torch.float64, stream=None
) -> tuple[Tensor, ...]:
    """x, residual (rows, width), weight, bias (norms, width); x has `dtype`, the others `stream`.

    The rows have means and deviations of their own.
    """
    x, residual = (torch.randn(rows, width, dtype=torch.float64) for _ in range(2))
    x, residual = x * torch.rand(rows, 1) * 3, residual + torch.randn(rows, 1)
    weight = 1 + 0.3 * torch.randn(norms, width, dtype=torch.float64)
    bias = 0.3 * torch.randn(norms, width, dtype=torch.float64)
    wide = (t.to(stream or dtype).requires_grad_() for t in (residual, weight, bias))
    return x.to(dtype).requires_grad_(), *wide


def both(output) -> Tensor:
    """Normed and sum side by side: one tensor to differentiate."""
    dtype = torch.promote_types(output.normed.dtype, output.summed.dtype)
    return torch.stack([t.to(dtype) for t in output])


def row_loop(x, residual, weight, bias, norms, eps=1e-5):
    """One row and one value at a time, straight from the formula."""
    normed = []
    for row, norm in zip((x + residual).tolist(), norms, strict=True):
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        scale = 1 / math.sqrt(variance + eps)
        parameters = zip(weight[norm].tolist(), bias[norm].tolist(), strict=True)
        normed.append(
            [(v - mean) * scale * w + b for v, (w, b) in zip(row, parameters, strict=True)]
        )
    return torch.tensor(normed, dtype=torch.float64)


def test_matches_the_formula(add_layer_norm):
    args = operands(6, 5, norms=3)
    segments = ((2, 1), (0, 3), (1, 0), (2, 2))
    normed, summed = add_layer_norm(*args, segments=segments)
    want = row_loop(*args, [2, 0, 0, 0, 2, 2])
    torch.testing.assert_close(normed.detach(), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(summed, args[0] + args[1])


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.1])
def test_eps_and_leading_axes(eps, add_layer_norm):
    x, residual, weight, bias = operands(6, 7)
    x, residual = x.view(2, 3, 7), residual.view(2, 3, 7)
    normed, summed = add_layer_norm(x, residual, weight[0], bias[0], eps=eps)
    assert normed.shape == summed.shape == x.shape
    want = F.layer_norm(x + residual, (7,), weight[0], bias[0], eps)
    torch.testing.assert_close(normed, want, rtol=1e-12, atol=1e-12)


def test_without_a_residual_the_sum_is_x(add_layer_norm):
    x, _, weight, bias = operands(4, 6)
    normed, summed = add_layer_norm(x, None, weight, bias)
    assert summed is x
    torch.testing.assert_close(normed, F.layer_norm(x, (6,), weight[0], bias[0]))


@WITH_RESIDUAL
def test_gradcheck(residual, add_layer_norm):
    x, stream, weight, bias = operands(5, 6, norms=2)
    leaves = (x, stream, weight, bias) if residual else (x, weight, bias)

    def run(x, *rest):
        stream = rest[0] if residual else None
        output = add_layer_norm(x, stream, *rest[-2:], segments=((1, 2), (0, 3)))
        return tuple(output)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("stream", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 4), (3, 17), (65, 96), (257, 512), (2, 1023)])
def test_stays_within_pytorch_s_own_error(
    rows, width, dtype, stream, add_layer_norm, within_budget, value_and_grads
):
    leaves = operands(rows, width, 2, dtype, dtype if stream == "same" else torch.float32)
    segments = ((1, rows // 2), (0, rows - rows // 2))

    def op(*leaves):
        return both(add_layer_norm(*leaves, segments=segments))

    def eager(x, residual, weight, bias):
        """As one writes it: sum, then norm, in the dtypes of the operands."""
        summed = x + residual
        parts = zip(summed.split([count for _, count in segments]), segments, strict=True)
        dtype = torch.promote_types(summed.dtype, weight.dtype)
        normed = [
            F.layer_norm(part.to(dtype), (width,), weight[n].to(dtype), bias[n].to(dtype))
            for part, (n, _) in parts
        ]
        return torch.stack([torch.cat(normed).to(x.dtype).to(summed.dtype), summed])

    results, same = value_and_grads(op, leaves), value_and_grads(eager, leaves)
    exact = value_and_grads(eager, tuple(leaf.detach().double() for leaf in leaves))
    for index, triple in enumerate(zip(results, same, exact, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        within_budget(*triple, factor=2.0 if index == 0 else 3.0, slack=2e-6)


def test_large_mean_keeps_its_precision(add_layer_norm):
    """Statistics are taken of centred values: E[x^2] - E[x]^2 would lose all digits here."""
    x = torch.randn(4, 768, dtype=torch.float64) + 300
    weight, bias = torch.ones(768), torch.zeros(768)
    residual = torch.zeros(4, 768)
    normed, summed = add_layer_norm(x.float(), residual, weight, bias)
    want = F.layer_norm(summed.double(), (768,))
    torch.testing.assert_close(normed.double(), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_norm_is_of_the_rounded_sum_in_float32(dtype, add_layer_norm):
    x, residual, weight, bias = operands(9, 33, dtype=dtype)
    normed, summed = add_layer_norm(x, residual, weight, bias, out_dtype=torch.float32)
    assert summed.dtype == dtype and torch.equal(summed, x + residual)
    parameters = weight[0].float(), bias[0].float()
    torch.testing.assert_close(normed, F.layer_norm(summed.float(), (33,), *parameters))
    with torch.autocast("cpu", torch.bfloat16):
        again = add_layer_norm(x, residual, weight, bias, out_dtype=torch.float32)
    assert torch.equal(again.normed, normed) and torch.equal(again.summed, summed)


@pytest.mark.parametrize("x", DTYPES, ids=str)
@pytest.mark.parametrize("stream", [*DTYPES, torch.float64], ids=str)
def test_mixed_dtypes(x, stream, add_layer_norm):
    leaves = operands(5, 9, dtype=x, stream=stream)
    output = add_layer_norm(*leaves)
    assert output.normed.dtype == x
    assert output.summed.dtype == torch.promote_types(x, stream)
    grads = torch.autograd.grad(both(output).float().square().sum(), leaves)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    wanted = torch.autograd.grad(
        both(kernels.add_layer_norm(*leaves, impl="torch")).float().square().sum(), leaves
    )
    tolerance = 0.05 if torch.float32 != x else 1e-5
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(
            grad.float(), want.float(), rtol=tolerance, atol=tolerance * want.abs().max().item()
        )


def test_both_outputs_one_output_and_frozen_parts(add_layer_norm):
    for use in ("normed", "summed"):
        leaves = operands(4, 6)
        loss = getattr(add_layer_norm(*leaves), use).square().sum()
        wanted = kernels.add_layer_norm(*leaves, impl="torch")
        wanted = getattr(wanted, use).square().sum()
        got = torch.autograd.grad(loss, leaves, allow_unused=True)
        want = torch.autograd.grad(wanted, leaves, allow_unused=True)
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    for frozen in range(4):
        leaves = operands(4, 6)
        leaves[frozen].requires_grad_(False)
        both(add_layer_norm(*leaves)).square().sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(4)]


@WITH_RESIDUAL
def test_any_strides(residual, add_layer_norm):
    weight, bias = torch.randn(8, 2, requires_grad=True), torch.randn(16)[1::2].view(1, 8)
    layouts = [
        torch.randn(8, 6).t(),
        torch.randn(6, 24)[:, 1:9],
        torch.randn(6, 24)[:, ::3],
        torch.randn(8).expand(6, 8),
        torch.randn(3, 4, 8)[:, 1:3],
    ]
    for x in layouts:
        x.requires_grad_()
        stream = torch.randn(17, 16)[1 : 1 + x.shape[0] * 2 : 2, 3:11] if residual else None
        if residual:
            stream = stream.reshape(x.shape) if x.dim() == 2 else torch.randn(1, 8).expand(3, 2, 8)
        normed, summed = add_layer_norm(x, stream, weight.t()[:1], bias)
        plain = [None if t is None else t.detach().contiguous() for t in (x, stream, weight.t())]
        again = add_layer_norm(*plain[:2], plain[2][:1], bias.contiguous())
        assert torch.equal(normed, again.normed) and torch.equal(summed, again.summed)
        (grad,) = torch.autograd.grad(normed.square().sum(), x)
        assert grad.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
@WITH_RESIDUAL
def test_empty_batches(residual, shape, add_layer_norm):
    x, stream, weight, bias = operands(0, 7, norms=3)
    x = x.detach().reshape(shape).requires_grad_()
    stream = stream.reshape(shape) if residual else None
    normed, _ = add_layer_norm(x, stream, weight, bias, segments=((1, 0), (2, 0)))
    normed.sum().backward()
    assert normed.shape == x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("rows", [5, 700])
def test_deterministic_and_independent_of_the_number_of_threads(rows, add_layer_norm):
    leaves = operands(rows, 40, norms=3, dtype=torch.float32)
    segments = ((0, rows // 2), (2, 1), (1, rows - rows // 2 - 1))
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            output = add_layer_norm(*leaves, segments=segments)
            runs.append((*output, *torch.autograd.grad(both(output).square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        # PyTorch's own layer_norm backward splits the rows by the number of threads.
        equal = torch.equal if add_layer_norm.keywords["impl"] != "torch" else torch.allclose
        assert all(equal(x, y) for x, y in zip(run, runs[0], strict=True))


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@WITH_RESIDUAL
def test_compiles_without_breaks(residual, add_layer_norm):
    torch._dynamo.reset()

    def run(x, stream, weight, bias):
        half = x.shape[0] // 2
        segments = ((1, half), (0, x.shape[0] - half))
        stream = stream if residual else None
        return add_layer_norm(x, stream, weight, bias, segments=segments)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        leaves = operands(rows, 6, norms=2, dtype=torch.float32)
        leaves = leaves if residual else (leaves[0], leaves[1].detach(), *leaves[2:])
        used = [leaf for leaf in leaves if leaf.requires_grad]
        output, again = run(*leaves), compiled(*leaves)
        torch.testing.assert_close(tuple(again), tuple(output))
        grads = torch.autograd.grad(both(output).square().sum(), used)
        for grad, want in zip(
            torch.autograd.grad(both(again).square().sum(), used), grads, strict=True
        ):
            torch.testing.assert_close(grad, want)


def test_opcheck(impl):
    if impl == "torch":
        pytest.skip("the reference is made of PyTorch's own ops")
    x, stream, weight, bias = (t.detach() for t in operands(5, 6, norms=2, dtype=torch.float32))
    runs, eps = ([1, 0], [2, 3]), 1e-5
    ops = torch.ops.kdcmae_fast
    half = torch.bfloat16
    torch.library.opcheck(ops.layer_norm_cpp.default, (x, weight, bias, *runs, eps, half))
    forward = (x.to(half), stream, weight, bias, *runs, eps, half)
    torch.library.opcheck(ops.add_layer_norm_cpp.default, forward)
    normed, summed, mean, rstd = ops.add_layer_norm_cpp(*forward)
    for onto in (None, stream):
        backward = (normed, onto, summed, mean, rstd, weight, *runs)
        torch.library.opcheck(ops.layer_norm_backward_cpp.default, backward)
        torch.library.opcheck(ops.layer_norm_backward_cast_cpp.default, (*backward, half))


def test_keeps_the_sum_and_two_numbers_per_row(impl, saved_storages):
    if impl == "torch":
        pytest.skip("autograd decides what the reference keeps")
    x, residual, weight, bias = operands(6, 32, dtype=torch.bfloat16, stream=torch.float32)
    output = kernels.add_layer_norm(x, residual, weight, bias, impl=impl)
    saved = saved_storages(
        lambda: kernels.add_layer_norm(x, residual, weight, bias, impl=impl).normed
    )
    assert sorted(saved.values()) == sorted(
        [output.summed.nbytes, weight.nbytes, 6 * 4, 6 * 4]  # mean and rstd in float32
    )


def test_not_a_number_stays_in_its_row(add_layer_norm):
    x, residual, weight, bias = operands(5, 8, dtype=torch.float32)
    with torch.no_grad():
        x[2, 3] = math.nan
        x[3, 1] = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        normed, _ = add_layer_norm(x, residual, weight, bias, out_dtype=dtype)
        assert normed.isnan().any(dim=1).tolist() == [False, False, True, True, False]
        assert normed[2].isnan().all()


W = torch.ones(3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.tensor(1.0), None, W, W), {}, r"x must be \(..., D\) .* got \(\)"),
        ((torch.zeros(4, 0), None, W, W), {}, r"x must be .* got \(4, 0\)"),
        (([1.0], None, W, W), {}, "x must be .* got list"),
        ((torch.zeros(4, 3, dtype=torch.int32), None, W, W), {}, "x must be one of float64"),
        ((torch.zeros(4, 3), torch.zeros(3), W, W), {}, r"residual must be as x = \(4, 3\)"),
        ((torch.zeros(4, 3), None, W[:2], W), {}, r"weight must be .* = \(3,\), got \(2,\)"),
        ((torch.zeros(4, 3), None, W, W[:2]), {}, r"bias must be as weight = \(3,\), got \(2,\)"),
        ((torch.zeros(4, 3), None, W.to("meta"), W), {}, "weight is on meta, x on cpu"),
        ((torch.zeros(4, 3), None, W, W), {"eps": 0.0}, "eps must be positive and finite, got 0"),
        ((torch.zeros(4, 3), None, W, W), {"out_dtype": torch.int8}, "out_dtype=torch.int8"),
        ((torch.zeros(4, 3), None, W, W), {"segments": ((0, 3),)}, "do not cover the 4 rows"),
        ((torch.zeros(4, 3), None, W, W), {"segments": ((0, 5), (0, -1))}, "do not cover"),
        ((torch.zeros(4, 3), None, W, W), {"segments": ((1, 4),)}, r"outside 0..0"),
        ((torch.zeros(4, 3), None, W.expand(2, 3), W.expand(2, 3)), {}, "weight holds 2 norms"),
        ((torch.zeros(4, 3), None, W, W), {"impl": "cuda"}, "impl='cuda' of add_layer_norm"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.add_layer_norm(*arguments, **options)


@pytest.mark.large
def test_past_int32():
    """2.2e9 elements in half precision (9 GB): one row, expanded; the last has a norm of its own,
    and rows that nobody wrote would not hold these values."""
    rows = 2**31 // 768 + 100
    x, residual = (torch.randn(768).half() for _ in range(2))
    weight, bias = torch.randn(2, 768), torch.randn(2, 768)
    normed, summed = kernels.add_layer_norm(
        x.expand(rows, 768), residual.expand(rows, 768), weight, bias,
        segments=((0, rows - 1), (1, 1)), impl="cpp",
    )  # fmt: skip
    assert normed.numel() > 2**31
    for row, norm in ((-2, 0), (-1, 1)):
        want = kernels.add_layer_norm(x, residual, weight[norm], bias[norm], impl="cpp")
        assert torch.equal(normed[row], want.normed) and torch.equal(summed[row], want.summed)
