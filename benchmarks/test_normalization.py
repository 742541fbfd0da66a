"""add_layer_norm beside the published sequence, forward and backward in one call."""

import published_normalization as published
import pytest
import torch

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable

OP = "add_layer_norm"


@pytest.mark.parametrize("impl", ("published", *implementations(OP)))
@pytest.mark.parametrize("branch", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_add_layer_norm(impl, branch, full, device, measure):
    """The shared block: joint, audio and video rows in one pack, the stream in float32."""
    problem = impl != "published" and unavailable(OP, impl, device)
    if problem:
        pytest.skip(problem)
    samples, dim = (64 if device == "cuda" else 8, 768) if full else (2, 192)
    rows = [samples * tokens for tokens in (177, 128, 49)]
    x = torch.randn(sum(rows), dim, device=device, dtype=branch, requires_grad=True)
    residual = torch.randn(sum(rows), dim, device=device, requires_grad=True)
    weight, bias = (torch.randn(3, dim, device=device, requires_grad=True) for _ in "wb")
    leaves = x, residual, weight, bias

    def published_way():
        # The sum goes on into the next addition: both outputs take part in the gradient.
        normed, summed = published.add_layer_norm(*leaves, rows)
        return torch.cat([*normed, *(stream.to(branch) for stream in summed)])

    def ours():
        segments = tuple(enumerate(rows))
        normed, summed = kernels.add_layer_norm(*leaves, segments=segments, impl=impl)
        return torch.cat([normed, summed.to(branch)])

    forward = published_way if impl == "published" else ours
    name = str(branch).removeprefix("torch.")
    group = f"add_layer_norm R={sum(rows)} D={dim} {name}"
    tolerance = 1e-4 if branch == torch.float32 else 2e-2
    measure(group, impl, forward, leaves, expected=published_way().detach(), tolerance=tolerance)
