"""kernels/alignment in Triton, beside the reference."""

import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import mmd_loss
from kdcmae_fast.kernels.alignment import reference

EVERY = pytest.mark.parametrize("variant", reference.VARIANTS)

pytestmark = pytest.mark.triton


def features(n: int, m: int, width: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, width, dtype=torch.float64) / width**0.5
    y = 0.7 * torch.randn(m, width, dtype=torch.float64) / width**0.5 + 0.2 / width**0.5
    return x.to(dtype), y.to(dtype)


def run(x, y, device, **options):
    """(loss, gradient by x, gradient by y) on the CPU."""
    leaves = [t.detach().to(device).requires_grad_() for t in (x, y)]
    loss = mmd_loss(*leaves, **options)
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(loss, leaves))]


def assert_close(x, y, device, of_loss=2e-6, of_grads=2e-6, **options):
    results = run(x, y, device, impl="triton", **options)
    exact = run(x.double(), y.double(), "cpu", impl="torch", **options)
    assert results[0].dtype == torch.float32
    assert (results[0] - exact[0]).abs() <= of_loss * exact[0].abs() + 1e-7
    for grad, want, leaf in zip(results[1:], exact[1:], (x, y), strict=True):
        assert grad.dtype == leaf.dtype
        subnormal = 3e-8 * grad.numel() ** 0.5 if grad.dtype == torch.float16 else 0.0
        assert (grad - want).norm() <= of_grads * want.norm() + subnormal


@EVERY
@pytest.mark.parametrize("shape", [(2, 3, 4), (65, 5, 33), (70, 66, 96)], ids=str)
def test_float32(variant, shape, triton_device):
    assert_close(*features(*shape), triton_device, of_loss=2e-5, variant=variant)


# Rounding of the weights, and of the gradients twice: the interpreter truncates.
@EVERY
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_16_bit_operands(variant, dtype, error, triton_device):
    x, y = features(66, 40, 70, dtype)
    assert_close(x, y, triton_device, of_loss=2e-5, of_grads=error, variant=variant)


def test_mixed_dtypes_are_taken_in_float32(triton_device):
    x, y = features(5, 6, 20)
    assert_close(x.bfloat16(), y.half(), triton_device, of_grads=5e-3)


@pytest.mark.parametrize("bandwidths", [(1.0,), (1e-3, 1e3), (3.0, 1.0, 2.0), (0.5, 7.5, 97.5)])
def test_families_of_bandwidths(bandwidths, triton_device):
    assert_close(*features(9, 8, 5), triton_device, of_loss=1e-5, bandwidths=bandwidths)


@EVERY
def test_close_pairs_far_from_the_origin(variant, triton_device):
    base = 100 + torch.randn(8, 64)
    x, y = (base + 1e-3 * torch.randn(8, 64) for _ in "xy")
    options = {"variant": variant, "of_loss": 1e-4, "of_grads": 1e-2}
    assert_close(x, y, triton_device, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_sets_have_no_discrepancy(dtype, triton_device):
    x = torch.nn.functional.layer_norm(torch.randn(5, 300), (300,)).to(dtype).to(triton_device)
    assert abs(mmd_loss(x, x.clone(), impl="triton").item()) < 1e-6


@EVERY
def test_one_row_and_rows_that_are_all_equal(variant, triton_device, poison_empty):
    x, y = torch.ones(3, 4, device=triton_device), torch.ones(2, 4, device=triton_device)
    loss = mmd_loss(x, y, variant=variant, impl="triton")
    assert loss.item() == (4.0 if variant == "kdc_tiled" else 0.0)
    if variant != "unbiased":
        assert_close(*features(1, 1, 3), triton_device, variant=variant)


@EVERY
def test_partial_gradients_and_none(variant, triton_device, poison_empty):
    x, y = (t.to(triton_device) for t in features(70, 5, 12))
    loss, by_x, by_y = run(x, y, triton_device, variant=variant, impl="triton")
    for index, want in enumerate((by_x, by_y)):
        leaves = [x.clone(), y.clone()]
        leaves[index].requires_grad_()
        part = mmd_loss(*leaves, variant=variant, impl="triton")
        assert torch.equal(part.detach().cpu(), loss)
        (grad,) = torch.autograd.grad(part, leaves[index])
        assert torch.equal(grad.cpu(), want)
    assert torch.equal(mmd_loss(x, y, variant=variant, impl="triton").cpu(), loss)


def test_rows_in_several_workspaces(triton_device, monkeypatch):
    from kdcmae_fast.kernels.alignment import kernel

    x, y = features(130, 5, 6)
    whole = run(x, y, triton_device, impl="triton")
    monkeypatch.setattr(kernel, "WORKSPACE_ELEMENTS", 1)
    parts = run(x, y, triton_device, impl="triton")
    for part, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, want, rtol=1e-5, atol=1e-9)


def test_strides_repeated_runs_and_unwritten_memory(triton_device, poison_empty):
    x, y = torch.randn(8, 70).t(), torch.randn(1, 16)[:, ::2].expand(5, -1)
    once, again = (run(x, y, triton_device, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(once, again, strict=True))
    for result, want in zip(once, run(x, y, "cpu", impl="torch"), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-6)


def test_not_a_number_shows_and_float64_is_refused(triton_device):
    x, y = (t.to(triton_device) for t in features(4, 5, 6))
    x[1, 2] = math.nan
    assert mmd_loss(x, y, impl="triton").isnan() and mmd_loss(y, x, impl="triton").isnan()
    with pytest.raises(ValueError, match="takes no float64"):
        mmd_loss(x.double(), y, impl="triton")


@EVERY
def test_opcheck(variant, triton_device):
    x, y = (t.to(triton_device) for t in features(3, 4, 5))
    arguments = (x, y, variant, *reference.family(None, variant))
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.mmd_triton.default, arguments)
    for needed in ((True, True), (False, True)):
        torch.library.opcheck(ops.mmd_grads_triton.default, (*arguments, *needed))
