"""Similarity of every cell of a map with its own clip's vector."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.kernels import diagonal_maps

MAPS, VECTORS = torch.zeros(4, 5, 3), torch.zeros(4, 3)


def pairs(batch: int, cells=6, width=12, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Leaves (B, HW, D) and (B, D)."""
    maps = torch.randn(batch, cells, width, dtype=dtype)
    return maps.requires_grad_(), torch.randn(batch, width, dtype=dtype, requires_grad=True)


def test_values_and_gradients():
    maps, vectors = pairs(5, dtype=torch.float32)
    cosines = F.cosine_similarity(maps.double(), vectors.double()[:, None], dim=2)
    result = diagonal_maps(maps, vectors)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), cosines / 0.03, rtol=1e-5, atol=1e-5)
    plain = diagonal_maps(maps.bfloat16(), vectors, temperature=1.0, normalize=False)
    torch.testing.assert_close(plain, (maps.bfloat16().float() * vectors[:, None]).sum(2))
    assert torch.autograd.gradcheck(diagonal_maps, pairs(3, 2, 4))
    assert diagonal_maps(torch.ones(0, 3, 2), torch.ones(0, 2)).shape == (0, 3)


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_breaks():
    compiled = torch.compile(diagonal_maps, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 7):
        leaves = pairs(batch, 5, 8, torch.float32)
        again, wanted = compiled(*leaves), diagonal_maps(*leaves)
        torch.testing.assert_close(again, wanted)
        grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (again, wanted))
        for grad, want in zip(*grads, strict=True):
            torch.testing.assert_close(grad, want)


def test_errors():
    with pytest.raises(ValueError, match="vectors must be"):
        diagonal_maps(MAPS, VECTORS[:, :2])
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        diagonal_maps(MAPS, VECTORS, temperature=-1)
    with pytest.raises(ValueError, match="impl='cpp' of diagonal_maps is not available here"):
        diagonal_maps(MAPS, VECTORS, impl="cpp")
