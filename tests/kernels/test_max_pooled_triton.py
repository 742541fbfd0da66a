"""The max-pooled InfoNCE in Triton, beside the reference."""

import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import max_pooled_info_nce

pytestmark = [
    pytest.mark.triton,
    # The interpreter's loop over a number known at run time only.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def pairs(batch: int, cells: int, width: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    vectors = torch.randn(batch, width, dtype=torch.float64)
    maps = torch.randn(batch, cells, width, dtype=torch.float64)
    maps[:, cells // 2] += 2 * vectors
    return maps.to(dtype), vectors.to(dtype)


def run(maps, vectors, device, temperature=0.1, **options):
    """(losses, hits, gradients by maps, vectors and the temperature) on the CPU."""
    tau = torch.tensor(temperature, dtype=torch.promote_types(maps.dtype, torch.float32))
    leaves = [x.detach().to(device).requires_grad_() for x in (maps, vectors, tau)]
    result = max_pooled_info_nce(
        *leaves[:2], temperature=leaves[2], reduction="none", return_accuracy=True, **options
    )
    weight = torch.arange(1, len(maps) + 1, device=device, dtype=result.loss.dtype) / len(maps)
    grads = torch.autograd.grad(result.loss @ weight, leaves)
    return [x.detach().cpu() for x in (*result, *grads)]


def assert_close(maps, vectors, device, factor=4.0, **options):
    results = run(maps, vectors, device, impl="triton", **options)
    exact = run(maps.double(), vectors.double(), "cpu", impl="torch", **options)
    eager = run(maps, vectors, "cpu", impl="torch", **options)
    assert torch.equal(results[1], eager[1])
    for result, plain, wanted in zip(results, eager, exact, strict=True):
        assert result.dtype == plain.dtype and result.isfinite().all()
        error, budget = ((x.double() - wanted).norm() for x in (result, plain))
        assert error <= factor * budget + 2e-6 * wanted.norm() + 1e-7, f"{error=} {budget=}"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "batch, cells, width", [(2, 1, 3), (17, 7, 32), (19, 49, 33), (4, 70, 20), (2, 130, 70)]
)
def test_equals_the_reference(batch, cells, width, symmetric, normalize, triton_device):
    maps, vectors = pairs(batch, cells, width)
    if not normalize:
        maps, vectors = maps / 10, vectors / 10
    assert_close(maps, vectors, triton_device, symmetric=symmetric, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cells", [49, 260])
def test_16_bit_operands(dtype, cells, triton_device):
    maps, vectors = (x / x.norm(dim=-1, keepdim=True) for x in pairs(4, cells, 70))
    # The interpreter rounds to bfloat16 towards zero, which would bias every cosine: there the
    # rows come normalised and rounded.
    normalize = dtype != torch.bfloat16 or triton_device == "cuda"
    assert_close(maps.to(dtype), vectors.to(dtype), triton_device, normalize=normalize)


def test_several_tiles_of_vectors_and_shares_of_maps(triton_device):
    maps, vectors = pairs(67, 3, 70)
    assert_close(maps, vectors, triton_device)


def test_of_equal_cells_the_first_takes_the_gradient(triton_device):
    maps, vectors = pairs(5, 3, 8)
    for copies in (2, 40):  # within a block of cells, and beyond it
        repeated = maps.repeat(1, copies, 1).to(triton_device).requires_grad_()
        loss = max_pooled_info_nce(repeated, vectors.to(triton_device), impl="triton")
        (grad,) = torch.autograd.grad(loss, repeated)
        assert grad[:, :3].any() and not grad[:, 3:].any()


def test_precision_and_mixed_dtypes(triton_device):
    maps, vectors = pairs(20, 5, 40)
    inputs = (maps, vectors.half())
    result = max_pooled_info_nce(
        *(x.to(triton_device) for x in inputs), precision="fp16", impl="triton"
    )
    wanted = max_pooled_info_nce(*inputs, precision="fp16", impl="torch")
    torch.testing.assert_close(result.cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_one_pair_none_and_collapsed_features(triton_device, poison_empty):
    one = max_pooled_info_nce(
        *(x.to(triton_device) for x in pairs(1, 4, 5)), return_accuracy=True, impl="triton"
    )
    assert one.loss == 0 and one.accuracy == 1
    none = (x.to(triton_device) for x in pairs(0, 4, 5))
    assert max_pooled_info_nce(*none, impl="triton") == 0
    same = (torch.ones(shape, device=triton_device) for shape in ((4, 2, 3), (4, 3)))
    assert max_pooled_info_nce(*same, return_accuracy=True, impl="triton").accuracy == 0


def test_strides_and_repeated_runs(triton_device, poison_empty):
    maps, vectors = torch.randn(20, 8, 9).transpose(1, 2), torch.randn(20, 16)[:, ::2]
    once, again = (run(maps, vectors, triton_device, impl="triton") for _ in range(2))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(once, again, strict=True))
    wanted = run(maps, vectors, "cpu", impl="torch")
    for result, plain in zip(once, wanted, strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [4, 70])
def test_not_a_number_shows_and_float64_is_refused(cells, triton_device):
    maps, vectors = (x.to(triton_device) for x in pairs(4, cells, 6))
    maps[1, 2, 0] = math.nan
    losses = max_pooled_info_nce(maps, vectors, symmetric=False, reduction="none", impl="triton")
    assert losses[1].isnan() and losses[[0, 2, 3]].isfinite().all()
    with pytest.raises(ValueError, match="takes no float64"):
        max_pooled_info_nce(maps.double(), vectors, impl="triton")


def test_opcheck(triton_device):
    maps, vectors = (x.to(triton_device) for x in pairs(3, 4, 5))
    inverse = torch.rand(3, 4, device=triton_device)
    rows = (maps, inverse, vectors[:2].contiguous(), torch.tensor(9.0, device=triton_device))
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.max_pooled_scores_triton.default, rows)
    unit = torch.tensor(0.5, device=triton_device)
    grad, logits = torch.randn(2, 3, 2, device=triton_device)
    cells = torch.randint(4, (3, 2), dtype=torch.int16, device=triton_device)
    by_maps = (*rows, unit, grad, logits, cells, True, torch.float16)
    torch.library.opcheck(ops.max_pooled_gradient_by_maps_triton.default, by_maps)
    by_vectors = (*rows, unit, grad, cells)
    torch.library.opcheck(ops.max_pooled_gradient_by_vectors_triton.default, by_vectors)
