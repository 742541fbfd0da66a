"""Patches of pixels, and embedding the visible ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.kernels import MaskPlan, complementary_masks, embed_visible_patches
from kdcmae_fast.kernels.tokens import gather_patches, patch_grid, patchify, reference, unpatchify
from kdcmae_fast.kernels.tokens.rows import visible_tokens

OP = "embed_visible_patches"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# pixels, patch_size
LAYOUTS = {
    "audio": ((3, 48, 12), (4, 8)),
    "image": ((3, 3, 15, 28), (5, 4)),
    "square": ((2, 1, 16, 16), (4, 4)),
    "video": ((2, 3, 4, 6, 9), (2, 3, 3)),
}


def make_plan(batch: int, grid: tuple[int, ...], ratio: float = 0.7, views: int = 2) -> MaskPlan:
    return complementary_masks(torch.arange(batch), grid, ratio, num_views=views)


def embedding_case(layout: str, dtype: torch.dtype, pixel_dtype: torch.dtype | None = None):
    """pixels, patch size, plan and (weight, bias, pos_embed) of one layout."""
    shape, patch = LAYOUTS[layout]
    pixels = torch.rand(shape)
    pixel_dtype = pixel_dtype or dtype
    pixels = (pixels * 255).byte() if pixel_dtype == torch.uint8 else pixels.to(pixel_dtype)
    plan = make_plan(shape[0], patch_grid(pixels, patch))
    channels = 1 if pixels.dim() == 3 else shape[1]
    fan_in = channels * torch.Size(patch).numel()
    weight = (torch.randn(7, channels, *patch) / fan_in**0.5).to(dtype)
    bias, pos = torch.randn(7).to(dtype), torch.randn(plan.num_tokens, 7).to(dtype)
    return pixels, patch, plan, (weight, bias, pos)


def statistics(pixels: Tensor, dtype: torch.dtype) -> tuple[dict, tuple[Tensor, Tensor] | None]:
    """pixel_mean and pixel_std as arguments, and as the reference takes them."""
    channels = 1 if pixels.dim() == 3 else pixels.shape[1]
    mean, std = [0.4, 0.45, 0.5][:channels], [0.2, 0.25, 0.3][:channels]
    if pixels.dtype != torch.uint8:
        return {"pixel_mean": mean, "pixel_std": std}, None
    wide = torch.promote_types(dtype, torch.float32)
    tensors = torch.tensor(mean, dtype=wide), torch.tensor(std, dtype=wide)
    return {"pixel_mean": mean, "pixel_std": std}, tensors


class TestPatches:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("contiguous", (True, False))
    def test_gathered_patches_are_those_of_patchify(self, layout, contiguous):
        shape, patch = LAYOUTS[layout]
        pixels = torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2]
        pixels = pixels.contiguous() if contiguous else pixels
        plan = make_plan(shape[0], patch_grid(pixels, patch))
        tokens = visible_tokens(plan.token_of_rank, plan.len_keep, plan.num_views)
        gathered = gather_patches(pixels, tokens, patch)
        sample = torch.arange(shape[0]).unsqueeze(1)
        expected = patchify(pixels, patch)[sample, tokens]
        # Memory order against target order: the same values in another order.
        assert torch.equal(gathered.sort(-1).values, expected.sort(-1).values)

    def test_target_order(self):
        image = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)  # value = 16 * channel + 4 * y + x
        assert patchify(image, 2)[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
        audio = torch.arange(4 * 6).view(1, 4, 6)  # value = 6 * time + mel
        # Token 1 is (freq 0, time 1): mel 0..1 of times 2..3, mel offset first.
        assert patchify(audio, 2)[0, 1].tolist() == [12, 18, 13, 19]
        video = torch.arange(2 * 2 * 2 * 2).view(1, 2, 2, 2, 2)  # (C, T, H, W)
        assert patchify(video, (2, 1, 2))[0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_unpatchify_is_the_inverse(self, layout):
        shape, patch = LAYOUTS[layout]
        pixels = torch.randn(shape)
        assert torch.equal(unpatchify(patchify(pixels, patch), shape[1:], patch), pixels)

    @pytest.mark.parametrize(
        "shape, patch, message",
        [
            ((2, 30, 16), 16, r"patch_size \(16, 16\) does not divide \(F, T\) = \(16, 30\)"),
            ((2, 3, 32, 30), 16, r"does not divide \(H, W\) = \(32, 30\)"),
            (
                (2, 3, 4, 32, 32),
                (16, 16),
                r"patch_size must .* axis of \(T, H, W\), got \(16, 16\)",
            ),
            ((2, 3, 32, 32), 0, "patch_size must be a positive int .* got 0"),
            ((2, 3, 32, 32), "ab", "patch_size must be a positive int .* got 'ab'"),
            ((2, 3, 32, 32), 16.0, r"patch_size must be a positive int .* got 16\.0"),
            ((2, 32), 16, r"pixels must be \(B, T, F\) or .* got shape \(2, 32\)"),
        ],
    )
    def test_errors(self, shape, patch, message):
        with pytest.raises(ValueError, match=message):
            patch_grid(torch.zeros(shape), patch)


class TestEmbedVisiblePatches:
    @pytest.mark.parametrize("layout", ("audio", "image", "video"))
    @pytest.mark.parametrize("views", (1, 3))
    def test_equals_published_convolution(self, layout, views):
        """Convolve everything, add positions, gather with an index repeated to the width."""
        shape, patch = LAYOUTS[layout]
        pixels, _, plan, (weight, bias, pos) = embedding_case(layout, torch.float64)
        plan = make_plan(shape[0], patch_grid(pixels, patch), views=views)
        if layout == "audio":
            dense = F.conv2d(pixels.unsqueeze(1).transpose(2, 3), weight, bias, stride=patch)
        else:
            convolve = F.conv2d if layout == "image" else F.conv3d
            dense = convolve(pixels, weight, bias, stride=patch)
        dense = dense.flatten(2).transpose(1, 2) + pos
        expected = []
        for view in range(views):
            index = plan.ids_keep(view).unsqueeze(-1).repeat(1, 1, 7)
            expected.append(torch.gather(dense, 1, index))
        y = embed_visible_patches(pixels, weight, bias, pos[None], plan, patch_size=patch)
        torch.testing.assert_close(y, torch.cat(expected), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32), ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_error_budget(self, layout, pixel_dtype, dtype, three_way, poison_empty):
        pixels, patch, plan, leaves = embedding_case(layout, dtype, pixel_dtype)
        arguments, tensors = statistics(pixels, dtype)

        def fast(weight, bias, pos):
            return embed_visible_patches(
                pixels, weight, bias, pos, plan, patch_size=patch, **arguments
            )

        def plain(weight, bias, pos):
            args = (pixels, weight, bias, pos, plan, patch, tensors)
            return reference.embed_visible_patches(*args)

        three_way(fast, plain, leaves)

    @pytest.mark.parametrize("batch, dim", [(1, 1023), (65, 96), (257, 17), (2000, 9)])
    def test_sizes(self, batch, dim, three_way):
        """Odd ones, and sums over so many rows that float32 needs more than one running sum."""
        plan, pixels = make_plan(batch, (7, 7), 0.77, 4), torch.randn(batch, 3, 14, 14)
        three_way(
            lambda *leaves: embed_visible_patches(pixels, *leaves, plan, patch_size=2),
            lambda weight, *rest: reference.embed_visible_patches(
                pixels.to(weight.dtype), weight, *rest, plan, (2, 2), None
            ),
            (torch.randn(dim, 3, 2, 2) / 3.5, torch.randn(dim), torch.randn(49, dim)),
        )

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gradcheck(self, layout):
        pixels, patch, plan, leaves = embedding_case(layout, torch.float64)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(
            lambda *leaves: embed_visible_patches(pixels, *leaves, plan, patch_size=patch), leaves
        )

    def test_pixels_may_require_grad(self):
        pixels, patch, plan, leaves = embedding_case("image", torch.float64)
        pixels.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda pixels: embed_visible_patches(pixels, *leaves, plan, patch_size=patch), (pixels,)
        )

    @pytest.mark.parametrize("needed", (0, 1, 2))
    def test_partial_gradients(self, needed):
        pixels, patch, plan, leaves = embedding_case("audio", torch.float32)

        def op(weight, bias, pos):
            return embed_visible_patches(pixels, weight, bias, pos, plan, patch_size=patch)

        alone = [leaf.detach().requires_grad_(i == needed) for i, leaf in enumerate(leaves)]
        op(*alone).square().sum().backward()
        every = [leaf.detach().requires_grad_() for leaf in leaves]
        op(*every).square().sum().backward()
        assert [leaf.grad is not None for leaf in alone] == [i == needed for i in range(3)]
        assert torch.equal(alone[needed].grad, every[needed].grad)

    def test_mixed_dtypes_and_no_bias(self):
        pixels, patch, plan, (weight, _, pos) = embedding_case("image", torch.float32)
        exact = embed_visible_patches(pixels, weight, None, pos, plan, patch_size=patch)
        y = embed_visible_patches(
            pixels.double(), weight.bfloat16(), None, pos, plan, patch_size=patch
        )
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)

    def test_autocast_leaves_the_product_alone(self):
        pixels, patch, plan, leaves = embedding_case("image", torch.float32)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        outside = embed_visible_patches(pixels, *leaves, plan, patch_size=patch)
        expected = torch.autograd.grad(outside.sum(), leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = embed_visible_patches(pixels, *leaves, plan, patch_size=patch)
            gradients = torch.autograd.grad(inside.sum(), leaves)
        assert torch.equal(inside, outside)
        assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))

    def test_statistics_as_tensors_and_default(self):
        pixels, patch, plan, leaves = embedding_case("image", torch.float32, torch.uint8)
        arguments, tensors = statistics(pixels, torch.float32)
        as_tensors = dict(zip(arguments, tensors, strict=True))
        results = [
            embed_visible_patches(pixels, *leaves, plan, patch_size=patch, **given)
            for given in (arguments, as_tensors)
        ]
        assert torch.equal(*results)
        plain = embed_visible_patches(pixels, *leaves, plan, patch_size=patch)
        scaled = embed_visible_patches(pixels / 255, *leaves, plan, patch_size=patch)
        torch.testing.assert_close(plain, scaled)

    def test_other_samples_and_masked_patches_do_not_leak(self):
        pixels, patch, plan, leaves = embedding_case("image", torch.float32)
        clean = embed_visible_patches(pixels, *leaves, plan, patch_size=patch)
        patches = patchify(pixels, patch)
        for view in range(2):  # NaN in what view `view` of sample 0 does not see, and in sample 2
            poisoned = patches.clone()
            poisoned[0, plan.ids_masked(view)[0]] = torch.nan
            poisoned[2] = torch.nan
            images = unpatchify(poisoned, pixels.shape[1:], patch)
            y = embed_visible_patches(images, *leaves, plan, patch_size=patch)
            rows = [3 * view, 3 * view + 1]
            assert torch.equal(y[rows], clean[rows])

    def test_empty_batch_and_full_masking(self):
        _, patch, plan, leaves = embedding_case("image", torch.float32)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        empty = torch.zeros(0, 3, 15, 28, dtype=torch.uint8)
        y = embed_visible_patches(empty, *leaves, make_plan(0, (3, 7)), patch_size=patch)
        y.sum().backward()
        assert y.shape == (0, plan.len_keep, 7)
        assert all(leaf.grad.abs().sum() == 0 for leaf in leaves)
        nothing = make_plan(3, (3, 7), ratio=1.0)
        y = embed_visible_patches(torch.rand(3, 3, 15, 28), *leaves, nothing, patch_size=patch)
        assert y.shape == (6, 0, 7)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides(self, layout):
        """Operands and gradient with reversed axes in memory give what contiguous ones give."""

        def reverse(x):
            order = tuple(reversed(range(x.dim())))
            return x.detach().permute(order).contiguous().permute(order).requires_grad_()

        pixels, patch, plan, leaves = embedding_case(layout, torch.float64)
        results = []
        for arrange in (lambda x: x.detach().requires_grad_(), reverse):
            own = [arrange(leaf) for leaf in leaves]
            y = embed_visible_patches(arrange(pixels).detach(), *own, plan, patch_size=patch)
            grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            grad = arrange(grad).detach()
            results.append([y, *torch.autograd.grad(y, own, grad)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)

    def test_saves_nothing_but_inputs(self, saved_storages):
        pixels, patch, plan, leaves = embedding_case("image", torch.float32, torch.uint8)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        saved = saved_storages(
            lambda: embed_visible_patches(pixels, *leaves, plan, patch_size=patch)
        )
        inputs = {tensor.data_ptr() for tensor in (pixels, plan.token_of_rank)}
        extra = sum(size for pointer, size in saved.items() if pointer not in inputs)
        assert extra <= 2 * 3 * 4  # mean and std

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"weight": torch.zeros(7, 3, 4, 4)}, r"weight must be .* = \(7, 3, 5, 4\), got"),
            (
                {"weight": torch.zeros(7, 3, 5, 4).int()},
                "weight must be one of .* got torch.int32",
            ),
            ({"bias": torch.zeros(6)}, r"bias must be \(D,\) = \(7,\), got \(6,\)"),
            (
                {"pos_embed": torch.zeros(20, 7)},
                r"pos_embed must be .* = \(21, 7\), got \(20, 7\)",
            ),
            ({"pos_embed": torch.zeros(3, 21, 7)}, r"pos_embed must be .* got \(3, 21, 7\)"),
            ({"pixels": torch.zeros(3, 3, 15, 28).int()}, "pixels must be one of .* torch.int32"),
            ({"plan": make_plan(3, (3, 6))}, r"plan covers .* \(3, 18\), .* needs \(3, 21\)"),
            ({"pixel_mean": (0.5,) * 3}, "pixel_mean and pixel_std go together"),
            ({"pixel_mean": [0.5], "pixel_std": [0.5]}, "pixel_mean has 1 values, pixels have 3"),
            ({"patch_size": 7}, r"patch_size \(7, 7\) does not divide \(H, W\) = \(15, 28\)"),
            ({"impl": "numpy"}, "impl='numpy' is not one of auto"),
        ],
    )
    def test_errors(self, change, message):
        pixels, patch, plan, (weight, bias, pos) = embedding_case("image", torch.float32)
        arguments = {
            "pixels": pixels,
            "weight": weight,
            "bias": bias,
            "pos_embed": pos,
            "plan": plan,
            "patch_size": patch,
        }
        with pytest.raises(ValueError, match=message):
            embed_visible_patches(**(arguments | change))


def test_opcheck():
    plan = make_plan(2, (2, 6))
    pixels = torch.randn(2, 24, 8)
    weight = torch.randn(5, 1, 4, 4, requires_grad=True)
    bias, pos = torch.randn(5, requires_grad=True), torch.randn(12, 5, requires_grad=True)
    arguments = (pixels, weight, bias, pos, None, None, plan.token_of_rank, plan.len_keep, 2)
    torch.library.opcheck(torch.ops.kdcmae_fast.embed_visible_patches.default, arguments)


@pytest.mark.parametrize("pixel_dtype", (torch.uint8, torch.float32), ids=str)
def test_opcheck_compiled(impl, pixel_dtype):
    if impl == "torch":
        pytest.skip("has no op of its own")
    pixels, patch, plan, _ = embedding_case("image", torch.float32, pixel_dtype)
    _, tensors = statistics(pixels, torch.float32)
    static = (plan.token_of_rank, plan.len_keep, 2, patch, torch.bfloat16)
    operator = getattr(torch.ops.kdcmae_fast, f"visible_patches_{impl}").default
    torch.library.opcheck(operator, (pixels, *(tensors or (None, None)), *static))


def test_compiled_op_checks_its_arguments(impl):
    if impl != "cpp":
        pytest.skip("checks of the C++ op")
    pixels, patch, plan, _ = embedding_case("image", torch.float32)

    def call(pixels=pixels, plan=plan.token_of_rank, patch=patch, keep=1, views=2):
        arguments = (pixels, None, None, plan, keep, views, patch, torch.float32)
        return torch.ops.kdcmae_fast.visible_patches_cpp(*arguments)

    for change, message in (
        ({"pixels": pixels.byte()}, "uint8 pixels need one mean"),
        ({"pixels": pixels[0, 0]}, "pixels have 2 axes"),
        ({"patch": (5, 5)}, "patch_size 5 does not divide 28"),
        ({"patch": (5,)}, "patch_size has 1 axes"),
        ({"plan": plan.token_of_rank + 1}, "names token 21 of 21"),
        ({"keep": 11}, "2 views of 11 tokens do not fit into 21"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)
