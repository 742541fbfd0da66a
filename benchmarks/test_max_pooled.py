"""The max-pooled InfoNCE beside the published op sequence, forward and backward in one call."""

import published_max_pooled as published
import pytest
import torch

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable

OP = "max_pooled_info_nce"


@pytest.mark.parametrize("impl", ("published", *implementations(OP)))
@pytest.mark.parametrize("shape", [(256, 49, 512), (64, 196, 768), (128, 49, 2048)], ids=str)
def test_max_pooled_info_nce(impl, shape, full, device, measure):
    problem = impl != "published" and unavailable(OP, impl, device)
    if problem:
        pytest.skip(problem)
    batch, cells, width = shape if full else (shape[0] // 8, shape[1], shape[2] // 8)
    maps = torch.randn(batch, cells, width, device=device, requires_grad=True)
    vectors = torch.randn(batch, width, device=device, requires_grad=True)

    def published_way():
        return published.max_pooled_info_nce(maps, vectors)

    def ours():  # the published loss sums the directions
        return 2 * kernels.max_pooled_info_nce(maps, vectors, impl=impl)

    forward = published_way if impl == "published" else ours
    group = f"max_pooled_info_nce B={batch} HW={cells} D={width}"
    measure(group, impl, forward, (maps, vectors), expected=published_way())
