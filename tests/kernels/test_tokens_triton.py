"""kernels/tokens in Triton: the values of the torch form, its errors within the usual budget."""

import pytest
import torch

from kdcmae_fast.kernels import (
    MaskPlan,
    assemble_decoder_input,
    complementary_masks,
    embed_visible_patches,
    gather_tokens,
)
from kdcmae_fast.kernels.tokens import patch_grid, reference
from kdcmae_fast.kernels.tokens.lean import EmbedPlan
from kdcmae_fast.kernels.tokens.patches import patch_layout

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "audio": ((3, 48, 12), (4, 8)),
    "image": ((3, 3, 15, 28), (5, 4)),
    "video": ((2, 3, 4, 6, 9), (2, 3, 3)),
}

pytestmark = [
    pytest.mark.triton,
    # Triton's interpreter turns the bounds of a loop into ints in a way that NumPy deprecates.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Memory that nothing was written to is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_plan(batch: int, grid: tuple[int, ...], device, ratio=0.7, views=2) -> MaskPlan:
    ids = torch.arange(batch)
    return complementary_masks(ids, grid, ratio, num_views=views, impl="torch").to(device)


def decoder_case(device, dtype, batch=3, dim=5, views=2):
    plans = [
        make_plan(batch, (2, 9), device, 0.7, views),
        make_plan(batch, (3, 5), device, 0.6, views),
    ]
    keep = sum(plan.len_keep for plan in plans)
    shapes = ((views * batch, keep, dim), (1, 1, dim), (33, dim))
    return plans, tuple(torch.randn(shape).to(device, dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
def test_gather_equals_torch(dtype, triton_device):
    plan = make_plan(3, (4, 6), triton_device)
    x = (torch.randn(3, 24, 7) * 9).to(triton_device, dtype)
    y = gather_tokens(x, plan, impl="triton")
    assert torch.equal(y, gather_tokens(x, plan, impl="torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (3, 300))
def test_gather_gradient_equals_torch(dtype, dim, triton_device, value_and_grads):
    plan = make_plan(2, (4, 6), triton_device, views=3)
    x = torch.randn(2, 24, dim).to(triton_device, dtype)
    results = value_and_grads(lambda x: gather_tokens(x, plan, impl="triton"), (x,))
    expected = value_and_grads(lambda x: gather_tokens(x, plan, impl="torch"), (x,))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("kind", ("transposed", "sliced", "expanded", "columns"))
def test_gather_strides_and_empty_batch(kind, triton_device):
    plan = make_plan(3, (4, 6), triton_device)
    x = {
        "transposed": torch.randn(24, 3, 7).transpose(0, 1),
        "sliced": torch.randn(3, 26, 9)[:, 1:25, 2:],
        "expanded": torch.randn(1, 24, 7).expand(3, -1, -1),
        "columns": torch.randn(3, 7, 24).transpose(1, 2),
    }[kind].to(triton_device)
    y = gather_tokens(x, plan, impl="triton")
    assert torch.equal(y, gather_tokens(x.contiguous(), plan, impl="torch"))
    empty = torch.zeros(0, 24, 7, requires_grad=True, device=triton_device)
    y = gather_tokens(empty, make_plan(0, (4, 6), triton_device), impl="triton")
    y.sum().backward()
    assert y.shape == (0, 7, 7) and empty.grad.shape == (0, 24, 7)


@pytest.mark.parametrize("released", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assembly_error_budget(dtype, released, triton_device, three_way):
    plans, leaves = decoder_case(triton_device, dtype)
    options = {"restore": "released" if released else "corrected", "impl": "triton"}
    three_way(
        lambda *leaves: assemble_decoder_input(leaves[0], plans, *leaves[1:], **options),
        lambda *leaves: reference.assemble_decoder_input(leaves[0], plans, *leaves[1:], released),
        leaves,
    )


@pytest.mark.parametrize("needed", (0, 1, 2))
def test_assembly_partial_gradients(needed, triton_device):
    plans, leaves = decoder_case(triton_device, torch.float32, batch=9, dim=300)
    leaves = [leaf.requires_grad_(i == needed) for i, leaf in enumerate(leaves)]
    gradients = []
    for impl in ("triton", "torch"):
        y = assemble_decoder_input(leaves[0], plans, *leaves[1:], impl=impl)
        gradients += torch.autograd.grad(y.square().sum(), leaves[needed])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_assembly_mixed_dtypes_strides_and_nan(triton_device):
    plans, (x, mask_token, pos) = decoder_case(triton_device, torch.float32)
    x[4, 1] = torch.nan
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    for values, table in ((x.bfloat16(), pos), (strided, pos.bfloat16()), (x, pos.double())):
        results = [
            assemble_decoder_input(values, plans, mask_token, table, impl=impl)
            for impl in ("triton", "torch")
        ]
        assert results[0].dtype == results[1].dtype and results[0].isnan().any(-1).sum() == 1
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_assembly_of_an_empty_batch(triton_device):
    plans, leaves = decoder_case(triton_device, torch.float32, batch=0)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = assemble_decoder_input(leaves[0], plans, *leaves[1:], impl="triton")
    y.sum().backward()
    assert y.shape == (0, 33, 5) and all(leaf.grad.abs().sum() == 0 for leaf in leaves)


@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_equals_torch(layout, pixel_dtype, triton_device):
    shape, patch = LAYOUTS[layout]
    pixels = torch.rand(shape)
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels
    pixels = pixels.to(triton_device)
    plan = make_plan(shape[0], patch_grid(pixels, patch), triton_device)
    channels = 1 if pixels.dim() == 3 else shape[1]
    mean, std = [0.4, 0.45, 0.5][:channels], [0.2, 0.25, 0.3][:channels]
    shapes = ((7, channels, *patch), (7,), (plan.num_tokens, 7))
    leaves = [torch.randn(each, device=triton_device, requires_grad=True) for each in shapes]
    results = []
    for impl in ("triton", "torch"):
        y = embed_visible_patches(
            pixels, *leaves, plan, patch_size=patch, pixel_mean=mean, pixel_std=std, impl=impl
        )
        results.append([y, *torch.autograd.grad(y.square().mean(), leaves)])
    torch.testing.assert_close(*results)


# pixels, patch_size, dtype of the pixels: runs of 16 bytes, so the product gathers its own rows.
GATHERED = {
    "audio": ((3, 48, 12), (4, 8), torch.float32),
    "image": ((2, 3, 12, 32), (4, 16), torch.uint8),
    "video": ((2, 2, 4, 6, 24), (2, 3, 8), torch.bfloat16),
    "deep": ((1, 3, 16, 32), (8, 16), torch.float64),  # several steps of the product
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dim", (8, 136))
@pytest.mark.parametrize("layout", GATHERED)
def test_gathered_product_error_budget(layout, dim, dtype, triton_device, three_way):
    shape, patch, pixel_dtype = GATHERED[layout]
    pixels = torch.rand(shape)
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels.to(pixel_dtype)
    pixels = pixels.to(triton_device)
    plan = make_plan(shape[0], patch_grid(pixels, patch), triton_device)
    channels = 1 if pixels.dim() == 3 else shape[1]
    given = {"pixel_mean": [0.4, 0.45, 0.5][:channels], "pixel_std": [0.2, 0.25, 0.3][:channels]}
    if pixel_dtype == torch.uint8 and triton_device == "cpu":
        # The interpreter cuts float32 off to bfloat16 where a GPU rounds.
        dtype = torch.float16
    weight = torch.randn(dim, channels, *patch) / 8
    leaves = (weight, torch.randn(dim), torch.randn(plan.num_tokens, dim))
    leaves = tuple(leaf.to(triton_device, dtype) for leaf in leaves)
    assert gathers_in_product(pixels, leaves[0], patch)

    def plain(*leaves):
        statistics = None
        if pixel_dtype == torch.uint8:
            wide = torch.promote_types(leaves[0].dtype, torch.float32)
            values = (torch.tensor(each, dtype=wide) for each in given.values())
            statistics = tuple(each.to(triton_device) for each in values)
        return reference.embed_visible_patches(pixels, *leaves, plan, patch, statistics)

    three_way(
        lambda *leaves: embed_visible_patches(
            pixels, *leaves, plan, patch_size=patch, impl="triton", **given
        ),
        plain,
        leaves,
    )


def gathers_in_product(pixels, weight, patch, impl="triton") -> bool:
    return EmbedPlan(patch_layout(pixels, patch), 1, 1, impl).gathers_in_product(pixels, weight)


@pytest.mark.parametrize(
    "patch, dim, pixel_dtype, dtype, expected",
    [
        ((16, 16), 768, torch.uint8, torch.bfloat16, True),
        ((16, 16), 768, torch.float32, torch.float16, True),
        ((16, 8), 768, torch.uint8, torch.bfloat16, False),  # runs of 8 bytes
        ((16, 16), 764, torch.uint8, torch.bfloat16, False),  # rows of the result
        ((16, 16), 768, torch.uint8, torch.float32, False),  # cuBLAS does float32 products
        ((3, 4), 768, torch.float32, torch.bfloat16, False),  # rows of the weight: 12 * 3 values
    ],
)
def test_which_embeddings_gather_in_the_product(patch, dim, pixel_dtype, dtype, expected):
    pixels = torch.zeros(1, 3, 48, 48, dtype=pixel_dtype)
    weight = torch.zeros(dim, 3, *patch, dtype=dtype)
    assert gathers_in_product(pixels, weight, patch) == expected
    assert not gathers_in_product(pixels, weight, patch, impl="cpp")


def test_gathered_product_of_several_parts_and_strides(triton_device, monkeypatch):
    """The gradient of the weight from parts of the rows; a mixture of dtypes; no bias."""
    from kdcmae_fast.kernels.tokens import kernel_embed

    pixels = torch.rand(5, 12, 48, 12).to(triton_device)[:, 3]  # other strides than its shape's
    plan = make_plan(5, patch_grid(pixels, (4, 8)), triton_device, 0.3, 1)
    weight = torch.randn(16, 1, 4, 8).to(triton_device, torch.float16)
    pos = torch.randn(plan.num_tokens, 16, device=triton_device)
    results = []
    for programs, impl in ((1, "triton"), (3, "triton"), (1, "torch")):
        monkeypatch.setattr(kernel_embed, "PROGRAMS", programs)
        leaves = [each.detach().requires_grad_() for each in (weight, pos)]
        y = embed_visible_patches(
            pixels, leaves[0], None, leaves[1], plan, patch_size=(4, 8), impl=impl
        )
        results.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(results[0], results[2], rtol=4e-3, atol=4e-3)


def test_gathered_product_of_an_empty_batch(triton_device):
    plan = make_plan(0, (3, 6), triton_device)
    leaves = [
        torch.randn(shape, device=triton_device).bfloat16().requires_grad_()
        for shape in ((8, 1, 4, 8), (8,), (18, 8))
    ]
    pixels = torch.zeros(0, 48, 12, device=triton_device)
    y = embed_visible_patches(pixels, *leaves, plan, patch_size=(4, 8), impl="triton")
    y.sum().backward()
    assert y.shape == (0, plan.len_keep, 8) and all(leaf.grad.abs().sum() == 0 for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patches_of_any_dtype(dtype, triton_device):
    pixels = torch.rand(2, 2, 12, 16).to(triton_device, dtype)
    plan = make_plan(2, (3, 4), triton_device, 0.5)
    arguments = (plan.token_of_rank, plan.len_keep, 2, [4, 4], torch.float64)
    ours = torch.ops.kdcmae_fast.visible_patches_triton(pixels, None, None, *arguments)
    blocks = pixels.unflatten(3, (4, 4)).unflatten(2, (3, 4)).permute(0, 2, 4, 1, 3, 5)
    sample = torch.arange(2, device=triton_device).unsqueeze(1)
    expected = torch.cat([blocks.reshape(2, 12, 32)[sample, plan.ids_keep(k)] for k in range(2)])
    assert torch.equal(ours, expected.flatten(0, 1).double())


@pytest.mark.parametrize("name", ("gather_rows", "assemble", "visible_patches", "embed_patches"))
def test_opcheck(name, triton_device):
    ops, plan = torch.ops.kdcmae_fast, make_plan(2, (2, 6), triton_device)
    order, keep = plan.token_of_rank, plan.len_keep

    def check(op, *arguments):
        torch.library.opcheck(getattr(ops, f"{op}_triton").default, arguments)

    def data(*shape):
        return torch.randn(shape, device=triton_device)

    if name == "gather_rows":
        check("gather_rows", data(2, 12, 5), order, keep, 2)
        check("gather_rows_backward", data(4, keep, 5), order, keep, 2)
    elif name == "embed_patches":
        pixels, weight, pos = data(2, 24, 8), data(16, 16).half(), data(12, 16)
        rest = (None, None, order, keep, 2, [4, 4])
        check(name, pixels, weight, weight[:, 0].contiguous(), pos, *rest)
        check("embed_patches_backward", data(4 * keep, 16).half(), pixels, *rest)
    elif name == "visible_patches":
        check(name, data(2, 24, 4), None, None, order, keep, 2, [2, 4], torch.bfloat16)
    else:
        ranks, keeps = [plan.rank_of_token] * 2, [keep] * 2
        table = data(24, 5)
        check("assemble", data(4, 2 * keep, 5), table, table, ranks, keeps, 2, False)
        for op in ("assemble_backward", "assemble_backward_pos"):
            check(op, data(4, 24, 5), ranks, keeps, 2, False)
