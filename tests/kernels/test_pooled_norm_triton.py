"""Pooled LayerNorm in Triton, beside the reference."""

import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import pooled_layer_norm

pytestmark = pytest.mark.triton

# Three chunks and several programs; one masked chunk; several masked chunks; several warps a row.
SHAPES = [(2, 70, 96), (2, 33, 768), (3, 5, 17), (1, 3, 1023), (1, 1, 1), (1, 2, 5000)]


def operands(shape, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, D) away from 0, weight, bias."""
    width = shape[-1]
    x = 2 + 3 * torch.randn(shape, dtype=torch.float64)
    weight, bias = (torch.randn(width, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (1 + 0.3 * weight).to(dtype), (0.3 * bias).to(dtype)


def run(leaves, device, impl, **options) -> list[Tensor]:
    """The result and the gradients by x, weight and bias on the CPU."""
    leaves = [t.detach().to(device).requires_grad_() for t in leaves]
    y = pooled_layer_norm(*leaves, impl=impl, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, y.dtype)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad((y * cotangent).sum(), leaves))]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_reference(shape, normalize, triton_device):
    leaves, options = operands(shape), {"normalize": normalize, "eps": 1e-3}
    results = run(leaves, triton_device, "triton", **options)
    for result, want in zip(results, run(leaves, "cpu", "torch", **options), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 49, 768), (3, 7, 96), (2, 3, 1023)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(shape, dtype, triton_device, within_budget):
    leaves = operands(shape, dtype)
    results = run(leaves, triton_device, "triton")
    eager, exact = (run(x, "cpu", "torch") for x in (leaves, [t.double() for t in leaves]))
    for index, triple in enumerate(zip(results, eager, exact, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        # The interpreter rounds to bfloat16 towards zero.
        truncated = dtype == torch.bfloat16 and triton_device == "cpu"
        within_budget(*triple, factor=2.0 if index == 0 else 6.0 if truncated else 3.0)


def test_any_strides_mixed_dtypes_and_unwritten_memory(triton_device, poison_empty):
    x, weight, bias = operands((4, 7, 40), torch.float32)
    wants = run((x, weight, bias), "cpu", "torch")
    whole = torch.cat([torch.full((4, 1, 40), math.nan), x], dim=1)
    odd = torch.full((4, 7, 83), math.nan)
    odd[:, :, 1:81:2] = x
    for layout in (whole[:, 1:], odd[:, :, 1:81:2], x.transpose(0, 1).contiguous().transpose(0, 1)):
        results = run((layout, weight, bias.double().float()), triton_device, "triton")
        for result, want in zip(results, wants, strict=True):
            torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-5)
    half = run((x.half(), weight, bias), triton_device, "triton")
    assert [t.dtype for t in half] == [torch.float32, torch.float16, torch.float32, torch.float32]
    torch.testing.assert_close(half[0], wants[0], rtol=1e-2, atol=1e-2)
    expanded = x[:1].expand(3, -1, -1)
    torch.testing.assert_close(
        run((expanded, weight, bias), triton_device, "triton")[0], wants[0][:1].expand(3, -1)
    )


def test_empty_batches(triton_device):
    results = run(operands((0, 4, 6)), triton_device, "triton")
    assert [t.shape for t in results] == [(0, 6), (0, 4, 6), (6,), (6,)]


def test_not_a_number_stays_in_its_sample(triton_device):
    x, weight, bias = operands((3, 5, 17), torch.float32)
    x[1, 2, 3] = math.nan
    rows = run((x, weight, bias), triton_device, "triton")[0].isnan()
    assert rows.all(dim=1).tolist() == [False, True, False] and not rows[::2].any()


def test_too_wide_tokens_are_refused_by_name_only(triton_device):
    x, weight, bias = (t.to(triton_device) for t in operands((1, 1, 16385), torch.float32))
    with pytest.raises(ValueError, match="at most 16384 values, x has 16385"):
        pooled_layer_norm(x, weight, bias, impl="triton")
    assert pooled_layer_norm(x, weight, bias).shape == (1, 16385)


def test_opcheck(triton_device):
    ops = torch.ops.kdcmae_fast
    x = operands((2, 3, 8), torch.float32)[0].to(triton_device)
    _, statistics = ops.pooled_tokens_triton(x, 1e-5)
    torch.library.opcheck(ops.pooled_tokens_triton.default, (x, 1e-5))
    grad = torch.randn(2, 8, device=triton_device)
    torch.library.opcheck(ops.pooled_tokens_grad_triton.default, (grad, x, statistics))


def test_deterministic(triton_device):
    leaves = operands((2, 70, 48), torch.float32)
    once, again = (run(leaves, triton_device, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
