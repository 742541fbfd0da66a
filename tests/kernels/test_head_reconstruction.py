"""The reconstruction loss together with the head that predicts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.kernels import (
    MaskPlan,
    complementary_masks,
    masked_head_reconstruction_loss,
    masked_reconstruction_loss,
)
from kdcmae_fast.kernels.reconstruction import head_lean, reference
from kdcmae_fast.kernels.tokens import patch_grid, patchify

OP = "masked_head_reconstruction_loss"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# pixels, patch_size
LAYOUTS = {
    "audio": ((3, 48, 12), (4, 8)),
    "image": ((3, 3, 15, 28), (5, 4)),
    "video": ((2, 3, 4, 6, 9), (2, 3, 3)),
}
STATISTICS = {"pixel_mean": (0.4, 0.45, 0.5), "pixel_std": (0.2, 0.25, 0.3)}
DIM = 19


@pytest.fixture(params=(False, True), ids=("recompute", "grad_in_forward"))
def grad_in_forward(request) -> bool:
    return request.param


def make_plan(batch: int, grid: tuple[int, ...], ratio: float = 0.7, views: int = 2) -> MaskPlan:
    return complementary_masks(torch.arange(batch), grid, ratio, num_views=views)


def case(
    layout: str, dtype: torch.dtype, order: str = "tokens", pixel_dtype=torch.float64, dim=DIM
):
    """pixels, patch_size, plan, (x, weight, bias)."""
    shape, patch = LAYOUTS[layout]
    pixels = torch.rand(shape)
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels.to(pixel_dtype)
    plan = make_plan(shape[0], patch_grid(pixels, patch))
    length = plan.num_tokens - (plan.len_keep if order == "masked" else 0)
    return (
        pixels,
        patch,
        plan,
        leaves(2 * shape[0], length, patchify(pixels, patch).shape[2], dim, dtype),
    )


def leaves(rows: int, length: int, values: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias; predictions have a variance of about 1."""
    x, weight = torch.randn(rows, length, dim), torch.randn(values, dim) / dim**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(values).to(dtype)


def separate(x, weight, bias, pixels, plan, **options) -> Tensor:
    """The two ops that the one stands for."""
    return masked_reconstruction_loss(F.linear(x, weight, bias), pixels, plan, **options)


@pytest.mark.parametrize("norm_pix", (True, False))
@pytest.mark.parametrize("order", ("tokens", "masked"))
@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("audio", "image"))
def test_error_budget(layout, dtype, pixel_dtype, order, norm_pix, three_way, poison_empty):
    pixels, patch, plan, operands = case(layout, dtype, order, pixel_dtype)
    given = {name: values[: 1 if layout == "audio" else 3] for name, values in STATISTICS.items()}

    def fast(*operands):
        return masked_head_reconstruction_loss(
            *operands, pixels, plan, patch_size=patch, norm_pix=norm_pix, reduction="none", **given
        )

    def plain(*operands):
        wide = torch.promote_types(operands[0].dtype, torch.float32)
        statistics = None
        if pixel_dtype == torch.uint8:
            statistics = tuple(torch.tensor(values, dtype=wide) for values in given.values())
        return reference.masked_reconstruction_loss(
            F.linear(*operands), pixels, plan, patch, norm_pix, statistics, order == "masked"
        )

    three_way(fast, plain, operands)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_error_budget_with_gradients_from_the_forward_pass(dtype, three_way):
    pixels, patch, plan, operands = case("image", dtype, "tokens", torch.uint8)
    statistics = tuple(torch.tensor(values).double() for values in STATISTICS.values())

    def plain(*operands):
        own = tuple(
            each.to(torch.promote_types(operands[0].dtype, torch.float32)) for each in statistics
        )
        return reference.masked_reconstruction_loss(
            F.linear(*operands), pixels, plan, patch, True, own, False
        ).mean()

    three_way(
        lambda *operands: masked_head_reconstruction_loss(
            *operands, pixels, plan, patch_size=patch, grad_in_forward=True, **STATISTICS
        ),
        plain,
        operands,
    )


@pytest.mark.parametrize("order", ("tokens", "masked"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, order, grad_in_forward):
    pixels, patch, plan, operands = case(layout, torch.float64, order, dim=5)
    reductions = ("mean",) if grad_in_forward else ("mean", "none")
    operands = tuple(each.requires_grad_() for each in operands)
    for reduction in reductions:
        assert torch.autograd.gradcheck(
            lambda *operands, reduction=reduction: masked_head_reconstruction_loss(
                *operands, pixels, plan, patch_size=patch, reduction=reduction,
                grad_in_forward=grad_in_forward,
            ),
            operands,
            fast_mode=True,
        )  # fmt: skip


@pytest.mark.parametrize("batch", (1, 3, 65))
@pytest.mark.parametrize("dim", (96, 1023))
def test_blocks_of_samples(batch, dim, monkeypatch, impl, value_and_grads, grad_in_forward):
    """Several blocks, the last one smaller, as one. (C++ takes 2^20 predictions at once.)"""
    monkeypatch.setattr(head_lean, "BLOCK_ELEMENTS", 4 * 12 * 64)
    pixels, plan = torch.rand(batch, 48, 16), make_plan(batch, (2, 6), 0.75, 3)
    operands = leaves(3 * batch, 12, 64, dim, torch.float64)
    options = {"patch_size": 8, "grad_in_forward": grad_in_forward}
    results = value_and_grads(
        lambda *own: masked_head_reconstruction_loss(*own, pixels, plan, **options), operands
    )
    expected = value_and_grads(lambda *own: separate(*own, pixels, plan, patch_size=8), operands)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-12)


def test_blocks_in_cpp(impl, value_and_grads):
    if impl != "cpp":
        pytest.skip("block size of the C++ source")
    pixels, plan = torch.rand(300, 64, 64), make_plan(300, (4, 4), 0.75, 2)
    operands = leaves(600, 16, 256, 8, torch.float64)
    assert 2 * 300 * 12 * 256 > 1.5 * 2**20
    results = value_and_grads(
        lambda *own: masked_head_reconstruction_loss(*own, pixels, plan, patch_size=16), operands
    )
    expected = value_and_grads(lambda *own: separate(*own, pixels, plan, patch_size=16), operands)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", (1.0, 1e-3, 1e-5))
def test_small_variance_on_a_large_offset(spread, within_budget):
    pixels, plan = 1 + spread * torch.randn(3, 3, 15, 28), make_plan(3, (3, 7))
    x, weight, bias = leaves(6, 21, 60, DIM, torch.float32)
    rows = masked_head_reconstruction_loss(
        x, weight, bias, pixels, plan, patch_size=(5, 4), reduction="none"
    )
    arguments = (plan, (5, 4), True, None, False)
    eager = reference.masked_reconstruction_loss(F.linear(x, weight, bias), pixels, *arguments)
    pred = F.linear(x.double(), weight.double(), bias.double())
    exact = reference.masked_reconstruction_loss(pred, pixels.double(), *arguments)
    within_budget(rows, eager, exact)


def test_visible_tokens_do_not_matter(grad_in_forward):
    pixels, patch, plan, (x, weight, bias) = case("image", torch.float32, pixel_dtype=torch.float32)
    options = {"patch_size": patch, "grad_in_forward": grad_in_forward}
    poisoned = x.clone()
    for view, own in enumerate(poisoned.chunk(2)):
        own[torch.arange(3).unsqueeze(1), plan.ids_keep(view)] = torch.nan
    results = []
    for rows in (x, poisoned):
        operands = [each.detach().requires_grad_() for each in (rows, weight, bias)]
        loss = masked_head_reconstruction_loss(*operands, pixels, plan, **options)
        results.append([loss, *torch.autograd.grad(loss, operands)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    for view, own in enumerate(results[1][1].chunk(2)):
        assert own[torch.arange(3).unsqueeze(1), plan.ids_keep(view)].abs().sum() == 0


@pytest.mark.parametrize("kind", ("transposed", "sliced", "expanded", "offset", "weight", "pixels"))
@pytest.mark.parametrize("order", ("tokens", "masked"))
def test_strides(kind, order):
    pixels, patch, plan, (x, weight, bias) = case("image", torch.float32, order, torch.float32)
    other, other_weight, other_pixels = x, weight, pixels
    if kind == "transposed":
        other = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "sliced":  # as a segment of a decoder's sequence
        other = torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]]
    elif kind == "expanded":
        other = x = x[:1].expand_as(x)
    elif kind == "offset":
        other = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    elif kind == "weight":
        other_weight = weight.t().contiguous().t()
    else:
        other_pixels = pixels.to(memory_format=torch.channels_last)
    results = []
    for rows, head, image in (
        (x.contiguous(), weight, pixels),
        (other, other_weight, other_pixels),
    ):
        operands = [each.detach().requires_grad_() for each in (rows, head, bias)]
        loss = masked_head_reconstruction_loss(*operands, image, plan, patch_size=patch)
        results.append([loss, *torch.autograd.grad(loss, operands)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("ratio, views", [(0.7, 1), (0.75, 3), (0.8, 4), (0.5, 2), (1.0, 1)])
def test_masked_rows_equal_all_rows(ratio, views):
    pixels, plan = torch.rand(5, 32, 24), make_plan(5, (3, 4), ratio, views)
    x, weight, bias = leaves(views * 5, 12, 64, DIM, torch.float64)
    sample = torch.arange(5).unsqueeze(1)
    masked = torch.cat(
        [own[sample, plan.ids_masked(view)] for view, own in enumerate(x.chunk(views))]
    )
    losses = [
        masked_head_reconstruction_loss(
            rows, weight, bias, pixels, plan, patch_size=8, row_order=order
        )
        for rows, order in ((x, "tokens"), (masked, "masked"))
    ]
    torch.testing.assert_close(*losses)


def test_gradients_survive_half_precision():
    """Weights of 1 / (rows * masked * P) times an upstream gradient of 1e-4: below 2^-24."""
    pixels, patch, plan, operands = case("image", torch.float16, pixel_dtype=torch.float32)
    x, weight, bias = (each.requires_grad_() for each in operands)
    loss = masked_head_reconstruction_loss(x, weight, bias.float(), pixels, plan, patch_size=patch)
    (small,) = torch.autograd.grad(loss * 1e-4, bias, retain_graph=True)
    (large,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(small.float() * 1e4, large.float(), rtol=0.05, atol=2e-3)
    assert small.count_nonzero() == small.numel()


def test_pixels_may_require_grad():
    pixels, patch, plan, operands = case("image", torch.float64, "masked")
    assert torch.autograd.gradcheck(
        lambda pixels: masked_head_reconstruction_loss(*operands, pixels, plan, patch_size=patch),
        (pixels.requires_grad_(),),
        fast_mode=True,
    )


@pytest.mark.large
def test_past_int32():
    """2.2e9 values of x in half precision, as many uint8 pixels, few patches masked; 7 GB."""
    batch = 16500
    plan = make_plan(batch, (8, 64), 0.02, views=1)
    pixels = torch.zeros(batch, 1024, 128, dtype=torch.uint8)
    pixels[-1] = torch.randint(0, 255, (1024, 128))
    x = torch.zeros(batch, 512, 256, dtype=torch.float16)
    assert x.numel() > 2**31
    x[-1] = torch.randn(512, 256)
    weight, bias = torch.randn(256, 256).half() / 16, torch.randn(256).half()
    options = {"patch_size": 16, "reduction": "none"}
    rows = masked_head_reconstruction_loss(x, weight, bias, pixels, plan, **options)
    last = plan._replace(token_of_rank=plan[0][-1:], rank_of_token=plan[1][-1:])
    expected = masked_head_reconstruction_loss(x[-1:], weight, bias, pixels[-1:], last, **options)
    torch.testing.assert_close(rows[-1:], expected)
