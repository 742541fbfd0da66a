"""The head with its loss: dtypes, what is saved, errors, registration, compilation."""

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
from kdcmae_fast.kernels.reconstruction import head_autograd
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


@pytest.mark.parametrize("needed", (0, 1, 2))
def test_partial_gradients(needed, grad_in_forward):
    pixels, patch, plan, operands = case("audio", torch.float64)
    options = {"patch_size": patch}
    for index, each in enumerate(operands):
        each.requires_grad_(index == needed)
    loss = masked_head_reconstruction_loss(
        *operands, pixels, plan, grad_in_forward=grad_in_forward, **options
    )
    expected = separate(*operands, pixels, plan, **options)
    torch.testing.assert_close(
        torch.autograd.grad(loss, operands[needed]), torch.autograd.grad(expected, operands[needed])
    )


def test_without_bias(value_and_grads):
    pixels, patch, plan, (x, weight, _) = case("audio", torch.float64)

    def fast(x, weight):
        return masked_head_reconstruction_loss(x, weight, None, pixels, plan, patch_size=patch)

    def plain(x, weight):
        return separate(x, weight, None, pixels, plan, patch_size=patch)

    results = [value_and_grads(each, (x, weight)) for each in (fast, plain)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("types", [(1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 0, 2), (2, 3, 1)])
def test_mixed_dtypes(types):
    """The products are computed in the wider one of x and weight."""
    pixels, patch, plan, operands = case("image", torch.float64, pixel_dtype=torch.float32)
    operands = [
        each.to(DTYPES[kind]).requires_grad_() for each, kind in zip(operands, types, strict=True)
    ]
    loss = masked_head_reconstruction_loss(*operands, pixels, plan, patch_size=patch)
    gradients = torch.autograd.grad(loss, operands)
    assert [each.dtype for each in gradients] == [each.dtype for each in operands]
    wide = torch.promote_types(operands[0].dtype, operands[1].dtype)
    same = [each.detach().to(wide) for each in operands]
    expected = masked_head_reconstruction_loss(*same, pixels, plan, patch_size=patch)
    torch.testing.assert_close(loss, expected)


def test_precision_and_autocast():
    pixels, patch, plan, (x, weight, bias) = case("image", torch.float32, pixel_dtype=torch.float32)
    outside = masked_head_reconstruction_loss(x, weight, bias, pixels, plan, patch_size=patch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = masked_head_reconstruction_loss(x, weight, bias, pixels, plan, patch_size=patch)
    assert torch.equal(inside, outside) and inside.dtype == torch.float32
    lower = masked_head_reconstruction_loss(
        x, weight, bias, pixels, plan, patch_size=patch, precision="bf16"
    )
    same = masked_head_reconstruction_loss(
        x.bfloat16(), weight.bfloat16(), bias, pixels, plan, patch_size=patch
    )
    assert torch.equal(lower, same) and lower != outside


def test_empty_batch(grad_in_forward):
    x, weight, bias = (each.requires_grad_() for each in leaves(0, 12, 64, 5, torch.float32))
    pixels, plan = torch.zeros(0, 32, 24), make_plan(0, (3, 4))
    loss = masked_head_reconstruction_loss(
        x, weight, bias, pixels, plan, patch_size=8, grad_in_forward=grad_in_forward
    )
    loss.backward()
    assert loss == 0 and x.grad.shape == x.shape
    assert weight.grad.abs().sum() == 0 and bias.grad.abs().sum() == 0


def test_saved_for_backward(saved_storages, grad_in_forward):
    """Inputs and two numbers per masked patch; or the three gradients, that of x for x."""
    pixels, patch, plan, operands = case("image", torch.bfloat16, "masked", torch.uint8)
    operands = tuple(each.requires_grad_() for each in operands)
    saved = saved_storages(
        lambda: masked_head_reconstruction_loss(
            *operands, pixels, plan, patch_size=patch, grad_in_forward=grad_in_forward,
            **STATISTICS,
        )
    )  # fmt: skip
    if grad_in_forward:
        x, weight, bias = operands
        assert sum(saved.values()) == 2 * x.numel() + 4 * (weight.numel() + bias.numel())
        return
    inputs = {tensor.data_ptr() for tensor in (*operands, pixels, *plan[:2])}
    extra = sum(size for pointer, size in saved.items() if pointer not in inputs)
    assert extra <= 8 * operands[0].shape[0] * operands[0].shape[1] + 2 * 3 * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reduction": "sum"}, "reduction='sum' is not 'mean' or 'none'"),
        ({"reduction": "none", "grad_in_forward": True}, "needs reduction='mean', got 'none'"),
        ({"x": torch.zeros(6, 20, DIM)}, "x has 20 tokens per row, expected 21 .* or 15"),
        ({"row_order": "masked"}, "x has 21 tokens .* row_order='masked'"),
        ({"row_order": "rank"}, "row_order='rank' is not one of auto, tokens, masked"),
        ({"x": torch.zeros(3, 21, DIM)}, r"x must be .* = \(6, 21, 19\), got \(3, 21, 19\)"),
        ({"x": torch.zeros(6, 21, DIM).int()}, "x must be one of .* torch.int32"),
        ({"weight": torch.zeros(60, 5)}, r"weight must be \(P, D'\) = \(60, 19\), got \(60, 5\)"),
        ({"weight": torch.zeros(60)}, r"weight must be \(P, D'\), got shape \(60,\)"),
        ({"bias": torch.zeros(5)}, r"bias must be \(P,\) = \(60,\), got \(5,\)"),
        ({"pixels": torch.zeros(3, 3, 15, 28).long()}, "pixels must be one of .* torch.int64"),
        ({"pixels": torch.zeros(2, 3, 15, 28)}, r"plan covers .* \(3, 21\), .* needs \(2, 21\)"),
        ({"patch_size": (5, 5)}, r"patch_size \(5, 5\) does not divide \(H, W\) = \(15, 28\)"),
        ({"pixel_std": (1, 1, 1)}, "pixel_mean and pixel_std go together"),
        ({"precision": "tf32"}, "precision='tf32' is not None or one of fp32, bf16, fp16"),
        ({"x": torch.zeros(6, 21, DIM).double(), "precision": "bf16"}, "would lower float64"),
        ({"plan": make_plan(3, (3, 7), 0.0, 1)}, "plan masks none of its 21 tokens"),
        ({"plan": make_plan(3, (3, 7), 1.0, 1)}, "plan keeps nothing: say row_order="),
    ],
)
def test_errors(change, message):
    pixels, patch, plan, operands = case("image", torch.float32, pixel_dtype=torch.float32)
    arguments = dict(zip(("x", "weight", "bias"), operands, strict=True))
    arguments |= {"pixels": pixels, "plan": plan, "patch_size": patch}
    with pytest.raises(ValueError, match=message):
        masked_head_reconstruction_loss(**(arguments | change))


def test_compiled_op_checks_its_arguments(impl):
    if impl != "cpp":
        pytest.skip("checks of the C++ op")
    pixels, patch, plan, (x, weight, bias) = case("image", torch.float32, "tokens", torch.float32)

    def call(x=x, weight=weight, ranks=plan.rank_of_token, keep=6, masked_only=False):
        return torch.ops.kdcmae_fast.head_reconstruction_loss_cpp(
            x, weight, bias, pixels, None, None, plan.token_of_rank, ranks, keep, 2, patch, True,
            masked_only,
        )  # fmt: skip

    for change, message in (
        ({"x": x[:, :5]}, "x has shape"),
        ({"masked_only": True}, "x has shape"),
        ({"weight": weight[:, :5]}, "weight has shape"),
        ({"weight": weight.double()}, "and dtype"),
        ({"ranks": plan.rank_of_token + 1}, "names token 21 of 21"),
        ({"keep": 11}, "2 views of 11 tokens do not fit into 21"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)


@pytest.mark.parametrize(
    "mode, chosen, gradients",
    [
        (torch.enable_grad, {}, True),
        (torch.enable_grad, {"grad_in_forward": False}, False),
        (torch.enable_grad, {"reduction": "none"}, False),
        (torch.no_grad, {}, False),
    ],
)
def test_when_the_forward_pass_computes_gradients(mode, chosen, gradients, impl, monkeypatch):
    called = []
    for name in ("LOSS", "LOSS_AND_GRADIENTS"):
        op = getattr(head_autograd, name)[impl]
        spy = lambda *args, op=op, name=name: (called.append(name), op(*args))[1]  # noqa: E731
        monkeypatch.setitem(getattr(head_autograd, name), impl, spy)
    pixels, patch, plan, operands = case("audio", torch.float32, pixel_dtype=torch.float32)
    operands = [each.requires_grad_() for each in operands]
    with mode():
        masked_head_reconstruction_loss(*operands, pixels, plan, patch_size=patch, **chosen)
    assert called == ["LOSS_AND_GRADIENTS" if gradients else "LOSS"]


def test_same_bits_every_time(grad_in_forward):
    pixels, patch, plan, operands = case("image", torch.float32, pixel_dtype=torch.float32)
    operands = tuple(each.requires_grad_() for each in operands)
    results = []
    for _ in range(3):
        loss = masked_head_reconstruction_loss(
            *operands, pixels, plan, patch_size=patch, grad_in_forward=grad_in_forward
        )
        results.append([loss, *torch.autograd.grad(loss, operands)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("masked_only", (False, True))
@pytest.mark.parametrize("norm_pix", (False, True))
def test_opcheck(impl, masked_only, norm_pix):
    order = "masked" if masked_only else "tokens"
    pixels, patch, plan, operands = case("image", torch.bfloat16, order, torch.uint8)
    statistics = [torch.tensor(values) for values in STATISTICS.values()]
    static = (plan.len_keep, 2, patch, norm_pix, masked_only)
    arguments = (*operands, pixels, *statistics, *plan[:2], *static)

    def op(name):
        return getattr(torch.ops.kdcmae_fast, f"head_reconstruction_loss{name}_{impl}").default

    torch.library.opcheck(op(""), arguments)
    torch.library.opcheck(op("_and_gradients"), arguments)
    _, mean, rstd = op("")(*arguments)
    torch.library.opcheck(op("_backward"), (torch.randn(6), mean, rstd, *arguments))


# torch's tracer and its inductor use what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_into_one_graph(backend, grad_in_forward):
    compiled = torch.compile(masked_head_reconstruction_loss, fullgraph=True, backend=backend)
    plan = make_plan(2, (2, 3))
    operands = tuple(each.requires_grad_() for each in leaves(4, 6, 48, DIM, torch.float32))
    pixels = (torch.rand(2, 3, 8, 12) * 255).byte()
    losses = [
        loss(*operands, pixels, plan, patch_size=4, grad_in_forward=grad_in_forward, **STATISTICS)
        for loss in (compiled, masked_head_reconstruction_loss)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, operands) for loss in losses))
