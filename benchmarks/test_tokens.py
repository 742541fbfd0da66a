"""Moving visible tokens: gather, patch embedding, decoder input."""

import bench_costs as costs
import bench_peers as peers
import published_ops as published
import pytest
import torch
from bench_providers import providers
from bench_streams import PATCH, VIEWS, Stream

from kdcmae_fast import kernels


@pytest.fixture(params=("audio", "image"))
def stream(request, full, device) -> Stream:
    return Stream(request.param, full, device)


@providers("gather_tokens", "lightly")
def test_gather_tokens(provider, stream, device, choose, measure):
    shape = (stream.batch, stream.tokens, stream.dim)
    x = torch.randn(shape, device=device, requires_grad=True)

    def published_way():
        return torch.cat([published.gather_tokens(x, view.ids_keep) for view in stream.views])

    def ours(impl):
        return lambda: kernels.gather_tokens(x, stream.plan, impl=impl)

    def lightly():
        get_at_index = peers.lightly_utils().get_at_index
        return lambda: torch.cat([get_at_index(x, view.ids_keep) for view in stream.views])

    forward = choose("gather_tokens", provider, published=published_way, ours=ours, lightly=lightly)
    group = f"gather_tokens {stream.shape} D={stream.dim}"
    measure(group, provider, forward, (x,), reference=published_way, cost=costs.gather(stream))


@providers("embed_visible_patches")
def test_embed_visible_patches(provider, stream, device, choose, measure):
    pixels = stream.pixels()
    weight = torch.randn(stream.dim, stream.channels, PATCH, PATCH, device=device) / PATCH
    weight.requires_grad_()
    bias = torch.randn(stream.dim, device=device, requires_grad=True)
    pos = torch.randn(stream.tokens, stream.dim, device=device)

    def published_way():
        images = stream.images(pixels)
        return published.embed_visible_patches(images, weight, bias, pos, stream.views)

    def ours(impl):
        return lambda: kernels.embed_visible_patches(
            pixels, weight, bias, pos, stream.plan, patch_size=PATCH, impl=impl
        )

    forward = choose("embed_visible_patches", provider, published=published_way, ours=ours)
    group = f"embed_visible_patches {stream.shape} D={stream.dim}"
    cost = costs.embed(stream)
    measure(group, provider, forward, (weight, bias), reference=published_way, cost=cost)


@providers("assemble_decoder_input", "lightly")
def test_assemble_decoder_input(provider, stream, device, choose, measure):
    dim = stream.decoder_dim
    x = torch.randn(VIEWS * stream.batch, stream.keep, dim, device=device, requires_grad=True)
    mask_token = torch.randn(1, 1, dim, device=device, requires_grad=True)
    pos = torch.randn(stream.tokens, dim, device=device)

    def published_way():
        return published.assemble_decoder_input(x, stream.views, mask_token, pos)

    def ours(impl):
        return lambda: kernels.assemble_decoder_input(x, [stream.plan], mask_token, pos, impl=impl)

    def lightly():
        utils = peers.lightly_utils()
        ids = torch.cat([view.ids_keep for view in stream.views])

        def way():
            filler = utils.repeat_token(mask_token, (x.shape[0], stream.tokens))
            return utils.set_at_index(filler, ids, x) + pos

        return way

    forward = choose(
        "assemble_decoder_input", provider, published=published_way, ours=ours, lightly=lightly
    )
    group = f"assemble_decoder_input {stream.shape} D={dim}"
    cost = costs.assemble(stream)
    measure(group, provider, forward, (x, mask_token), reference=published_way, cost=cost)
