"""Each op beside the published op sequence it replaces, forward and backward in one call."""

import published_ops as published
import pytest
import torch

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable

VIEWS = 2


def providers(op: str) -> pytest.MarkDecorator:
    """The published op sequence and every implementation that `op` has."""
    return pytest.mark.parametrize("impl", ("published", *implementations(op)))


def skip_unavailable(op: str, impl: str, device: str) -> None:
    problem = impl != "published" and unavailable(op, impl, device)
    if problem:
        pytest.skip(problem)


class Audio:
    """Shapes of the audio stream: 8 x 64 tokens, or a quarter of them at toy size."""

    def __init__(self, full: bool, device: str) -> None:
        self.batch = 64 if full else 8
        self.grid = (8, 64) if full else (8, 16)
        self.tokens = self.grid[0] * self.grid[1]
        self.keep = self.tokens // 4
        self.dim = 768 if full else 192
        self.ids = torch.arange(self.batch, device=device)
        self.noise = torch.rand(self.batch, self.tokens, device=device)
        self.plan = kernels.complementary_masks(self.ids, self.grid, 0.75, noise=self.noise)
        self.views = published.complementary_masks(self.noise, self.keep, VIEWS)


@pytest.fixture
def audio(full: bool, device: str) -> Audio:
    return Audio(full, device)


@providers("complementary_masks")
def test_masks(impl, audio, device, measure):
    skip_unavailable("complementary_masks", impl, device)

    def published_way():
        noise = torch.rand(audio.batch, audio.tokens, device=device)
        return published.complementary_masks(noise, audio.keep, VIEWS)[1].mask.mean()

    def ours():
        plan = kernels.complementary_masks(audio.ids, audio.grid, 0.75, impl=impl)
        # Everything the published way makes, for both views.
        views = [(plan.ids_keep(v), plan.ids_restore(v), plan.mask(v)) for v in range(VIEWS)]
        return views[1][2].mean()

    expected = torch.tensor(0.75, device=device)
    forward = published_way if impl == "published" else ours
    measure(f"masks B={audio.batch} L={audio.tokens}", impl, forward, expected=expected)


@providers("gather_tokens")
def test_gather_tokens(impl, audio, device, measure):
    skip_unavailable("gather_tokens", impl, device)
    x = torch.randn(audio.batch, audio.tokens, audio.dim, device=device, requires_grad=True)

    def published_way():
        return torch.cat([published.gather_tokens(x, view.ids_keep) for view in audio.views])

    def ours():
        return kernels.gather_tokens(x, audio.plan, impl=impl)

    forward = published_way if impl == "published" else ours
    group = f"gather_tokens B={audio.batch} L={audio.tokens} D={audio.dim}"
    measure(group, impl, forward, (x,), expected=published_way())


@providers("embed_visible_patches")
def test_embed_visible_patches(impl, audio, device, measure):
    skip_unavailable("embed_visible_patches", impl, device)
    fbank = torch.randn(audio.batch, audio.grid[1] * 16, 128, device=device)
    weight = (torch.randn(audio.dim, 1, 16, 16, device=device) / 16).requires_grad_()
    bias = torch.randn(audio.dim, device=device, requires_grad=True)
    pos = torch.randn(audio.tokens, audio.dim, device=device)

    def published_way():
        images = fbank.unsqueeze(1).transpose(2, 3)
        return published.embed_visible_patches(images, weight, bias, pos, audio.views)

    def ours():
        return kernels.embed_visible_patches(
            fbank, weight, bias, pos, audio.plan, patch_size=16, impl=impl
        )

    forward = published_way if impl == "published" else ours
    group = f"embed_visible_patches B={audio.batch} L={audio.tokens} D={audio.dim}"
    measure(group, impl, forward, (weight, bias), expected=published_way())


@providers("assemble_decoder_input")
def test_assemble_decoder_input(impl, audio, device, measure):
    skip_unavailable("assemble_decoder_input", impl, device)
    dim = audio.dim * 2 // 3
    x = torch.randn(VIEWS * audio.batch, audio.keep, dim, device=device, requires_grad=True)
    mask_token = torch.randn(1, 1, dim, device=device, requires_grad=True)
    pos = torch.randn(audio.tokens, dim, device=device)

    def published_way():
        return published.assemble_decoder_input(x, audio.views, mask_token, pos)

    def ours():
        return kernels.assemble_decoder_input(x, [audio.plan], mask_token, pos, impl=impl)

    forward = published_way if impl == "published" else ours
    group = f"assemble_decoder_input B={audio.batch} L={audio.tokens} D={dim}"
    measure(group, impl, forward, (x, mask_token), expected=published_way())


@providers("masked_reconstruction_loss")
def test_masked_reconstruction_loss(impl, audio, device, measure):
    skip_unavailable("masked_reconstruction_loss", impl, device)
    fbank = torch.randn(audio.batch, audio.grid[1] * 16, 128, device=device)
    pred = torch.randn(VIEWS * audio.batch, audio.tokens, 256, device=device, requires_grad=True)

    def published_way():
        images = fbank.unsqueeze(1).transpose(2, 3)
        return published.masked_reconstruction_loss(pred, images, audio.views, 16)

    def ours():
        return kernels.masked_reconstruction_loss(pred, fbank, audio.plan, patch_size=16, impl=impl)

    forward = published_way if impl == "published" else ours
    group = f"masked_reconstruction_loss B={audio.batch} L={audio.tokens}"
    measure(group, impl, forward, (pred,), expected=published_way())


@providers("info_nce")
def test_info_nce(impl, full, device, measure):
    skip_unavailable("info_nce", impl, device)
    batch, dim = (4096, 768) if full else (256, 192)
    audio, video = (torch.randn(batch, dim, device=device, requires_grad=True) for _ in "av")

    def published_way():
        return published.info_nce(audio, video)

    def ours():
        return kernels.info_nce(audio, video, impl=impl)

    forward = published_way if impl == "published" else ours
    measure(f"info_nce B={batch} D={dim}", impl, forward, (audio, video), published_way())


@providers("distillation_loss")
def test_distillation_loss(impl, full, device, measure):
    skip_unavailable("distillation_loss", impl, device)
    batch, dim = (1024, 768) if full else (64, 192)
    p, q = (torch.randn(batch, dim, device=device, requires_grad=True) for _ in "pq")

    def published_way():
        return published.distillation_loss(p, q)

    def ours():
        return kernels.distillation_loss(
            p, q, divergence="js", distribution="batch_shift", impl=impl
        )

    forward = published_way if impl == "published" else ours
    measure(f"distillation_loss B={batch} D={dim}", impl, forward, (p, q), published_way())


@pytest.mark.parametrize("impl", ("published", "sdpa", "torch", "auto"))
@pytest.mark.parametrize("length, head_dim", [(177, 64), (708, 32)])
def test_attention(impl, length, head_dim, full, device, measure):
    batch, heads = (8, 12) if full else (2, 4)
    shape = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in "qkv")

    def published_way():
        return published.attention(q, k, v)

    def ours():
        return kernels.attention(q, k, v, impl=impl)

    forward = published_way if impl == "published" else ours
    group = f"attention B={batch} H={heads} L={length} d={head_dim}"
    measure(group, impl, forward, (q, k, v), published_way())
