"""Pooled LayerNorm: formulas, gradients, dtypes, strides, compile, errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.kernels import pooled_layer_norm

OP = "pooled_layer_norm"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")

SHAPES = [(1, 1, 1), (3, 5, 17), (65, 2, 96), (2, 49, 768), (1, 3, 1023), (257, 1, 8)]
NORMALIZED = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])


def operands(shape=(3, 5, 17), dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, D) away from 0, weight, bias."""
    width = shape[-1]
    x = 2 + 3 * torch.randn(shape, dtype=torch.float64)
    weight, bias = (torch.randn(width, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (1 + 0.3 * weight).to(dtype), (0.3 * bias).to(dtype)


@NORMALIZED
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_matches_the_formula_token_by_token(normalize, eps):
    x, weight, bias = operands()
    want = []
    for sample in x:
        tokens = []
        for token in sample.tolist():
            mean = sum(token) / len(token)
            variance = sum((value - mean) ** 2 for value in token) / len(token)
            tokens.append([(value - mean) / math.sqrt(variance + eps) for value in token])
        mean = torch.tensor(tokens, dtype=torch.float64).sum(dim=0) / len(tokens)
        pooled = weight * mean + bias
        want.append(pooled / pooled.square().sum().sqrt() if normalize else pooled)
    result = pooled_layer_norm(x, weight, bias, eps=eps, normalize=normalize)
    torch.testing.assert_close(result, torch.stack(want), rtol=1e-12, atol=1e-13)


@NORMALIZED
def test_gradients_equal_those_of_layer_norm_and_mean(normalize, value_and_grads):
    def published(x, weight, bias):
        pooled = F.layer_norm(x, x.shape[2:], weight, bias).mean(dim=1)
        return pooled / pooled.norm(dim=1, keepdim=True) if normalize else pooled

    leaves = operands((4, 6, 40))
    results = value_and_grads(functools.partial(pooled_layer_norm, normalize=normalize), leaves)
    for result, want in zip(results, value_and_grads(published, leaves), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-11, atol=1e-12)


@NORMALIZED
def test_gradcheck(normalize):
    leaves = [x.requires_grad_() for x in operands((2, 3, 5))]
    assert torch.autograd.gradcheck(
        functools.partial(pooled_layer_norm, normalize=normalize), leaves
    )


@NORMALIZED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(normalize, shape, dtype, three_way):
    options = {"normalize": normalize, "eps": 1e-5}
    plain = functools.partial(pooled_layer_norm, impl="torch", **options)
    three_way(functools.partial(pooled_layer_norm, **options), plain, operands(shape, dtype))


def test_large_offsets_keep_their_variance():
    x, weight, bias = operands((2, 7, 64))
    far = (x + 1e4).float()  # E[x^2] - E[x]^2 would leave nothing of the variance
    want = pooled_layer_norm(far.double(), weight, bias, impl="torch")
    result = pooled_layer_norm(far, weight.float(), bias.float())
    torch.testing.assert_close(result.double(), want, rtol=1e-3, atol=1e-3)


def test_constant_tokens_and_a_zero_result():
    x = torch.full((2, 3, 8), 5.0, requires_grad=True)
    weight, bias = torch.ones(8), torch.arange(8.0)
    pooled = pooled_layer_norm(x, weight, bias)
    torch.testing.assert_close(pooled, bias.expand(2, -1))
    assert torch.autograd.grad(pooled.sum(), x)[0].isfinite().all()
    nothing = pooled_layer_norm(x, weight, torch.zeros(8), normalize=True)
    assert not nothing.any()
    assert torch.autograd.grad(nothing.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_mixed_operands_compute_in_float32(dtype):
    x, weight, bias = operands((3, 9, 40), dtype)
    x.requires_grad_()
    wide = x.detach().float().requires_grad_()
    for mixed in ((weight, bias), (weight.float(), bias), (weight, bias.float())):
        want = pooled_layer_norm(wide, weight.float(), bias.float())
        result = pooled_layer_norm(x, *mixed)
        assert result.dtype == torch.float32 and torch.equal(result, want)
        (grad,), (full,) = (
            torch.autograd.grad(y.square().sum(), leaf) for y, leaf in ((result, x), (want, wide))
        )
        assert torch.equal(grad, full.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooled_layer_norm(x, weight, bias), want)
    assert pooled_layer_norm(x, weight.double(), bias).dtype == torch.float64


@pytest.mark.parametrize("needs", ["x", "weight", "bias"])
def test_partial_gradients(needs):
    names = ("x", "weight", "bias")
    leaves = [t.requires_grad_(name == needs) for name, t in zip(names, operands(), strict=True)]
    pooled_layer_norm(*leaves, normalize=True).square().sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [name == needs for name in names]


def test_empty_batches():
    x, weight, bias = operands((0, 4, 6), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    pooled = pooled_layer_norm(*leaves)
    assert pooled.shape == (0, 6)
    grads = torch.autograd.grad(pooled.sum(), leaves)
    assert [grad.shape for grad in grads] == [(0, 4, 6), (6,), (6,)] and not grads[1].any()


def test_any_strides(value_and_grads):
    x, weight, bias = operands((4, 7, 12), torch.float32)
    weight, bias = weight.repeat_interleave(2)[::2], bias.expand(3, -1).t()[:, 1]
    whole = torch.cat([torch.full((4, 1, 12), math.nan), x], dim=1)
    odd = torch.full((4, 7, 14), math.nan)
    odd[:, :, 1:13] = x
    layouts = {
        "without CLS": whole[:, 1:],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "odd offset": odd[:, :, 1:13],
    }
    wants = [pooled_layer_norm(x, weight, bias), *gradients(x, weight, bias)]
    for name, layout in layouts.items():
        assert not layout.is_contiguous()
        results = [pooled_layer_norm(layout, weight, bias), *gradients(layout, weight, bias)]
        for result, want in zip(results, wants, strict=True):
            torch.testing.assert_close(result, want, msg=name)
    one = x[:1].expand(4, -1, -1)
    torch.testing.assert_close(pooled_layer_norm(one, weight, bias)[3], wants[0][0])
    token = x[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(
        pooled_layer_norm(token, weight, bias), pooled_layer_norm(x[:, :1], weight, bias)
    )


def gradients(*operands: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in operands]
    return torch.autograd.grad(pooled_layer_norm(*leaves).square().sum(), leaves)


def test_deterministic_whatever_the_number_of_threads():
    leaves = [t.requires_grad_() for t in operands((9, 70, 48), torch.float32)]
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            pooled = pooled_layer_norm(*leaves, normalize=True)
            runs.append((pooled, *torch.autograd.grad(pooled[:, 0].sum(), leaves[:1])))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_not_a_number_stays_in_its_sample():
    x, weight, bias = operands(dtype=torch.float32)
    x[1, 2, 3] = math.nan
    rows = pooled_layer_norm(x, weight, bias).isnan()
    assert rows.all(dim=1).tolist() == [False, True, False] and not rows[::2].any()


def test_keeps_no_normalised_copy(impl, saved_storages):
    if impl == "torch":
        pytest.skip("autograd keeps what it needs of the plain form")
    x, weight, bias = (t.requires_grad_() for t in operands((6, 50, 64), torch.bfloat16))
    saved = saved_storages(lambda: pooled_layer_norm(x, weight, bias))
    others = {place: size for place, size in saved.items() if place != x.data_ptr()}
    assert x.data_ptr() in saved
    # mean and 1 / deviation per token, the mean of the tokens, the weight in float32
    assert sorted(others.values()) == sorted([2 * 6 * 50 * 4, 6 * 64 * 4, 64 * 4])


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_breaks():
    torch._dynamo.reset()
    op = functools.partial(pooled_layer_norm, normalize=True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 6):
        leaves = [t.requires_grad_() for t in operands((batch, 5, 8), torch.float32)]
        want, result = op(*leaves), compiled(*leaves)
        torch.testing.assert_close(result, want)
        grads, others = (torch.autograd.grad(y[:, 0].sum(), leaves) for y in (want, result))
        for grad, other in zip(grads, others, strict=True):
            torch.testing.assert_close(other, grad)


def test_opcheck(impl):
    ops = torch.ops.kdcmae_fast
    x, weight, bias = operands(dtype=torch.float32)
    if impl == "torch":
        torch.library.opcheck(ops.pooled_layer_norm, (x, weight, bias, 1e-5))
        return
    x = x.bfloat16()
    _, statistics = ops.pooled_tokens_cpp(x, 1e-5)
    torch.library.opcheck(ops.pooled_tokens_cpp.default, (x, 1e-5))
    torch.library.opcheck(ops.pooled_tokens_grad_cpp.default, (torch.randn(3, 17), x, statistics))


X, W = torch.zeros(2, 4, 3), torch.zeros(3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[0], W, W), {}, r"x must be \(B, L, D\), got shape \(4, 3\)"),
        ((X, W[:2], W), {}, r"weight must be .* = \(3,\), got \(2,\)"),
        ((X, W, None), {}, r"bias must be a tensor \(D,\), got NoneType"),
        ((X[:, :0], W, W), {}, r"x has no tokens or no values: shape \(2, 0, 3\)"),
        ((X[..., :0], W[:0], W[:0]), {}, "x has no tokens or no values"),
        ((X.int(), W, W), {}, "x must be one of float64"),
        ((X, W.int(), W), {}, "weight must be one of float64"),
        ((X, W, W.to("meta")), {}, "bias is on meta, x on cpu"),
        ((X, W, W), {"eps": 0.0}, r"eps must be positive and finite, got 0\.0"),
        ((X, W, W), {"eps": "tiny"}, "eps must be a number, got 'tiny'"),
        ((X, W, W), {"impl": "cuda"}, "impl='cuda' of pooled_layer_norm is not available here"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        pooled_layer_norm(*arguments, **options)


@pytest.mark.large
def test_past_int32(impl):
    """2.2e9 values in half precision, forward and backward: 9 GB."""
    if impl == "torch":
        pytest.skip("its temporaries are as large again")
    batch, length, width = 5600, 512, 768
    x = torch.zeros(batch, length, width, dtype=torch.float16)
    assert x.numel() > 2**31
    x[-1] = torch.randn(length, width)
    weight, bias = torch.randn(width), torch.randn(width)
    ops = torch.ops.kdcmae_fast
    pooled, statistics = ops.pooled_tokens_cpp(x, 1e-5)
    want, _ = ops.pooled_tokens_cpp(x[-1:], 1e-5)
    assert torch.equal(pooled[-1:], want)
    grad = torch.zeros(batch, width)
    grad[-1] = weight + bias
    dx = ops.pooled_tokens_grad_cpp(grad, x, statistics)
    alone = ops.pooled_tokens_grad_cpp(grad[-1:], x[-1:], statistics[:, -1:])
    assert dx[-1].any() and torch.equal(dx[-1:], alone)
