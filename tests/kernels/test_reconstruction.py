"""The masked reconstruction loss."""

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import MaskPlan, complementary_masks, masked_reconstruction_loss
from kdcmae_fast.kernels.reconstruction import reference
from kdcmae_fast.kernels.tokens import patch_grid, patchify, unpatchify

OP = "masked_reconstruction_loss"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# pixels, patch_size
LAYOUTS = {
    "audio": ((3, 48, 12), (4, 8)),
    "image": ((3, 3, 15, 28), (5, 4)),
    "video": ((2, 3, 4, 6, 9), (2, 3, 3)),
}
STATISTICS = {"pixel_mean": (0.4, 0.45, 0.5), "pixel_std": (0.2, 0.25, 0.3)}


def make_plan(batch: int, grid: tuple[int, ...], ratio: float = 0.7, views: int = 2) -> MaskPlan:
    return complementary_masks(torch.arange(batch), grid, ratio, num_views=views)


def case(
    layout: str, dtype: torch.dtype, order: str = "tokens", pixel_dtype=torch.float64, batch=None
):
    """pixels, patch_size, plan, pred."""
    shape, patch = LAYOUTS[layout]
    shape = shape if batch is None else (batch, *shape[1:])
    pixels = torch.rand(shape)
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels.to(pixel_dtype)
    plan = make_plan(shape[0], patch_grid(pixels, patch))
    length = plan.num_tokens - (plan.len_keep if order == "masked" else 0)
    pred = torch.randn(2 * shape[0], length, patchify(pixels, patch).shape[2])
    return pixels, patch, plan, pred.to(dtype)


def masked_targets(pixels: Tensor, patch: tuple[int, ...], plan: MaskPlan, norm: bool) -> Tensor:
    """(K*B, L - keep, P): targets of the masked patches, view after view."""
    target = patchify(pixels, patch)
    if norm:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    sample = torch.arange(pixels.shape[0]).unsqueeze(1)
    return torch.cat([target[sample, plan.ids_masked(view)] for view in range(plan.num_views)])


@pytest.mark.parametrize("norm_pix", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_published_loss(layout, norm_pix):
    """Errors of all patches times the mask, over the sum of the mask; view by view."""
    pixels, patch, plan, pred = case(layout, torch.float64)
    target = patchify(pixels, patch)
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    views = []
    for view, own in enumerate(pred.chunk(2)):
        error, mask = ((own - target) ** 2).mean(-1), plan.mask(view)
        views.append((error * mask).sum() / mask.sum())
    loss = masked_reconstruction_loss(pred, pixels, plan, patch_size=patch, norm_pix=norm_pix)
    torch.testing.assert_close(loss, torch.stack(views).mean(), rtol=1e-12, atol=1e-12)
    rows = masked_reconstruction_loss(
        pred, pixels, plan, patch_size=patch, norm_pix=norm_pix, reduction="none"
    )
    assert rows.shape == (pred.shape[0],)
    torch.testing.assert_close(rows.view(2, -1).mean(1), torch.stack(views))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_pix", (True, False))
def test_perfect_prediction_costs_nothing(layout, norm_pix):
    pixels, patch, plan, _ = case(layout, torch.float64)
    pred = masked_targets(pixels, patch, plan, norm_pix)
    rows = masked_reconstruction_loss(
        pred, pixels, plan, patch_size=patch, norm_pix=norm_pix, reduction="none"
    )
    assert rows.abs().max() < 1e-25


def test_closed_forms():
    _, patch, plan, pred = case("image", torch.float32, "masked")
    flat = torch.full((3, 3, 15, 28), 0.3)
    zero = torch.zeros_like(pred)
    # A constant patch is its own mean: normalised it is 0, whatever the constant.
    loss = masked_reconstruction_loss(zero, flat, plan, patch_size=patch)
    assert loss == pytest.approx(0.0, abs=1e-6)
    loss = masked_reconstruction_loss(zero + 2, flat, plan, patch_size=patch)
    assert loss == pytest.approx(4.0, rel=1e-5)
    loss = masked_reconstruction_loss(zero + 2, flat, plan, patch_size=patch, norm_pix=False)
    assert loss == pytest.approx((2 - 0.3) ** 2, rel=1e-5)
    # Predicting 0 for normalised patches: sum of squares of P values of unbiased variance 1.
    noise = torch.randn(3, 3, 15, 28, dtype=torch.float64)
    loss = masked_reconstruction_loss(zero, noise, plan, patch_size=patch)
    assert loss == pytest.approx(59 / 60, rel=1e-5)


@pytest.mark.parametrize("spread", (1.0, 1e-3, 1e-5))
def test_small_variance_on_a_large_offset(spread, within_budget):
    """Patches that are almost constant, where E[x^2] - E[x]^2 would lose every digit."""
    patch = (5, 4)
    pixels = 1 + spread * torch.randn(3, 3, 15, 28)
    plan = make_plan(3, (3, 7))
    pred = torch.randn(6, 21, 60)
    arguments = (plan, patch, True, None, False)
    rows = masked_reconstruction_loss(pred, pixels, plan, patch_size=patch, reduction="none")
    eager = reference.masked_reconstruction_loss(pred, pixels, *arguments)
    exact = reference.masked_reconstruction_loss(pred.double(), pixels.double(), *arguments)
    within_budget(rows, eager, exact)


@pytest.mark.parametrize("norm_pix", (True, False))
@pytest.mark.parametrize("order", ("tokens", "masked"))
@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("audio", "image"))
def test_error_budget(layout, dtype, pixel_dtype, order, norm_pix, three_way, poison_empty):
    pixels, patch, plan, pred = case(layout, dtype, order, pixel_dtype)
    channels = 1 if layout == "audio" else 3
    given = {name: values[:channels] for name, values in STATISTICS.items()}

    def fast(pred):
        return masked_reconstruction_loss(
            pred, pixels, plan, patch_size=patch, norm_pix=norm_pix, reduction="none", **given
        )

    def plain(pred):
        wide = torch.promote_types(pred.dtype, torch.float32)
        statistics = None
        if pixel_dtype == torch.uint8:
            statistics = tuple(torch.tensor(values, dtype=wide) for values in given.values())
        return reference.masked_reconstruction_loss(
            pred, pixels, plan, patch, norm_pix, statistics, order == "masked"
        )

    three_way(fast, plain, (pred,))


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("batch", (1, 65, 257))
def test_error_budget_of_odd_batches(batch, reduction, three_way, poison_empty):
    """More rows than threads and blocks divide; the mean goes over all of them."""
    pixels, patch, plan, pred = case("audio", torch.float32, "masked", torch.float32, batch)

    def fast(pred):
        return masked_reconstruction_loss(pred, pixels, plan, patch_size=patch, reduction=reduction)

    def plain(pred):
        rows = reference.masked_reconstruction_loss(pred, pixels, plan, patch, True, None, True)
        return rows.mean() if reduction == "mean" else rows

    three_way(fast, plain, (pred,))


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("order", ("tokens", "masked"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, order, reduction):
    pixels, patch, plan, pred = case(layout, torch.float64, order)
    pred = pred[:, :, :].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda pred: masked_reconstruction_loss(
            pred, pixels, plan, patch_size=patch, reduction=reduction
        ),
        (pred,),
        fast_mode=True,
    )


def test_pixels_may_require_grad():
    pixels, patch, plan, pred = case("image", torch.float64, "masked")
    pixels.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda pixels: masked_reconstruction_loss(pred, pixels, plan, patch_size=patch),
        (pixels,),
        fast_mode=True,
    )


def test_visible_patches_and_other_samples_do_not_matter():
    pixels, patch, plan, pred = case("image", torch.float32, pixel_dtype=torch.float32)
    pred.requires_grad_()
    sample = torch.arange(3).unsqueeze(1)
    arguments = {"patch_size": patch, "reduction": "none"}
    clean = masked_reconstruction_loss(pred, pixels, plan, **arguments)
    patches, poisoned = patchify(pixels, patch), pred.detach().clone()
    patches[sample, plan.ids_keep(0)] = torch.nan  # what view 0 sees of every sample
    patches[2] = torch.nan  # and all of sample 2
    for view, own in enumerate(poisoned.chunk(2)):
        own[sample, plan.ids_keep(view)] = torch.nan
    images = unpatchify(patches, pixels.shape[1:], patch)
    poisoned.requires_grad_()
    rows = masked_reconstruction_loss(poisoned, images, plan, **arguments)
    assert torch.equal(rows[:2], clean[:2])
    (gradient,) = torch.autograd.grad(rows[:2].sum(), poisoned)
    (expected,) = torch.autograd.grad(clean[:2].sum(), pred)
    assert torch.equal(gradient[:2], expected[:2])
    assert gradient[:2][torch.arange(2).unsqueeze(1), plan.ids_keep(0)[:2]].abs().sum() == 0


@pytest.mark.parametrize("kind", ("transposed", "sliced", "expanded", "pixels"))
def test_strides(kind):
    pixels, patch, plan, pred = case("image", torch.float32, pixel_dtype=torch.float32)
    if kind == "transposed":
        other = pred.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "sliced":
        other = torch.cat([pred, pred], dim=2)[:, :, : pred.shape[2]]
    elif kind == "expanded":
        other = pred = pred[:1].expand_as(pred)
    else:
        other, pixels = pred, pixels.to(memory_format=torch.channels_last)
    gradients = []
    for values in (pred.contiguous(), other):
        values = values.detach().requires_grad_()
        loss = masked_reconstruction_loss(values, pixels.contiguous(), plan, patch_size=patch)
        again = masked_reconstruction_loss(values, pixels, plan, patch_size=patch)
        assert torch.equal(loss, again)
        gradients += torch.autograd.grad(loss, values)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("ratio, views", [(0.7, 1), (0.75, 3), (0.8, 4), (0.5, 2)])
def test_masked_form_equals_full_form(ratio, views):
    pixels = torch.rand(5, 32, 24)
    plan = make_plan(5, (3, 4), ratio, views)
    pred = torch.randn(views * 5, 12, 64)
    sample = torch.arange(5).unsqueeze(1)
    masked = torch.cat(
        [own[sample, plan.ids_masked(view)] for view, own in enumerate(pred.chunk(views))]
    )
    losses = [
        masked_reconstruction_loss(each, pixels, plan, patch_size=8) for each in (pred, masked)
    ]
    assert torch.equal(*losses)


def test_plan_that_keeps_nothing():
    pixels, plan = torch.rand(3, 32, 24), make_plan(3, (3, 4), ratio=1.0, views=1)
    pred = torch.randn(3, 12, 64)
    with pytest.raises(ValueError, match="plan keeps nothing: say pred_order="):
        masked_reconstruction_loss(pred, pixels, plan, patch_size=8)
    full = masked_reconstruction_loss(pred, pixels, plan, patch_size=8, pred_order="tokens")
    shuffled = pred[torch.arange(3).unsqueeze(1), plan.ids_masked(0)]
    same = masked_reconstruction_loss(shuffled, pixels, plan, patch_size=8, pred_order="masked")
    assert torch.equal(full, same)


def test_empty_batch():
    pred = torch.zeros(0, 12, 64, requires_grad=True)
    pixels, plan = torch.zeros(0, 32, 24), make_plan(0, (3, 4))
    rows = masked_reconstruction_loss(pred, pixels, plan, patch_size=8, reduction="none")
    rows.sum().backward()
    assert rows.shape == (0,) and pred.grad.shape == pred.shape
    assert masked_reconstruction_loss(pred, pixels, plan, patch_size=8) == 0


def test_autocast_changes_nothing():
    pixels, patch, plan, pred = case("image", torch.bfloat16, pixel_dtype=torch.float32)
    outside = masked_reconstruction_loss(pred, pixels, plan, patch_size=patch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = masked_reconstruction_loss(pred, pixels, plan, patch_size=patch)
    assert torch.equal(inside, outside) and inside.dtype == torch.float32


def test_saves_two_numbers_per_masked_patch(saved_storages):
    pixels, patch, plan, pred = case("image", torch.bfloat16, "masked", torch.uint8)
    pred.requires_grad_()
    saved = saved_storages(
        lambda: masked_reconstruction_loss(pred, pixels, plan, patch_size=patch, **STATISTICS)
    )
    inputs = {tensor.data_ptr() for tensor in (pred, pixels, *plan[:2])}
    assert {pred.data_ptr(), pixels.data_ptr()} <= set(saved)
    extra = sum(size for pointer, size in saved.items() if pointer not in inputs)
    assert extra <= 8 * pred.shape[0] * pred.shape[1] + 2 * 3 * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reduction": "sum"}, "reduction='sum' is not 'mean' or 'none'"),
        ({"pred": torch.zeros(6, 20, 60)}, "pred has 20 tokens per row, expected 21 .* or 15"),
        ({"pred_order": "masked"}, "pred has 21 tokens .* pred_order='masked'"),
        ({"pred_order": "rank"}, "pred_order='rank' is not one of auto, tokens, masked"),
        ({"pred": torch.zeros(3, 21, 60)}, r"pred must be .* = \(6, 21, 60\), got \(3, 21, 60\)"),
        ({"pred": torch.zeros(6, 21, 20)}, r"pred must be .* got \(6, 21, 20\)"),
        ({"pred": torch.zeros(6, 21, 60).int()}, "pred must be one of .* torch.int32"),
        ({"pred": torch.zeros(6, 21)}, r"pred must be \(K\*B, L, P\) or .* got shape \(6, 21\)"),
        ({"pixels": torch.zeros(3, 3, 15, 28).long()}, "pixels must be one of .* torch.int64"),
        ({"pixels": torch.zeros(2, 3, 15, 28)}, r"plan covers .* \(3, 21\), .* needs \(2, 21\)"),
        ({"patch_size": (5, 5)}, r"patch_size \(5, 5\) does not divide \(H, W\) = \(15, 28\)"),
        ({"pixel_std": (1, 1, 1)}, "pixel_mean and pixel_std go together"),
        ({"plan": make_plan(3, (3, 7), 0.0, 1)}, "plan masks none of its 21 tokens"),
    ],
)
def test_errors(change, message):
    pixels, patch, plan, pred = case("image", torch.float32, pixel_dtype=torch.float32)
    arguments = {"pred": pred, "pixels": pixels, "plan": plan, "patch_size": patch}
    with pytest.raises(ValueError, match=message):
        masked_reconstruction_loss(**(arguments | change))


def test_patches_of_one_value_have_no_variance():
    pixels, plan = torch.rand(2, 3, 4), make_plan(2, (4, 3), views=1)
    pred = torch.zeros(2, 12, 1)
    with pytest.raises(ValueError, match="norm_pix=True needs patches of at least 2 values"):
        masked_reconstruction_loss(pred, pixels, plan, patch_size=1)
    masked_reconstruction_loss(pred, pixels, plan, patch_size=1, norm_pix=False)


def test_opcheck():
    plan = make_plan(2, (2, 3))
    pred = torch.randn(4, 6, 48, requires_grad=True)
    pixels = (torch.rand(2, 3, 8, 12) * 255).byte()
    statistics = [torch.tensor(values) for values in STATISTICS.values()]
    arguments = (plan.token_of_rank, plan.len_keep, 2, [4, 4], True, False)
    operator = torch.ops.kdcmae_fast.masked_reconstruction_loss.default
    torch.library.opcheck(operator, (pred, pixels, *statistics, *arguments))


@pytest.mark.parametrize("masked_only", (False, True))
def test_opcheck_compiled(impl, masked_only):
    if impl == "torch":
        pytest.skip("has no ops of its own")
    pixels, patch, plan, pred = case("image", torch.bfloat16, "masked", torch.uint8)
    pred = pred if masked_only else torch.randn(6, 21, 60)
    statistics = [torch.tensor(values) for values in STATISTICS.values()]
    static = (plan.rank_of_token, plan.len_keep, 2, patch, True, masked_only)
    arguments = (pred, pixels, *statistics, *static)
    ops = torch.ops.kdcmae_fast
    torch.library.opcheck(getattr(ops, f"reconstruction_loss_{impl}").default, arguments)
    operator = getattr(ops, f"reconstruction_loss_backward_{impl}").default
    torch.library.opcheck(operator, (torch.randn(6), *arguments))


def test_compiled_op_checks_its_arguments(impl):
    if impl != "cpp":
        pytest.skip("checks of the C++ op")
    pixels, patch, plan, pred = case("image", torch.float32, pixel_dtype=torch.float32)
    ranks = plan.rank_of_token

    def call(pred=pred, ranks=ranks, keep=6, masked_only=False):
        return torch.ops.kdcmae_fast.reconstruction_loss_cpp(
            pred, pixels, None, None, ranks, keep, 2, patch, True, masked_only
        )

    for change, message in (
        ({"pred": pred[:, :5]}, "pred has shape"),
        ({"masked_only": True}, "pred has shape"),
        ({"ranks": ranks + 1}, "names token 21 of 21"),
        ({"ranks": ranks.int()}, "int16"),
        ({"keep": 11}, "2 views of 11 tokens do not fit into 21"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)
    with pytest.raises(ValueError, match="grad has shape"):
        torch.ops.kdcmae_fast.reconstruction_loss_backward_cpp(
            torch.zeros(5), pred, pixels, None, None, ranks, 6, 2, patch, True, False
        )


def test_same_bits_every_time(impl):
    """C++ on any number of threads; torch promises it for one number only."""
    pixels, patch, plan, pred = case("image", torch.float32, pixel_dtype=torch.float32)
    pred.requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3) if impl == "cpp" else (threads, threads):
            torch.set_num_threads(count)
            loss = masked_reconstruction_loss(pred, pixels, plan, patch_size=patch)
            results.append([loss, torch.autograd.grad(loss, pred)[0]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


# torch's tracer and its inductor use what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_into_one_graph(backend):
    compiled = torch.compile(masked_reconstruction_loss, fullgraph=True, backend=backend)
    plan = make_plan(2, (2, 3))
    pred = torch.randn(4, 6, 48, requires_grad=True)
    pixels = (torch.rand(2, 3, 8, 12) * 255).byte()
    losses = [
        loss(pred, pixels, plan, patch_size=4, **STATISTICS)
        for loss in (compiled, masked_reconstruction_loss)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pred)[0] for loss in losses))
