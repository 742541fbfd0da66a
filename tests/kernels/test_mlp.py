"""The MLP op: bit-equal to nn.Linear, GELU, nn.Linear; gradients, autocast, what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcmae_fast.kernels import mlp
from kdcmae_fast.kernels.mlp.reference import mlp as plain

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def operands(*shape: int, hidden=10, out=6, dtype=torch.float64) -> list[Tensor]:
    width = shape[-1]
    shapes = [shape, (hidden, width), (hidden,), (out, hidden), (out,)]
    scales = [1.0, width**-0.5, 0.3, hidden**-0.5, 0.3]
    return [
        (torch.randn(s, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for s, scale in zip(shapes, scales, strict=True)
    ]


SHAPES = [(6,), (1, 768), (3, 5, 96), (65, 17), (257, 512), (2, 1023), (2, 3, 4, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_are_those_of_the_modules(shape, dtype, value_and_grads, three_way):
    leaves = operands(*shape, dtype=dtype)
    assert torch.equal(value_and_grads(mlp, leaves)[0], value_and_grads(plain, leaves)[0])
    three_way(mlp, plain, leaves)


def test_gradcheck():
    assert torch.autograd.gradcheck(mlp, operands(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    first, second = nn.Linear(12, 20), nn.Linear(20, 12)
    x = torch.randn(4, 12, requires_grad=True)
    parameters = [*first.parameters(), *second.parameters()]
    with torch.autocast("cpu", dtype):
        y, want = mlp(x, *parameters), second(F.gelu(first(x)))
    assert y.dtype == dtype and torch.equal(y, want)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *parameters])
    wanted = torch.autograd.grad(want.float().square().sum(), [x, *parameters])
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=1e-2, atol=1e-2)


def test_keeps_the_input_and_the_pre_activation(saved_storages):
    leaves = operands(7, 8, hidden=32, out=8, dtype=torch.float32)
    x, weight1, _, weight2, _ = leaves
    saved = saved_storages(lambda: mlp(*leaves))
    assert sum(saved.values()) == x.nbytes + 7 * 32 * 4 + weight1.nbytes + weight2.nbytes
    modules = saved_storages(lambda: plain(*leaves))
    assert sum(modules.values()) == sum(saved.values()) + 7 * 32 * 4


def test_frozen_operands_and_absent_biases():
    for frozen in range(5):
        leaves = operands(4, 6)
        leaves[frozen].requires_grad_(False)
        mlp(*leaves).sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(5)]
    x, weight1, _, weight2, _ = operands(4, 6)
    y = mlp(x, weight1, None, weight2, None)
    assert torch.equal(y, plain(x, weight1, None, weight2, None))
    y.sum().backward()
    assert weight1.grad.any() and weight2.grad.any()


def test_any_strides_and_empty_batches():
    _, *parameters = operands(1, 6)
    for x in (torch.randn(6, 5).t(), torch.randn(4, 15)[:, 1:13:2], torch.randn(6).expand(3, 6)):
        x = x.double().requires_grad_()
        cotangent = torch.randn(6, dtype=torch.float64).expand(x.shape[0], 6)
        grads = torch.autograd.grad(mlp(x, *parameters), [x, *parameters], cotangent)
        wanted = torch.autograd.grad(plain(x, *parameters), [x, *parameters], cotangent)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    y = mlp(x, *parameters)
    y.sum().backward()
    assert y.shape == (0, 6) and x.grad.shape == (0, 6) and not parameters[0].grad.any()


def test_deterministic():
    leaves = operands(65, 96, hidden=128, dtype=torch.float32)
    runs = [torch.autograd.grad(mlp(*leaves).square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_breaks(autocast):
    torch._dynamo.reset()

    def run(*leaves):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return mlp(*leaves).float()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        leaves = operands(rows, 6, dtype=torch.float32)
        y, want = compiled(*leaves), run(*leaves)
        torch.testing.assert_close(y, want)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        wanted = torch.autograd.grad(want.square().sum(), leaves)
        for grad, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, other)


X, W1, W2 = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(2, 5)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.tensor(1.0), W1, None, W2, None), {}, r"x must be \(..., D\), got \(\)"),
        ((X, W1[0], None, W2, None), {}, r"weight1 must be \(H, D\), got shape \(3,\)"),
        ((X, W1[:, :2], None, W2, None), {}, r"weight1 must be .* = \(5, 3\), got \(5, 2\)"),
        ((X, W1, None, W2[:, 1:], None), {}, r"weight2 must be .* = \(2, 5\), got \(2, 4\)"),
        ((X, W1, torch.zeros(4), W2, None), {}, r"bias1 must be .* = \(5,\), got \(4,\)"),
        ((X, W1, None, W2, torch.zeros(3)), {}, r"bias2 must be .* = \(2,\), got \(3,\)"),
        ((X.int(), W1, None, W2, None), {}, "x must be one of float64"),
        ((X, W1.double(), None, W2, None), {}, "the operands must share a dtype"),
        ((X, W1.to("meta"), None, W2, None), {}, "weight1 is on meta, x on cpu"),
        ((X, W1, None, W2, None), {"impl": "cpp"}, "mlp has no cpp implementation"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        mlp(*arguments, **options)
