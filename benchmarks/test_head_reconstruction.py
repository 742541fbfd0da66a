"""The head with its reconstruction loss beside the published sequence, forward and backward."""

import published_head_reconstruction as published
import published_ops
import pytest
import torch
import torch.nn.functional as F

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable

OP = "masked_head_reconstruction_loss"
VIEWS = 2
# "separate": the head on all tokens, then `masked_reconstruction_loss`. "recompute": the op with
# grad_in_forward=False, which keeps x and forms the predictions again.
PROVIDERS = ("published", "separate", "recompute", *implementations(OP))


@pytest.mark.parametrize("modality", ("audio", "image"))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_reconstruction(provider, modality, full, device, measure):
    problem = provider in implementations(OP) and unavailable(OP, provider, device)
    if problem:
        pytest.skip(problem)
    batch, dim = (64, 512) if full else (4, 64)
    sides = {"audio": (1024, 128), "image": (224, 224)}[modality]
    grid = (sides[1] // 16, sides[0] // 16)
    tokens, channels = grid[0] * grid[1], 1 if modality == "audio" else 3
    # The dtype that trains: 16 bits on a GPU.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (batch, *sides) if modality == "audio" else (batch, channels, *sides)
    pixels = torch.randn(shape, device=device)
    images = pixels.unsqueeze(1).transpose(2, 3) if modality == "audio" else pixels
    x = torch.randn(VIEWS * batch, tokens, dim, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(256 * channels, dim, device=device) / dim**0.5
    weight = weight.to(dtype).requires_grad_()
    bias = torch.zeros(256 * channels, device=device, dtype=dtype, requires_grad=True)
    noise = torch.rand(batch, tokens, device=device)
    ids = torch.arange(batch, device=device)
    plan = kernels.complementary_masks(ids, grid, 0.75, noise=noise)
    views = published_ops.complementary_masks(noise, tokens // 4, VIEWS)

    def published_way():
        return published.masked_head_reconstruction_loss(x, weight, bias, images, views, 16)

    def separate():
        pred = F.linear(x, weight, bias)
        return kernels.masked_reconstruction_loss(pred, pixels, plan, patch_size=16)

    def ours():
        return kernels.masked_head_reconstruction_loss(
            x, weight, bias, pixels, plan, patch_size=16,
            grad_in_forward=provider != "recompute",
            impl="auto" if provider == "recompute" else provider,
        )  # fmt: skip

    forward = {"published": published_way, "separate": separate}.get(provider, ours)
    group = f"head_reconstruction {modality} B={batch} L={tokens} D={dim}"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    expected = published_way().detach().float()
    measure(group, provider, forward, (x, weight, bias), expected, tolerance)
