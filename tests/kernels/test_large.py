"""More than 2^31 elements: offsets that wrap show only in the last sample. Up to 9 GB each.

On a GPU `pytest tests/kernels/test_large.py -m large -k triton`; everything else is on the CPU.
"""

from collections.abc import Iterator

import pytest
import torch

from kdcmae_fast.kernels import (
    MaskPlan,
    assemble_decoder_input,
    complementary_masks,
    distillation_loss,
    embed_visible_patches,
    gather_tokens,
    masked_reconstruction_loss,
)
from kdcmae_fast.kernels.common import unavailable

pytestmark = [pytest.mark.large, pytest.mark.usefixtures("impl")]


@pytest.fixture(params=("torch", "cpp", "triton"))
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What impl="auto" takes; new tensors are where it runs."""
    device = "cuda" if request.param == "triton" else "cpu"
    problem = unavailable("gather_tokens", request.param, device)
    if problem:
        pytest.skip(problem)
    monkeypatch.setenv("KDCMAE_IMPL", request.param)
    # Makes at::empty, too, hand out memory filled with NaN.
    torch.use_deterministic_algorithms(request.param == "cpp")
    with torch.device(device):
        yield request.param
    torch.use_deterministic_algorithms(False)


def make_plan(batch: int, grid: tuple[int, ...], ratio: float = 0.7, views: int = 2) -> MaskPlan:
    return complementary_masks(torch.arange(batch), grid, ratio, num_views=views)


def test_gather_past_int32():
    """2.2e9 elements forward (uint8), and backward (half precision: 4.4 GB)."""
    batch = 5700
    plan = make_plan(batch, (8, 64))
    x = torch.zeros(batch, 512, 768, dtype=torch.uint8)
    x[-1] = torch.randint(1, 255, (512, 768))
    y = gather_tokens(x, plan)
    assert torch.equal(y[-1], x[-1, plan.ids_keep(1)[-1]])
    del x, y
    x = torch.zeros(1, 512, 768, dtype=torch.float16, requires_grad=True).expand(batch, -1, -1)
    x.retain_grad()
    gather_tokens(x, plan).sum().backward()
    assert torch.equal(x.grad[-1, :, 0].bool(), (plan.mask(0) * plan.mask(1))[-1] == 0)


def test_assembly_past_int32():
    batch = 2980
    plans = [make_plan(batch, (8, 64), 0.75), make_plan(batch, (14, 14), 0.75)]
    x = torch.zeros(2 * batch, 177, 512, dtype=torch.float16)
    x[-1] = torch.randn(177, 512)
    mask_token, pos = torch.randn(512).half(), torch.zeros(708, 512).half()
    y = assemble_decoder_input(x, plans, mask_token, pos)
    assert y.numel() > 2**31
    last = [plan._replace(token_of_rank=plan[0][-1:], rank_of_token=plan[1][-1:]) for plan in plans]
    expected = assemble_decoder_input(x[[batch - 1, -1]], last, mask_token, pos)
    assert torch.equal(y[-1], expected[-1])


def test_past_int32():
    """2.2e9 predictions in half precision and as many uint8 pixels, few patches masked; 7 GB."""
    batch = 16500
    plan = make_plan(batch, (8, 64), 0.02, views=1)
    pixels = torch.zeros(batch, 1024, 128, dtype=torch.uint8)
    pixels[-1] = torch.randint(0, 255, (1024, 128))
    pred = torch.zeros(batch, 512, 256, dtype=torch.float16)
    assert pred.numel() > 2**31
    pred[-1] = torch.randn(512, 256)
    rows = masked_reconstruction_loss(pred, pixels, plan, patch_size=16, reduction="none")
    last = plan._replace(token_of_rank=plan[0][-1:], rank_of_token=plan[1][-1:])
    expected = masked_reconstruction_loss(
        pred[-1:], pixels[-1:], last, patch_size=16, reduction="none"
    )
    torch.testing.assert_close(rows[-1:], expected)


def test_embedding_past_int32():
    batch = 14500
    pixels = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8)
    pixels[-1] = torch.randint(0, 255, (3, 224, 224))
    assert pixels.numel() > 2**31
    weight, bias, pos = torch.randn(8, 3, 16, 16), torch.randn(8), torch.randn(196, 8)
    plan = make_plan(batch, (14, 14), 0.98, views=1)
    y = embed_visible_patches(pixels, weight, bias, pos, plan, patch_size=16)
    last = plan._replace(token_of_rank=plan[0][-1:], rank_of_token=plan[1][-1:])
    expected = embed_visible_patches(pixels[-1:], weight, bias, pos, last, patch_size=16)
    torch.testing.assert_close(y[-1:], expected)


def test_distillation_past_int32(impl):
    """2.2e9 features of each side in half precision: 9 GB."""
    if impl == "torch":
        pytest.skip("PyTorch's own ops make several float32 copies of 8.8 GB")
    batch, width = (264_000, 8191) if impl == "triton" else (2_200, 1_000_003)
    p = torch.zeros(batch, width, dtype=torch.float16)
    assert p.numel() > 2**31
    p[-1] = torch.randn(width)
    q = torch.randn(1, width).half().expand(batch, width)
    losses = distillation_loss(p, q, divergence="kl_12", reduction="none")
    expected = distillation_loss(p[-1:], q[:1], divergence="kl_12", reduction="none")
    assert torch.equal(losses[-1:], expected) and losses[0] != losses[-1]


def test_mask_plan_past_int32(impl):
    """2.1e9 tokens: 9 GB of plan."""
    if impl == "torch":
        pytest.skip("PyTorch's argsort returns int64: 17 GB")
    ids = torch.arange(2**31 // 512 + 100)
    plan = complementary_masks(ids, (8, 64), 0.75)
    last = complementary_masks(ids[-1:], (8, 64), 0.75)
    assert torch.equal(plan.token_of_rank[-1:], last.token_of_rank)
    assert torch.equal(plan.rank_of_token[-1:], last.rank_of_token)
