"""kernels/normalization in Triton, beside the reference."""

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import add_layer_norm

pytestmark = [
    pytest.mark.triton,
    # The interpreter's loops with a bound known at run time.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

# A chunk; several rows of three chunks; the shape that the models have; a masked last chunk.
SHAPES = [(3, 4), (19, 96), (5, 768), (2, 1023)]
FIVE = ((1, 2), (0, 1), (2, 0), (1, 1), (0, 3), (2, 2))  # runs with rows: more than one launch


def operands(
    rows: int, width: int, norms: int = 3, dtype=torch.float64, stream=None
) -> tuple[Tensor, ...]:
    """x in `dtype`, residual, weight and bias in `stream`."""
    x, residual = (torch.randn(rows, width, dtype=torch.float64) for _ in range(2))
    weight, bias = 1 + 0.3 * torch.randn(norms, width), 0.3 * torch.randn(norms, width)
    return x.to(dtype), *(t.to(stream or dtype) for t in (residual, weight, bias))


def run(leaves, device, use=("normed", "summed"), residual=True, **options) -> list[Tensor]:
    """Outputs and the gradients of all operands, on the CPU."""
    x, stream, weight, bias = (t.detach().to(device).requires_grad_() for t in leaves)
    output = add_layer_norm(x, stream if residual else None, weight, bias, **options)
    cotangent = torch.randn(output.normed.shape, generator=torch.Generator().manual_seed(1))
    loss = sum(
        (t * (cotangent.to(device, t.dtype) + index)).sum()
        for index, t in enumerate((output.normed, output.summed))
        if output._fields[index] in use
    )
    inputs = [x, stream, weight, bias] if residual else [x, weight, bias]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [t.detach().cpu() for t in (*output, *grads) if t is not None]


def thirds(rows: int) -> tuple[tuple[int, int], ...]:
    return ((2, rows // 3), (0, rows // 3), (1, rows - 2 * (rows // 3)))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_reference(shape, residual, triton_device):
    leaves, options = operands(*shape), {"segments": thirds(shape[0]), "residual": residual}
    results = run(leaves, triton_device, impl="triton", **options)
    for result, want in zip(results, run(leaves, "cpu", impl="torch", **options), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("segments", [FIVE, ((0, 9),), ((2, 9), (0, 0))], ids=str)
@pytest.mark.parametrize("use", [("normed",), ("summed",), ("normed", "summed")], ids=str)
def test_any_runs_and_any_use(segments, use, triton_device):
    leaves = operands(9, 40)
    results = run(leaves, triton_device, use, impl="triton", segments=segments)
    wanted = run(leaves, "cpu", use, impl="torch", segments=segments)
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("stream", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stays_within_pytorch_s_own_error(dtype, stream, triton_device, within_budget):
    leaves = operands(7, 768, dtype=dtype, stream=dtype if stream == "same" else torch.float32)
    results = run(leaves, triton_device, impl="triton", segments=thirds(7))
    eager = run(leaves, "cpu", impl="torch", segments=thirds(7))
    wide = tuple(leaf.double() for leaf in leaves)
    exact = run(wide, "cpu", impl="torch", segments=thirds(7))
    # The interpreter rounds to bfloat16 towards zero.
    factor = 2.0 if dtype == torch.bfloat16 and triton_device == "cpu" else 1.0
    for index, triple in enumerate(zip(results, eager, exact, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        within_budget(*triple, factor=factor * (2.0 if index < 2 else 3.0), slack=2e-6)


def test_many_rows_for_each_program(triton_device, monkeypatch):
    """Parts of several steps, the last of a run not full; no float32 sum grows with the batch."""
    from kdcmae_fast.kernels.normalization import kernel

    monkeypatch.setattr(kernel, "_PARTS", 6)
    leaves, options = operands(101, 12), {"segments": ((1, 50), (0, 17), (2, 34))}
    results = run(leaves, triton_device, impl="triton", **options)
    for result, want in zip(results, run(leaves, "cpu", impl="torch", **options), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-11)


def test_out_dtype_eps_and_unwritten_memory(triton_device, poison_empty):
    leaves = operands(4, 24, dtype=torch.float16, stream=torch.float32)
    options = {"segments": thirds(4), "eps": 0.5, "out_dtype": torch.float32}
    results = run(leaves, triton_device, impl="triton", **options)
    for result, want in zip(results, run(leaves, "cpu", impl="torch", **options), strict=True):
        torch.testing.assert_close(result, want, rtol=2e-3, atol=2e-3)


def test_empty_batches(triton_device):
    results = run(operands(0, 7), triton_device, impl="triton", segments=((1, 0),))
    shapes = [tuple(t.shape) for t in results]
    assert shapes == [(0, 7)] * 4 + [(3, 7)] * 2
    assert not results[4].any() and not results[5].any()


def test_any_strides(triton_device):
    def make(layout: int) -> Tensor:
        torch.manual_seed(layout)
        return [
            torch.randn(24, 6).t(),
            torch.randn(6, 48)[:, 3:27],
            torch.randn(6, 48)[:, ::2],
            torch.randn(24).expand(6, 24),
        ][layout].to(triton_device)

    weight, bias = (torch.randn(24, 2).to(triton_device).t()[1] for _ in range(2))
    for layout in range(4):
        x, residual = make(layout).requires_grad_(), make(3 - layout)
        normed, summed = add_layer_norm(x, residual, weight, bias, impl="triton")
        want = add_layer_norm(x.detach(), residual, weight, bias, impl="torch")
        torch.testing.assert_close(normed, want.normed)
        assert torch.equal(summed, want.summed)
        normed.square().sum().backward()  # a cotangent like `normed`, then one that is expanded
        summed.sum().backward()
        assert x.grad.isfinite().all()


def test_wide_rows(triton_device):
    leaves = operands(2, 8192, 1, torch.float32)
    results = run(leaves, triton_device, impl="triton")
    for result, want in zip(results, run(leaves, "cpu", impl="torch"), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at most 8192 values, x has 8193"):
        run(operands(1, 8193, 1, torch.float32), triton_device, impl="triton")


def test_opcheck(triton_device):
    leaves = operands(5, 12, norms=2, dtype=torch.float32)
    x, stream, weight, bias = (t.to(triton_device) for t in leaves)
    runs, eps, half = ([1, 0], [2, 3]), 1e-5, torch.float16
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.layer_norm_triton.default, (x, weight, bias, *runs, eps, half))
    forward = (x.to(half), stream, weight, bias, *runs, eps, half)
    torch.library.opcheck(ops.add_layer_norm_triton.default, forward)
    normed, summed, mean, rstd = ops.add_layer_norm_triton(*forward)
    for onto in (None, stream):
        backward = (normed, onto, summed, mean, rstd, weight, *runs)
        torch.library.opcheck(ops.layer_norm_backward_triton.default, backward)
        torch.library.opcheck(ops.layer_norm_backward_cast_triton.default, (*backward, half))


def test_deterministic(triton_device):
    leaves, segments = operands(40, 12, dtype=torch.float32), ((1, 25), (0, 5), (2, 10))
    once, again = (run(leaves, triton_device, impl="triton", segments=segments) for _ in "12")
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_the_width_is_covered_without_idle_lanes():
    from kdcmae_fast.kernels.normalization.kernel import _layout

    assert _layout(768)[:2] == (256, 3)
    for width in range(1, 8193, 7):
        chunk, chunks, rows, warps = _layout(width)
        assert (chunks - 1) * chunk < width <= chunks * chunk < 2 * max(width, 256)
        assert {chunk.bit_count(), rows.bit_count(), warps.bit_count()} == {1}
        assert chunk * chunks * rows <= 32 * 32 * warps
