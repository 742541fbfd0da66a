"""Complementary masks of two views."""

import bench_costs as costs
import published_ops as published
import pytest
import torch
from bench_providers import providers
from bench_streams import VIEWS, Stream

from kdcmae_fast import kernels


@providers("complementary_masks")
@pytest.mark.parametrize("name", ("audio", "image"))
def test_masks(name, provider, full, device, choose, measure):
    stream = Stream(name, full, device)

    def published_way():
        noise = torch.rand(stream.batch, stream.tokens, device=device)
        views = published.complementary_masks(noise, stream.keep, VIEWS)
        return torch.stack([view.mask for view in views]).sum(2)

    def ours(impl):
        def way():
            plan = kernels.complementary_masks(stream.ids, stream.grid, 0.75, impl=impl)
            # Everything the published way makes, for both views.
            views = [(plan.ids_keep(v), plan.ids_restore(v), plan.mask(v)) for v in range(VIEWS)]
            return torch.stack([mask for _, _, mask in views]).sum(2)

        return way

    # Random masks cannot be compared, their counts can; the tests compare plans of equal noise.
    removed = float(stream.tokens - stream.keep)
    forward = choose("complementary_masks", provider, published=published_way, ours=ours)
    measure(
        f"masks {stream.shape}",
        provider,
        forward,
        expected=torch.full((VIEWS, stream.batch), removed, device=device),
        cost=costs.masks(stream),
    )
