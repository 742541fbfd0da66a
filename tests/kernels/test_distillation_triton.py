"""kernels/distillation in Triton, beside the reference."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import distillation_loss

OPTIONS = [
    {"divergence": divergence, "distribution": distribution}
    for divergence, distribution in itertools.product(
        ("kl", "kl_12", "js"), ("softmax", "shift", "batch_shift")
    )
]
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))

pytestmark = pytest.mark.triton


def features(batch: int, width: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    p = torch.randn(batch, width, dtype=torch.float64)
    q = p + 0.5 * torch.randn(batch, width, dtype=torch.float64)
    return p.to(dtype), q.to(dtype)


def run(p, q, device, **options):
    """(losses, gradient by p, gradient by q) on the CPU."""
    p, q = (x.detach().to(device).requires_grad_() for x in (p, q))
    loss = distillation_loss(p, q, reduction="none", **options)
    weight = torch.arange(1, len(p) + 1, device=device, dtype=loss.dtype)
    return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss @ weight, (p, q)))]


@EVERY
@pytest.mark.parametrize("shape", [(3, 1), (2, 17), (4, 96)], ids=str)
def test_float64_equals_the_reference(options, shape, triton_device):
    p, q = features(*shape)
    results = run(p, q, triton_device, impl="triton", **options)
    # Where a shifted row is 0, autograd subtracts two numbers of the order of 1 / eps.
    atol = 1e-12 if options["distribution"] == "softmax" else 2e-5
    for result, wanted in zip(results, run(p, q, "cpu", impl="torch", **options), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=atol)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(options, dtype, triton_device, within_budget):
    p, q = features(3, 768, dtype)
    results = run(p, q, triton_device, impl="triton", **options)
    eager = run(p, q, "cpu", impl="torch", **options)
    exact = run(p.double(), q.double(), "cpu", impl="torch", **options)
    for index, triple in enumerate(zip(results, eager, exact, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        # The interpreter rounds to bfloat16 towards zero.
        truncated = dtype == torch.bfloat16 and triton_device == "cpu"
        within_budget(*triple, factor=2.0 if index == 0 else 6.0 if truncated else 3.0)


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_temperature(temperature, triton_device):
    p, q = features(2, 9)
    for divergence in ("kl", "kl_12", "js"):
        options = {"divergence": divergence, "temperature": temperature}
        results = run(p, q, triton_device, impl="triton", **options)
        for result, wanted in zip(results, run(p, q, "cpu", impl="torch", **options), strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-12)


@EVERY
def test_empty_batches_ties_and_rows_without_mass(options, triton_device):
    empty = run(*features(0, 5), triton_device, impl="triton", **options)
    assert [x.shape for x in empty] == [(0,), (0, 5), (0, 5)]
    p, q = features(3, 6)
    p[0] = -1.0
    p[1, 2] = p[1, 4] = p.min() - 1
    results = run(p, q, triton_device, impl="triton", **options)
    for result, wanted in zip(results, run(p, q, "cpu", impl="torch", **options), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=2e-5)


def test_any_strides_mixed_dtypes_and_unwritten_memory(triton_device, poison_empty):
    p = torch.randn(9, 6).t().to(triton_device)
    q = torch.randn(6, 18, dtype=torch.float16).to(triton_device)[:, ::2].requires_grad_()
    loss = distillation_loss(p, q, divergence="js", impl="triton")
    wanted = distillation_loss(p.cpu(), q.detach().cpu(), divergence="js", impl="torch")
    torch.testing.assert_close(loss.detach().cpu(), wanted)
    loss.backward()
    assert q.grad.isfinite().all() and q.grad.any()


def test_wide_rows(triton_device):
    p, q = features(1, 8192, torch.float32)
    results = run(p, q, triton_device, impl="triton")
    for result, wanted in zip(results, run(p, q, "cpu", impl="torch"), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6)
    p, q = (x.to(triton_device) for x in features(1, 8193, torch.float32))
    with pytest.raises(ValueError, match="at most 8192 features, p has 8193"):
        distillation_loss(p, q, impl="triton")


@pytest.mark.parametrize("divergence, distribution", [("kl", "softmax"), ("js", "batch_shift")])
def test_opcheck(divergence, distribution, triton_device):
    p, q = (x.to(triton_device) for x in features(3, 4, torch.float32))
    options = (divergence, distribution, 1.0)
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.distillation_rows_triton.default, (p, q, *options))
    weight = torch.randn(3, device=triton_device)
    torch.library.opcheck(ops.distillation_rows_grad_triton.default, (weight, p, q, *options))


@EVERY
def test_deterministic(options, triton_device):
    p, q = features(4, 7, torch.float32)
    once, again = (functools.partial(run, p, q, triton_device, impl="triton")(**options)
                   for _ in range(2))  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
