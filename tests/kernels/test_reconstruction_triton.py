"""kernels/reconstruction in Triton: errors within the usual budget of the torch form."""

import pytest
import torch

from kdcmae_fast.kernels import complementary_masks, masked_reconstruction_loss
from kdcmae_fast.kernels.reconstruction import reference
from kdcmae_fast.kernels.tokens import patch_grid, patchify

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "audio": ((2, 16, 12), (4, 8)),
    "image": ((2, 3, 10, 12), (5, 4)),
    "video": ((2, 3, 4, 3, 6), (2, 3, 3)),
}
STATISTICS = {"pixel_mean": (0.4, 0.45, 0.5), "pixel_std": (0.2, 0.25, 0.3)}

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(device, layout, dtype, order="tokens", pixel_dtype=torch.float32, views=2):
    """pixels, patch_size, plan, pred."""
    shape, patch = LAYOUTS[layout]
    pixels = torch.rand(shape)
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels.to(pixel_dtype)
    ids = torch.arange(shape[0])
    grid = patch_grid(pixels, patch)
    plan = complementary_masks(ids, grid, 0.7, num_views=views, impl="torch").to(device)
    length = plan.num_tokens - (plan.len_keep if order == "masked" else 0)
    pred = torch.randn(views * shape[0], length, patchify(pixels, patch).shape[2])
    return pixels.to(device), patch, plan, pred.to(device, dtype)


@pytest.mark.parametrize("norm_pix", (True, False))
@pytest.mark.parametrize("order", ("tokens", "masked"))
@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_budget(layout, pixel_dtype, order, norm_pix, triton_device, three_way):
    pixels, patch, plan, pred = case(triton_device, layout, torch.float32, order, pixel_dtype)
    given = {name: values[: 1 if layout == "audio" else 3] for name, values in STATISTICS.items()}

    def fast(pred):
        return masked_reconstruction_loss(
            pred, pixels, plan, patch_size=patch, norm_pix=norm_pix, reduction="none",
            impl="triton", **given,
        )  # fmt: skip

    def plain(pred):
        statistics = None
        if pixel_dtype == torch.uint8:
            wide = torch.promote_types(pred.dtype, torch.float32)
            statistics = tuple(
                torch.tensor(values, dtype=wide, device=triton_device) for values in given.values()
            )
        return reference.masked_reconstruction_loss(
            pred, pixels, plan, patch, norm_pix, statistics, order == "masked"
        )

    three_way(fast, plain, (pred,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pixel_dtype", (torch.bfloat16, torch.float64), ids=str)
def test_dtypes(dtype, pixel_dtype, triton_device, three_way):
    pixels, patch, plan, pred = case(triton_device, "image", dtype, pixel_dtype=pixel_dtype)
    options = {"patch_size": patch, "reduction": "none", "impl": "triton"}
    three_way(
        lambda pred: masked_reconstruction_loss(pred, pixels, plan, **options),
        lambda pred: reference.masked_reconstruction_loss(
            pred, pixels, plan, patch, True, None, False
        ),
        (pred,),
    )


@pytest.mark.parametrize("spread", (1.0, 1e-3, 1e-5))
def test_small_variance_on_a_large_offset(spread, triton_device, within_budget):
    _, patch, plan, pred = case(triton_device, "image", torch.float32)
    pixels = 1 + spread * torch.randn(2, 3, 10, 12, device=triton_device)
    rows = masked_reconstruction_loss(
        pred, pixels, plan, patch_size=patch, reduction="none", impl="triton"
    )
    arguments = (plan, patch, True, None, False)
    eager = reference.masked_reconstruction_loss(pred, pixels, *arguments)
    exact = reference.masked_reconstruction_loss(pred.double(), pixels.double(), *arguments)
    within_budget(rows, eager, exact)


@pytest.mark.parametrize("views", (1, 3))
def test_numbers_of_views(views, triton_device):
    pixels, patch, plan, pred = case(triton_device, "audio", torch.float32, views=views)
    losses = [
        masked_reconstruction_loss(pred, pixels, plan, patch_size=patch, impl=impl)
        for impl in ("triton", "torch")
    ]
    torch.testing.assert_close(*losses)


def test_nan_in_visible_patches_and_strided_predictions(triton_device):
    pixels, patch, plan, pred = case(triton_device, "image", torch.float32)
    options = {"patch_size": patch, "reduction": "none", "impl": "triton"}
    clean = masked_reconstruction_loss(pred, pixels, plan, **options)
    poisoned = torch.cat([pred, pred], dim=2)[:, :, : pred.shape[2]]
    for view, own in enumerate(poisoned.chunk(2)):
        sample = torch.arange(2, device=triton_device).unsqueeze(1)
        own[sample, plan.ids_keep(view)] = torch.nan
    poisoned.requires_grad_()
    rows = masked_reconstruction_loss(poisoned, pixels, plan, **options)
    assert torch.equal(rows, clean)
    (gradient,) = torch.autograd.grad(rows.sum(), poisoned)
    assert not gradient.isnan().any()


def test_same_bits_every_time(triton_device):
    pixels, patch, plan, pred = case(triton_device, "audio", torch.float32)
    pred.requires_grad_()
    results = []
    for _ in range(2):
        loss = masked_reconstruction_loss(pred, pixels, plan, patch_size=patch, impl="triton")
        results.append([loss, torch.autograd.grad(loss, pred)[0]])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_empty_batch(triton_device):
    _, _, plan, _ = case(triton_device, "audio", torch.float32)
    empty = plan._replace(
        token_of_rank=plan.token_of_rank[:0], rank_of_token=plan.rank_of_token[:0]
    )
    pred = torch.zeros(0, plan.num_tokens, 32, requires_grad=True, device=triton_device)
    pixels = torch.zeros(0, 16, 12, device=triton_device)
    rows = masked_reconstruction_loss(
        pred, pixels, empty, patch_size=(4, 8), reduction="none", impl="triton"
    )
    rows.sum().backward()
    assert rows.shape == (0,) and pred.grad.shape == pred.shape


@pytest.mark.parametrize("masked_only", (False, True))
def test_opcheck(masked_only, triton_device):
    order = "masked" if masked_only else "tokens"
    pixels, patch, plan, pred = case(triton_device, "image", torch.float32, order, torch.uint8)
    statistics = [torch.tensor(values, device=triton_device) for values in STATISTICS.values()]
    static = (plan.rank_of_token, plan.len_keep, 2, patch, True, masked_only)
    arguments = (pred, pixels, *statistics, *static)
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.reconstruction_loss_triton.default, arguments)
    grad = torch.randn(4, device=triton_device)
    torch.library.opcheck(ops.reconstruction_loss_backward_triton.default, (grad, *arguments))
