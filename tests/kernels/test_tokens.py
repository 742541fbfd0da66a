"""Token gathering and decoder assembly, and all token ops compiled together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcmae_fast.kernels import (
    MaskPlan,
    assemble_decoder_input,
    complementary_masks,
    embed_visible_patches,
    gather_tokens,
)
from kdcmae_fast.kernels.tokens import reference
from kdcmae_fast.kernels.tokens.rows import masked_tokens, visible_tokens

OP = "gather_tokens"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")

SIZES = pytest.mark.parametrize("batch, dim", [(1, 1023), (3, 768), (65, 512), (257, 96)])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_plan(batch: int, grid: tuple[int, ...], ratio: float = 0.7, views: int = 2) -> MaskPlan:
    return complementary_masks(torch.arange(batch), grid, ratio, num_views=views)


def decoder_case(dtype: torch.dtype, batch: int = 3, views: int = 2):
    """Two plans and (x, mask_token, pos_embed)."""
    plans = [make_plan(batch, (2, 9), 0.7, views), make_plan(batch, (3, 5), 0.6, views)]
    keep = sum(plan.len_keep for plan in plans)
    x, mask_token = torch.randn(views * batch, keep, 5), torch.randn(1, 1, 5)
    return plans, tuple(leaf.to(dtype) for leaf in (x, mask_token, torch.randn(33, 5)))


class TestGatherTokens:
    @pytest.mark.parametrize("views, ratio", [(1, 0.75), (2, 0.75), (3, 0.7), (4, 0.75), (2, 1.0)])
    def test_equals_published_gather(self, views, ratio):
        noise, x = torch.rand(5, 24), torch.randn(5, 24, 7)
        plan = complementary_masks(torch.arange(5), (4, 6), ratio, num_views=views, noise=noise)
        shuffle = noise.argsort(dim=1)
        expected = []
        for view in range(views):
            kept = shuffle[:, view * plan.len_keep : (view + 1) * plan.len_keep]
            expected.append(torch.gather(x, 1, kept.unsqueeze(-1).repeat(1, 1, 7)))
        assert torch.equal(gather_tokens(x, plan), torch.cat(expected))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forward_and_gradient_equal_reference(self, dtype, value_and_grads, poison_empty):
        self.equals_reference(
            make_plan(5, (4, 6)), torch.randn(5, 24, 7).to(dtype), value_and_grads
        )

    @SIZES
    def test_sizes(self, batch, dim, value_and_grads):
        plan = make_plan(batch, (7, 7), 0.77, views=4)
        self.equals_reference(plan, torch.randn(batch, 49, dim), value_and_grads)

    def equals_reference(self, plan, x, value_and_grads):
        results = value_and_grads(lambda x: gather_tokens(x, plan), (x,))
        expected = value_and_grads(lambda x: reference.gather_tokens(x, plan), (x,))
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))

    @pytest.mark.parametrize("kind", ("transposed", "sliced", "expanded", "offset"))
    def test_strides(self, kind):
        plan = make_plan(3, (4, 6))
        x = {
            "transposed": torch.randn(24, 3, 7).transpose(0, 1),
            "sliced": torch.randn(3, 26, 9)[:, 1:25, 2:],
            "expanded": torch.randn(1, 24, 7).expand(3, -1, -1),
            "offset": torch.randn(3 * 24 * 7 + 1)[1:].view(3, 24, 7),
        }[kind]
        x.requires_grad_()
        y = gather_tokens(x, plan)
        assert torch.equal(y, gather_tokens(x.contiguous(), plan))
        y.sum().backward()  # a gradient of stride 0
        assert x.grad.sum() == y.numel()

    def test_integers_and_empty_batch(self):
        plan = make_plan(3, (4, 6))
        x = torch.arange(72).view(3, 24, 1)
        assert torch.equal(gather_tokens(x, plan)[:3, :, 0] % 24, plan.ids_keep(0))
        empty = torch.zeros(0, 24, 7, requires_grad=True)
        y = gather_tokens(empty, make_plan(0, (4, 6)))
        y.sum().backward()
        assert y.shape == (0, 7, 7) and empty.grad.shape == (0, 24, 7)

    def test_gradcheck(self):
        plan = make_plan(2, (2, 3), 0.5)
        x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: gather_tokens(x, plan), (x,))

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.floats(0.3, 0.95), st.data()
    )
    def test_views_partition_what_they_keep(self, batch, tokens, views, ratio, data):
        if tokens * (1 - ratio) < 1 or views * int(tokens * (1 - ratio) + 1e-6) > tokens:
            return
        plan = make_plan(batch, (tokens,), ratio, views)
        kept = visible_tokens(plan.token_of_rank, plan.len_keep, views)
        lacking = masked_tokens(plan.token_of_rank, plan.len_keep, views)
        for view in range(views):
            assert torch.equal(kept[view], plan.ids_keep(view))
            assert torch.equal(lacking[view], plan.ids_masked(view))
        ones = torch.ones(batch, tokens, 1, requires_grad=True)
        gather_tokens(ones, plan).sum().backward()
        assert ones.grad.sum() == batch * views * plan.len_keep and ones.grad.max() == 1

    def test_errors(self):
        plan = make_plan(3, (4, 6))
        with pytest.raises(ValueError, match=r"x must be \(B, L, D\), got shape \(3, 24\)"):
            gather_tokens(torch.zeros(3, 24), plan)
        with pytest.raises(
            ValueError, match=r"plan covers .* \(3, 24\), the tensor needs \(2, 24\)"
        ):
            gather_tokens(torch.zeros(2, 24, 1), plan)
        with pytest.raises(ValueError, match="plan must be a MaskPlan, got list"):
            gather_tokens(torch.zeros(3, 24, 1), [plan])
        with pytest.raises(ValueError, match="plan is on cpu, the tensors on meta"):
            gather_tokens(torch.zeros(3, 24, 1, device="meta"), plan)
        with pytest.raises(ValueError, match="impl='cuda' of gather_tokens is not available"):
            gather_tokens(torch.zeros(3, 24, 1), plan, impl="cuda")


def published_assembly(x, shuffles, keeps, mask_token, pos, released):
    """Append mask tokens, unshuffle each modality through a repeated index, concatenate, add."""
    views = len(shuffles[0])
    rows = []
    for view, own in enumerate(x.chunk(views)):
        parts = []
        for visible, orders in zip(own.split(keeps, dim=1), shuffles, strict=True):
            restore = orders[0 if released else view].argsort(dim=1)
            filler = mask_token.repeat(own.shape[0], restore.shape[1] - visible.shape[1], 1)
            index = restore.unsqueeze(-1).repeat(1, 1, own.shape[2])
            parts.append(torch.gather(torch.cat([visible, filler], dim=1), 1, index))
        rows.append(torch.cat(parts, dim=1) + pos)
    return torch.cat(rows)


class TestAssembleDecoderInput:
    @pytest.mark.parametrize("restore", ("corrected", "released"))
    @pytest.mark.parametrize("views", (1, 2, 3))
    def test_equals_published_unshuffle(self, restore, views):
        noises, grids, ratios = (torch.rand(4, 18), torch.rand(4, 15)), ((2, 9), (3, 5)), (0.7, 0.7)
        plans, shuffles = [], []
        for noise, grid, ratio in zip(noises, grids, ratios, strict=True):
            plan = complementary_masks(torch.arange(4), grid, ratio, num_views=views, noise=noise)
            order = noise.argsort(dim=1)
            plans.append(plan)
            shuffles.append([order.roll(-view * plan.len_keep, 1) for view in range(views)])
        keeps = [plan.len_keep for plan in plans]
        x, mask_token = torch.randn(views * 4, sum(keeps), 6), torch.randn(1, 1, 6)
        pos = torch.randn(1, 33, 6)
        y = assemble_decoder_input(x, plans, mask_token, pos, restore=restore)
        released = restore == "released"
        assert torch.equal(y, published_assembly(x, shuffles, keeps, mask_token, pos, released))

    @pytest.mark.parametrize("released", (False, True))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_error_budget(self, dtype, released, three_way, poison_empty):
        plans, leaves = decoder_case(dtype)
        restore = "released" if released else "corrected"
        three_way(
            lambda *leaves: assemble_decoder_input(leaves[0], plans, *leaves[1:], restore=restore),
            lambda *leaves: reference.assemble_decoder_input(
                leaves[0], plans, *leaves[1:], released
            ),
            leaves,
        )

    @SIZES
    def test_sizes(self, batch, dim, three_way):
        plans = [make_plan(batch, (7, 7), 0.77, 4), make_plan(batch, (3, 5), 0.8, 4)]
        shapes = ((4 * batch, sum(plan.len_keep for plan in plans), dim), (1, 1, dim), (64, dim))
        three_way(
            lambda *leaves: assemble_decoder_input(leaves[0], plans, *leaves[1:]),
            lambda *leaves: reference.assemble_decoder_input(leaves[0], plans, *leaves[1:], False),
            tuple(torch.randn(shape) for shape in shapes),
        )

    @pytest.mark.parametrize("restore", ("corrected", "released"))
    def test_gradcheck(self, restore):
        plans, leaves = decoder_case(torch.float64, batch=2)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(
            lambda x, mask, pos: assemble_decoder_input(x, plans, mask, pos, restore=restore),
            leaves,
        )

    @pytest.mark.parametrize("needed", (0, 1, 2))
    def test_partial_gradients(self, needed):
        plans, leaves = decoder_case(torch.float32)
        alone = [leaf.detach().requires_grad_(i == needed) for i, leaf in enumerate(leaves)]
        assemble_decoder_input(alone[0], plans, *alone[1:]).square().sum().backward()
        every = [leaf.detach().requires_grad_() for leaf in leaves]
        assemble_decoder_input(every[0], plans, *every[1:]).square().sum().backward()
        assert [leaf.grad is not None for leaf in alone] == [i == needed for i in range(3)]
        assert torch.equal(alone[needed].grad, every[needed].grad)

    def test_gathering_again_gives_the_visible_tokens(self):
        plan = make_plan(3, (4, 6), 0.75, views=2)
        x = torch.randn(6, plan.len_keep, 5)
        y = assemble_decoder_input(x, [plan], torch.zeros(5), torch.zeros(24, 5))
        for view, (own, visible) in enumerate(zip(y.chunk(2), x.chunk(2), strict=True)):
            single = plan._replace(
                token_of_rank=plan.token_of_rank.roll(-view * plan.len_keep, 1), num_views=1
            )
            assert torch.equal(gather_tokens(own, single), visible)
            assert torch.equal(own.abs().sum(-1) == 0, plan.mask(view).bool())

    def test_nan_stays_in_its_token(self):
        plans, (x, mask_token, pos) = decoder_case(torch.float32)
        clean = assemble_decoder_input(x, plans, mask_token, pos)
        x[4, 1] = torch.nan
        y = assemble_decoder_input(x, plans, mask_token, pos)
        assert y.isnan().any(-1).sum() == 1 and y[4].isnan().any()
        assert torch.equal(y[:4], clean[:4])

    def test_nan_gradient_of_visible_tokens_spares_the_mask_token(self):
        plans, (x, mask_token, pos) = decoder_case(torch.float32)
        mask_token.requires_grad_()
        y = assemble_decoder_input(x, plans, mask_token, pos)
        cotangent = torch.ones_like(y)
        cotangent[0, plans[0].ids_keep(0)[0]] = torch.nan
        (gradient,) = torch.autograd.grad(y, mask_token, cotangent)
        assert torch.equal(gradient, torch.full_like(gradient, 6 * (33 - x.shape[1])))

    def test_dtypes_follow_x_and_mask_token(self):
        plans, (x, mask_token, pos) = decoder_case(torch.float32)
        exact = assemble_decoder_input(x, plans, mask_token, pos)
        cases = {
            (torch.bfloat16, torch.bfloat16): torch.bfloat16,  # pos stays float32
            (torch.bfloat16, torch.float32): torch.float32,  # autocast: parameters are float32
        }
        for (x_dtype, mask_dtype), expected in cases.items():
            leaves = x.to(x_dtype).requires_grad_(), mask_token.to(mask_dtype).requires_grad_()
            y = assemble_decoder_input(leaves[0], plans, leaves[1], pos)
            assert y.dtype == expected
            torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)
            y.float().sum().backward()
            assert [leaf.grad.dtype for leaf in leaves] == [x_dtype, mask_dtype]
        narrow = assemble_decoder_input(x, plans, mask_token, pos.bfloat16())
        assert narrow.dtype == torch.float32

    def test_strides_and_empty_batch(self):
        plans, (x, mask_token, pos) = decoder_case(torch.float32)
        expected = assemble_decoder_input(x, plans, mask_token, pos)
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        spread = pos.repeat(1, 2)[:, :5]
        y = assemble_decoder_input(strided, plans, mask_token[0, 0], spread)
        assert torch.equal(y, expected)
        empty_plans, leaves = decoder_case(torch.float32, batch=0)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = assemble_decoder_input(leaves[0], empty_plans, *leaves[1:])
        y.sum().backward()
        assert y.shape == (0, 33, 5) and leaves[1].grad.abs().sum() == 0

    def test_saves_nothing_but_plans(self, saved_storages):
        plans, leaves = decoder_case(torch.float32)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        saved = saved_storages(lambda: assemble_decoder_input(leaves[0], plans, *leaves[1:]))
        inputs = {order.data_ptr() for plan in plans for order in plan[:2]}
        assert len(saved) == len(plans) and set(saved) <= inputs

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"restore": "wrong"}, "restore='wrong' is not 'corrected' or 'released'"),
            ({"plans": []}, "plans must be a sequence with one MaskPlan per segment"),
            ({"plans": make_plan(3, (2, 9))}, "such as .plan."),
            ({"plans": [make_plan(3, (2, 9))]}, "x has 11 tokens per row, the plans keep 5"),
            (
                {"plans": [make_plan(3, (2, 9)), make_plan(6, (3, 5), 0.6, views=1)]},
                r"plans\[1\] covers",
            ),
            ({"x": torch.zeros(5, 11, 5)}, "x has 5 rows, not a multiple of the 2 views"),
            ({"x": torch.zeros(6, 11, 5).int()}, "x must be one of .* got torch.int32"),
            ({"mask_token": torch.zeros(6)}, r"mask_token must be .* = \(5,\), got \(6,\)"),
            ({"mask_token": torch.zeros(2, 1, 5)}, r"mask_token must be .* got \(2, 1, 5\)"),
            ({"pos_embed": torch.zeros(32, 5)}, r"pos_embed must be .* = \(33, 5\), got"),
        ],
    )
    def test_errors(self, change, message):
        plans, (x, mask_token, pos) = decoder_case(torch.float32)
        arguments = {"x": x, "plans": plans, "mask_token": mask_token, "pos_embed": pos}
        with pytest.raises(ValueError, match=message):
            assemble_decoder_input(**(arguments | change))


def test_opcheck():
    ops = torch.ops.kdcmae_fast
    plan = make_plan(2, (2, 6))
    order, keep = plan.token_of_rank, plan.len_keep
    x = torch.randn(2, 12, 5, requires_grad=True)
    torch.library.opcheck(ops.gather_tokens.default, (x, order, keep, 2))
    mask_token, pos = torch.randn(5, requires_grad=True), torch.randn(24, 5, requires_grad=True)
    x = torch.randn(4, 2 * keep, 5, requires_grad=True)
    arguments = (x, mask_token, pos, [order, order], [keep, keep], 2, False)
    torch.library.opcheck(ops.assemble_decoder_input.default, arguments)


@pytest.mark.parametrize("name", ("gather_rows", "assemble"))
def test_opcheck_compiled(name, impl):
    if impl == "torch":
        pytest.skip("has no ops of its own")
    ops, plan = torch.ops.kdcmae_fast, make_plan(2, (2, 6))
    static = (plan.len_keep, 2)

    def check(op, *arguments):
        torch.library.opcheck(getattr(ops, f"{op}_{impl}").default, arguments)

    if name == "gather_rows":
        check("gather_rows", torch.randn(2, 12, 5), plan.token_of_rank, *static)
        grad = torch.randn(4, plan.len_keep, 5)
        check("gather_rows_backward", grad, plan.token_of_rank, *static)
        return
    ranks, keeps, keep = [plan.rank_of_token] * 2, [plan.len_keep] * 2, plan.len_keep
    table = torch.randn(24, 5)
    check("assemble", torch.randn(4, 2 * keep, 5), table, table, ranks, keeps, 2, False)
    for op in ("assemble_backward", "assemble_backward_pos"):
        check(op, torch.randn(4, 24, 5), ranks, keeps, 2, False)


def test_compiled_ops_check_what_they_index_with(impl):
    if impl != "cpp":
        pytest.skip("checks of the C++ ops")
    ops = torch.ops.kdcmae_fast
    x, order = torch.randn(2, 6, 5), make_plan(2, (6,), 0.5).token_of_rank
    for plan, message in ((order + 1, "names token 6 of 6"), (order - 1, "names token -1"),
                          (order.long(), "int16"), (order[:1], "must be")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.gather_rows_cpp(x, plan, 3, 2)
    with pytest.raises(ValueError, match="3 views of 3 tokens do not fit into 6"):
        ops.gather_rows_cpp(x, order, 3, 3)
    with pytest.raises(ValueError, match="grad has shape"):
        ops.gather_rows_backward_cpp(x, order, 3, 2)
    with pytest.raises(ValueError, match="x has shape"):
        ops.assemble_cpp(x, torch.zeros(6, 5), torch.zeros(6, 5), [order], [3], 2, False)
    with pytest.raises(ValueError, match="pos has shape"):
        ops.assemble_cpp(torch.zeros(4, 3, 5), x[0, :5], x[0], [order], [3], 2, False)


def token_step(pixels, weight, bias, pos, mask_token, decoder_pos, plan):
    """All three ops in a row, one after the other."""
    x = embed_visible_patches(
        pixels, weight, bias, pos, plan, patch_size=4, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3
    )
    y = assemble_decoder_input(x, [plan], mask_token, decoder_pos)
    return gather_tokens(y[: pixels.shape[0]], plan).square().mean()


def compile_case(batch: int):
    plan = make_plan(batch, (3, 4))
    pixels = (torch.rand(batch, 3, 12, 16) * 255).byte()
    shapes = ((5, 3, 4, 4), (5,), (12, 5), (1, 1, 5), (12, 5))
    return pixels, [torch.randn(shape, requires_grad=True) for shape in shapes], plan


# torch's tracer and its inductor use what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_into_one_graph(backend):
    step = torch.compile(token_step, fullgraph=True, backend=backend, dynamic=True)
    for batch in (2, 3):
        pixels, leaves, plan = compile_case(batch)
        expected = token_step(pixels, *leaves, plan)
        result = step(pixels, *leaves, plan)
        torch.testing.assert_close(result, expected)
        gradients = (torch.autograd.grad(loss, leaves) for loss in (result, expected))
        torch.testing.assert_close(*gradients)


def test_two_runs_give_the_same_bits():
    pixels, leaves, plan = compile_case(7)

    def run():
        loss = token_step(pixels, *leaves, plan)
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))


def test_the_number_of_threads_changes_no_bit(impl):
    if impl != "cpp":
        pytest.skip("torch promises no such thing")
    plan, threads = make_plan(5, (8, 12)), torch.get_num_threads()
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((10, 28, 33), (33,), (96, 33))]
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = assemble_decoder_input(leaves[0], [plan], *leaves[1:])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))
