"""kernels/contrastive in Triton, beside the reference."""

import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import info_nce

pytestmark = pytest.mark.triton


def pairs(batch: int, width: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    a = torch.randn(batch, width, dtype=torch.float64)
    b = a + torch.randn(batch, width, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def run(a, b, device, temperature=0.1, **options):
    """(losses, hits, gradients by a, b and the temperature) on the CPU."""
    tau = torch.tensor(temperature, dtype=torch.promote_types(a.dtype, torch.float32))
    leaves = [x.detach().to(device).requires_grad_() for x in (a, b, tau)]
    result = info_nce(
        *leaves[:2], temperature=leaves[2], reduction="none", return_accuracy=True, **options
    )
    weight = torch.arange(1, len(a) + 1, device=device, dtype=result.loss.dtype) / max(1, len(a))
    grads = torch.autograd.grad(result.loss @ weight, leaves)
    return [x.detach().cpu() for x in (*result, *grads)]


def assert_close(a, b, device, factor=4.0, **options):
    results = run(a, b, device, impl="triton", **options)
    exact = run(a.double(), b.double(), "cpu", impl="torch", **options)
    eager = run(a, b, "cpu", impl="torch", **options)
    assert torch.equal(results[1], eager[1])
    for result, plain, wanted in zip(results, eager, exact, strict=True):
        assert result.dtype == plain.dtype and result.isfinite().all()
        error, budget = ((x.double() - wanted).norm() for x in (result, plain))
        assert error <= factor * budget + 2e-6 * wanted.norm() + 1e-7, f"{error=} {budget=}"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch, width", [(2, 3), (17, 32), (65, 33), (130, 70)])
def test_equals_the_reference(batch, width, symmetric, normalize, triton_device):
    a, b = pairs(batch, width)
    if not normalize:
        a, b = a / 10, b / 10
    assert_close(a, b, triton_device, symmetric=symmetric, normalize=normalize)


@pytest.mark.parametrize("temperature", [0.004, 0.0249, 0.0251, 0.07, 2.0])
def test_static_and_running_shifts(temperature, triton_device):
    a, b = pairs(70, 16)
    a[3] = -b[5]  # a logit at the lower end
    assert_close(a, b, triton_device, temperature=temperature, symmetric=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_16_bit_operands(dtype, symmetric, triton_device):
    a, b = (x / x.norm(dim=1, keepdim=True) for x in pairs(40, 96))
    # The interpreter rounds to bfloat16 towards zero, which would bias every cosine: there the
    # rows come normalised and rounded.
    normalize = dtype != torch.bfloat16 or triton_device == "cuda"
    assert_close(a.to(dtype), b.to(dtype), triton_device, symmetric=symmetric, normalize=normalize)


def test_precision_and_mixed_dtypes(triton_device):
    a, b = pairs(20, 40)
    b = b.half()
    result = info_nce(a.to(triton_device), b.to(triton_device), precision="fp16", impl="triton")
    wanted = info_nce(a, b, precision="fp16", impl="torch")
    torch.testing.assert_close(result.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_orthonormal_pairs_have_full_relative_precision(triton_device):
    eye = torch.eye(6, device=triton_device)
    exact = math.log1p(5 * math.exp(-20))
    loss = info_nce(eye, eye, temperature=0.05, symmetric=True, impl="triton")
    assert loss.item() == pytest.approx(exact, rel=1e-5)


def test_one_pair_none_and_collapsed_features(triton_device, poison_empty):
    one = info_nce(*(x.to(triton_device) for x in pairs(1, 5)), symmetric=True,
                   return_accuracy=True, impl="triton")  # fmt: skip
    assert one.loss == 0 and one.accuracy == 1
    assert info_nce(*(x.to(triton_device) for x in pairs(0, 5)), impl="triton") == 0
    same = torch.ones(4, 3, device=triton_device)
    assert info_nce(same, same, return_accuracy=True, impl="triton").accuracy == 0


def test_strides_and_repeated_runs(triton_device, poison_empty):
    a, b = torch.randn(8, 70).t(), torch.randn(70, 16)[:, ::2]
    once, again = (run(a, b, triton_device, symmetric=True, impl="triton") for _ in range(2))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(once, again, strict=True))
    wanted = run(a, b, "cpu", symmetric=True, impl="torch")
    for result, plain in zip(once, wanted, strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)


def test_not_a_number_shows_and_float64_is_refused(triton_device):
    a, b = (x.to(triton_device) for x in pairs(4, 6))
    a[1, 2] = math.nan
    assert info_nce(a, b, impl="triton").isnan()
    with pytest.raises(ValueError, match="takes no float64"):
        info_nce(a.double(), b, impl="triton")


@pytest.mark.parametrize("width", [1, 5, 1500])
def test_unit_rows(width, triton_device, poison_empty):
    x = torch.randn(3, width, device=triton_device)
    x[1] = 0.0
    unit, inverse = torch.ops.kdcmae_fast.info_nce_unit_rows_triton(x, torch.float32)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(x, dim=1))
    torch.testing.assert_close(unit, x * inverse)


@pytest.mark.parametrize("columns", [False, True])
def test_opcheck(columns, triton_device):
    a, b = (x.to(triton_device) for x in pairs(5, 4))
    b, scale = b[1:4].contiguous(), torch.tensor(9.0, device=triton_device)
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.info_nce_unit_rows_triton.default, (a, torch.float16))
    arguments = (b, a, scale, 1)
    torch.library.opcheck(ops.info_nce_statistics_triton.default, (*arguments, columns, True))
    by_row = [torch.rand(3, device=triton_device) for _ in range(3)]
    by_column = [torch.rand(5 if columns else 0, device=triton_device) for _ in range(2)]
    torch.library.opcheck(ops.info_nce_gradients_triton.default, (*arguments, *by_row, *by_column))
