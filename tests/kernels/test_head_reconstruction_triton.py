"""The head with its loss in Triton: errors within the usual budget of the separate ops."""

import pytest
import torch
import torch.nn.functional as F

from kdcmae_fast.kernels import complementary_masks, masked_head_reconstruction_loss
from kdcmae_fast.kernels.reconstruction import reference
from kdcmae_fast.kernels.tokens import patch_grid, patchify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "audio": ((2, 16, 12), (4, 8)),
    "image": ((2, 3, 10, 12), (5, 4)),
    "video": ((2, 3, 4, 3, 6), (2, 3, 3)),
    "wide": ((1, 3, 16, 20), (8, 10)),  # several tiles of columns, the last one short
}
STATISTICS = {"pixel_mean": (0.4, 0.45, 0.5), "pixel_std": (0.2, 0.25, 0.3)}
DIM = 37  # two steps of the product, the last one short

pytestmark = [
    pytest.mark.triton,
    # Triton's interpreter turns the bounds of a loop into ints in a way that NumPy deprecates.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(device, layout, dtype, order="tokens", pixel_dtype=torch.float32, views=2):
    """pixels, patch_size, plan, (x, weight, bias)."""
    shape, patch = LAYOUTS[layout]
    pixels = torch.rand(shape)
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels.to(pixel_dtype)
    grid = patch_grid(pixels, patch)
    ids = torch.arange(shape[0])
    plan = complementary_masks(ids, grid, 0.7, num_views=views, impl="torch").to(device)
    length = plan.num_tokens - (plan.len_keep if order == "masked" else 0)
    values = patchify(pixels, patch).shape[2]
    x, weight = torch.randn(views * shape[0], length, DIM), torch.randn(values, DIM) / DIM**0.5
    operands = tuple(each.to(device, dtype) for each in (x, weight, torch.randn(values)))
    return pixels.to(device), patch, plan, operands


def forms(pixels, patch, plan, device, norm_pix=True, masked_only=False, grad_in_forward=False):
    """The op, and the separate ones in plain torch; per row, or the mean for grad_in_forward."""
    given = {name: values[: 1 if pixels.dim() == 3 else 3] for name, values in STATISTICS.items()}

    def fast(*operands):
        return masked_head_reconstruction_loss(
            *operands, pixels, plan, patch_size=patch, norm_pix=norm_pix, impl="triton",
            reduction="mean" if grad_in_forward else "none", grad_in_forward=grad_in_forward,
            **given,
        )  # fmt: skip

    def plain(*operands):
        statistics = None
        if pixels.dtype == torch.uint8:
            wide = torch.promote_types(operands[0].dtype, torch.float32)
            statistics = tuple(
                torch.tensor(values, dtype=wide, device=device) for values in given.values()
            )
        rows = reference.masked_reconstruction_loss(
            F.linear(*operands), pixels, plan, patch, norm_pix, statistics, masked_only
        )
        return rows.mean() if grad_in_forward else rows

    return fast, plain


@pytest.mark.parametrize("norm_pix", (True, False))
@pytest.mark.parametrize("order", ("tokens", "masked"))
@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_budget(layout, pixel_dtype, order, norm_pix, triton_device, three_way):
    pixels, patch, plan, operands = case(triton_device, layout, torch.float32, order, pixel_dtype)
    own = forms(pixels, patch, plan, triton_device, norm_pix, order == "masked")
    three_way(*own, operands)


@pytest.mark.parametrize("grad_in_forward", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.bfloat16), ids=str)
def test_dtypes(dtype, pixel_dtype, grad_in_forward, triton_device, three_way):
    pixels, patch, plan, operands = case(triton_device, "image", dtype, pixel_dtype=pixel_dtype)
    own = forms(pixels, patch, plan, triton_device, grad_in_forward=grad_in_forward)
    three_way(*own, operands)


@pytest.mark.parametrize("spread", (1.0, 1e-3, 1e-5))
@pytest.mark.parametrize("dark", (False, True))
def test_small_variance_on_a_large_offset(spread, dark, triton_device, within_budget):
    """dark: the first pixel, from which all others are counted, is far away from them."""
    _, patch, plan, operands = case(triton_device, "wide", torch.float32)
    pixels = 1 + spread * torch.randn(1, 3, 16, 20)
    if dark:
        pixels[:, :, ::8, ::10] = 0
    pixels = pixels.to(triton_device)
    fast, plain = forms(pixels, patch, plan, triton_device)
    _, exact = forms(pixels.double(), patch, plan, triton_device)
    exact = exact(*(each.double() for each in operands))
    within_budget(fast(*operands), plain(*operands), exact)


def test_small_block_of_gradients(triton_device, monkeypatch, value_and_grads):
    """Several blocks of patches, the last one short, as one."""
    from kdcmae_fast.kernels.reconstruction import kernel_head

    pixels, patch, plan, operands = case(triton_device, "audio", torch.float32, views=3)
    fast, _ = forms(pixels, patch, plan, triton_device)
    whole = value_and_grads(fast, operands)
    monkeypatch.setattr(kernel_head, "BLOCK_ELEMENTS", 1)
    assert 3 * 2 * (plan.num_tokens - plan.len_keep) % 32 != 0
    torch.testing.assert_close(value_and_grads(fast, operands), whole)


def test_visible_tokens_and_strides(triton_device, value_and_grads):
    pixels, patch, plan, (x, weight, bias) = case(triton_device, "image", torch.float32)
    fast, _ = forms(pixels, patch, plan, triton_device)
    clean = value_and_grads(fast, (x, weight, bias))
    poisoned = x.clone()
    for view, own in enumerate(poisoned.chunk(2)):
        own[torch.arange(2, device=triton_device).unsqueeze(1), plan.ids_keep(view)] = torch.nan
    sliced = torch.cat([poisoned] * 3, dim=1)[:, x.shape[1] : 2 * x.shape[1]]
    transposed = poisoned.transpose(1, 2).contiguous().transpose(1, 2)
    for rows in (poisoned, sliced, transposed):
        results = value_and_grads(fast, (rows, weight, bias))
        assert all(torch.equal(*pair) for pair in zip(results, clean, strict=True))


def test_without_bias_and_float64_pixels(triton_device):
    pixels, patch, plan, (x, weight, _) = case(triton_device, "audio", torch.float32, "masked")
    losses = [
        masked_head_reconstruction_loss(x, weight, None, pixels, plan, patch_size=patch, impl=impl)
        for impl in ("triton", "torch")
    ]
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match="impl='triton' of .* has no float64"):
        masked_head_reconstruction_loss(
            x, weight, None, pixels.double(), plan, patch_size=patch, impl="triton"
        )


@pytest.mark.parametrize("grad_in_forward", (False, True))
def test_empty_batch(grad_in_forward, triton_device):
    _, _, plan, (x, weight, bias) = case(triton_device, "audio", torch.float32)
    plan = plan._replace(token_of_rank=plan[0][:0], rank_of_token=plan[1][:0])
    operands = [each.detach().requires_grad_() for each in (x[:0], weight, bias)]
    loss = masked_head_reconstruction_loss(
        *operands, torch.zeros(0, 16, 12, device=triton_device), plan, patch_size=(4, 8),
        impl="triton", grad_in_forward=grad_in_forward,
    )  # fmt: skip
    loss.backward()
    assert loss == 0 and all(each.grad.abs().sum() == 0 for each in operands)


@pytest.mark.parametrize("masked_only", (False, True))
def test_opcheck(masked_only, triton_device):
    order = "masked" if masked_only else "tokens"
    pixels, patch, plan, operands = case(triton_device, "image", torch.float32, order, torch.uint8)
    statistics = [torch.tensor(values, device=triton_device) for values in STATISTICS.values()]
    static = (plan.len_keep, 2, patch, not masked_only, masked_only)
    arguments = (*operands, pixels, *statistics, *plan[:2], *static)
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(ops.head_reconstruction_loss_triton.default, arguments)
    torch.library.opcheck(ops.head_reconstruction_loss_and_gradients_triton.default, arguments)
    _, mean, rstd = ops.head_reconstruction_loss_triton(*arguments)
    row_weight = torch.randn(operands[0].shape[0], device=triton_device)
    operator = ops.head_reconstruction_loss_backward_triton.default
    torch.library.opcheck(operator, (row_weight, mean, rstd, *arguments))
