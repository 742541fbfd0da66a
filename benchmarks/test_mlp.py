"""The MLP of a transformer beside its three modules: a third less kept, for some time."""

import pytest
import torch
import torch.nn.functional as F
from bench_providers import providers

from kdcmae_fast import kernels


@providers("mlp")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("block", ("encoder", "decoder"))
def test_mlp(block, dtype, provider, full, device, choose, measure):
    """Rows of the encoder's visible tokens (width 768) and of the decoder's sequence (512)."""
    tokens, dim = {"encoder": (177, 768), "decoder": (708, 512)}[block]
    samples = (64 if device == "cuda" else 4) if full else 1
    rows, dim = samples * tokens, dim if full else dim // 8
    shapes = ((rows, dim), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,))
    leaves = tuple(
        (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()
        for shape in shapes
    )

    def published_way():
        x, weight1, bias1, weight2, bias2 = leaves
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    forward = choose(
        "mlp", provider, published=published_way,
        ours=lambda impl: lambda: kernels.mlp(*leaves, impl=impl),
    )  # fmt: skip
    group = f"mlp {block} R={rows} D={dim} {str(dtype).removeprefix('torch.')}"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    measure(group, provider, forward, leaves, reference=published_way, tolerance=tolerance)
