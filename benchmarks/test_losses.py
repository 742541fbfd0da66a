"""Reconstruction, contrastive and distillation losses."""

import bench_costs as costs
import bench_peers as peers
import published_ops as published
import pytest
import torch
import torch.nn.functional as F
from bench_providers import providers
from bench_streams import VIEWS, Stream

from kdcmae_fast import kernels

TAU = 0.05


@providers("masked_reconstruction_loss")
@pytest.mark.parametrize("name", ("audio", "image"))
def test_masked_reconstruction_loss(name, provider, full, device, choose, measure):
    stream = Stream(name, full, device)
    pixels = stream.pixels()
    shape = (VIEWS * stream.batch, stream.tokens, stream.values)
    pred = torch.randn(shape, device=device, requires_grad=True)

    def published_way():
        images = stream.images(pixels)
        return published.masked_reconstruction_loss(pred, images, stream.views, 16)

    def ours(impl):
        return lambda: kernels.masked_reconstruction_loss(
            pred, pixels, stream.plan, patch_size=16, impl=impl
        )

    forward = choose("masked_reconstruction_loss", provider, published=published_way, ours=ours)
    group = f"masked_reconstruction_loss {stream.shape}"
    cost = costs.reconstruction(stream)
    measure(group, provider, forward, (pred,), reference=published_way, cost=cost)


@providers("info_nce", "open_clip", "cut_cross_entropy")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("symmetric", (False, True), ids=("one-sided", "symmetric"))
@pytest.mark.parametrize("batch", (64, 1024, 4096))
def test_info_nce(batch, symmetric, dtype, provider, full, device, choose, measure):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("on a CPU 16-bit operands are widened first; there is nothing to gain")
    batch, dim = (batch, 768) if full else (batch // 16, 192)
    audio, video = (torch.randn(batch, dim, device=device).to(dtype).requires_grad_() for _ in "av")

    def published_way():
        return published.info_nce(audio, video, TAU, symmetric)

    def ours(impl):
        return lambda: kernels.info_nce(
            audio, video, temperature=TAU, symmetric=symmetric, impl=impl
        )

    def open_clip():
        if not symmetric:
            pytest.skip("open_clip's ClipLoss is symmetric")
        loss = peers.open_clip_loss().ClipLoss()
        return lambda: loss(F.normalize(video, dim=-1), F.normalize(audio, dim=-1), 1 / TAU)

    def cut_cross_entropy():
        if symmetric or dtype == torch.float32:
            pytest.skip("cut_cross_entropy is one-sided and takes 16-bit operands")
        linear_cross_entropy = peers.cut_cross_entropy().linear_cross_entropy
        labels = torch.arange(batch, device=device)
        return lambda: linear_cross_entropy(
            F.normalize(video, dim=-1) / TAU, F.normalize(audio, dim=-1), labels
        )

    forward = choose(
        "info_nce", provider, published=published_way, ours=ours, open_clip=open_clip,
        cut_cross_entropy=cut_cross_entropy,
    )  # fmt: skip
    kind = "info_nce symmetric" if symmetric else "info_nce"
    suffix = "" if dtype == torch.float32 else " bfloat16"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    measure(
        f"{kind} B={batch} D={dim}{suffix}", provider, forward, (audio, video),
        tolerance=tolerance, reference=published_way,
        cost=costs.info_nce(batch, dim, audio.element_size()),
    )  # fmt: skip


@providers("distillation_loss")
@pytest.mark.parametrize("batch", (64, 1024))
def test_distillation_loss_released(batch, provider, full, device, choose, measure):
    """Jensen-Shannon of rows shifted by the batch minimum: the released KDC-MAE code."""
    batch, dim = (batch, 768) if full else (batch // 16, 192)
    p, q = (torch.randn(batch, dim, device=device, requires_grad=True) for _ in "pq")

    def published_way():
        return published.distillation_loss(p, q)

    def ours(impl):
        return lambda: kernels.distillation_loss(
            p, q, divergence="js", distribution="batch_shift", impl=impl
        )

    forward = choose("distillation_loss", provider, published=published_way, ours=ours)
    group = f"distillation_loss B={batch} D={dim}"
    cost = costs.rows(batch, dim)
    measure(group, provider, forward, (p, q), reference=published_way, cost=cost)


@providers("distillation_loss", "liger")
@pytest.mark.parametrize("batch", (64, 1024))
def test_distillation_loss_of_a_fixed_teacher(batch, provider, full, device, choose, measure):
    """KL(softmax teacher, softmax student), the student's gradient only."""
    batch, dim = (batch, 768) if full else (batch // 16, 192)
    teacher = torch.randn(batch, dim, device=device)
    student = torch.randn(batch, dim, device=device, requires_grad=True)

    def published_way():
        divergence = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none")
        return divergence.sum(-1).mean()

    def ours(impl):
        return lambda: kernels.distillation_loss(
            teacher, student, divergence="kl_12", stop_gradient=True, impl=impl
        )

    def liger():
        loss = peers.liger().LigerKLDIVLoss(reduction="batchmean")
        return lambda: loss(student.log_softmax(-1), teacher.softmax(-1))

    forward = choose("distillation_loss", provider, published=published_way, ours=ours, liger=liger)
    group = f"distillation_loss fixed teacher B={batch} D={dim}"
    cost = costs.rows(batch, dim, gradients=1)
    measure(group, provider, forward, (student,), reference=published_way, cost=cost)
