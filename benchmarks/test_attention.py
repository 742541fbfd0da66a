"""Attention at the stream lengths of the encoder (12 heads of 64) and decoder (16 of 32)."""

import bench_costs as costs
import published_ops as published
import pytest
import torch

from kdcmae_fast import kernels

# Visible image, audio and joint tokens of one view, and all tokens; rows of the batch that keep
# the work of a step about equal.
BATCHES = {49: 64, 128: 10, 177: 8, 708: 4}
PROVIDERS = ("published", "auto", "sdpa", "blocked", "torch", "flash_attn", "xformers")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("heads, head_dim", [(12, 64), (16, 32)])
@pytest.mark.parametrize("length", BATCHES)
def test_attention(length, heads, head_dim, dtype, provider, full, device, measure):
    if not full:
        length, heads = length // 4, heads // 4
        batch = 2
    else:
        batch = BATCHES[length]
    shape = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in "qkv")

    def published_way():
        return published.attention(q, k, v)

    def ours():
        return kernels.attention(q, k, v, impl=provider)

    if provider != "published":
        try:
            ours()
        except ValueError as error:
            pytest.skip(str(error))
    suffix = "" if dtype == torch.float32 else " bfloat16"
    measure(
        f"attention B={batch} H={heads} L={length} d={head_dim}{suffix}",
        provider,
        published_way if provider == "published" else ours,
        (q, k, v),
        tolerance=TOLERANCE[dtype],
        reference=published_way,
        cost=costs.attention(batch, heads, length, head_dim, q.element_size()),
    )
