"""kernels/masking at its edges: noise, empty batches, errors, registration, compilation."""

import pytest
import torch

from kdcmae_fast.kernels import MaskPlan, complementary_masks
from kdcmae_fast.kernels.common import unavailable
from kdcmae_fast.kernels.masking import len_keep

OP = "complementary_masks"  # of the fixture impl


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_is_ranked_stably(dtype, impl):
    noise = torch.randint(-9, 9, (5, 196)).to(dtype) / 8
    noise[0, 3] = noise[0, 77] = float("nan")
    noise[0, 4], noise[0, 5] = float("inf"), float("-inf")
    noise[1, 7] = -0.0
    plan = complementary_masks(torch.arange(5), (14, 14), 0.75, noise=noise, impl=impl)
    order = noise.argsort(dim=1, stable=True)
    assert torch.equal(plan.token_of_rank.long(), order)
    assert torch.equal(plan.ids_restore(0), order.argsort(dim=1))
    strided = noise.repeat_interleave(2, dim=1)[:, ::2]
    again = complementary_masks(torch.arange(5), (14, 14), 0.75, noise=strided, impl=impl)
    assert torch.equal(again.rank_of_token, plan.rank_of_token)


def test_empty_and_strided_batches(impl):
    for options in ({}, {"mode": "block"}, {"noise": torch.rand(0, 196)}):
        plan = complementary_masks(torch.arange(0), (14, 14), 0.75, impl=impl, **options)
        assert plan.token_of_rank.shape == (0, 196) and plan.mask(1).shape == (0, 196)
    every, strided = torch.arange(12)[::3].clone(), torch.arange(12)[::3]
    plans = [complementary_masks(ids, (7, 7), 0.75, impl=impl) for ids in (every, strided)]
    assert torch.equal(plans[0].token_of_rank, plans[1].token_of_rank)


def test_everything_masked_and_everything_kept(impl):
    none = complementary_masks(torch.arange(2), (7, 7), 1.0, num_views=3, impl=impl)
    assert none.ids_keep(2).shape == (2, 0) and none.mask(0).mean() == 1
    whole = complementary_masks(torch.arange(2), (7, 7), 0.0, num_views=1, impl=impl)
    assert whole.ids_masked(0).shape == (2, 0) and whole.mask(0).sum() == 0


@pytest.mark.parametrize(
    "tokens, ratio, keep",
    [(512, 0.75, 128), (196, 0.75, 49), (196, 0.9, 19), (640, 0.9, 64), (10, 0.55, 4),
     (208, 0.75, 52), (32767, 0.999, 32), (3, 1 / 3, 2), (7, 0.0, 7), (7, 1.0, 0)],
)  # fmt: skip
def test_len_keep(tokens, ratio, keep):
    assert len_keep(tokens, ratio) == keep


def test_cat_stacks_plans_and_to_moves_them():
    plans = [
        complementary_masks(torch.arange(3), (7, 7), 0.75, num_views=1, stream=stream)
        for stream in (0, 1)
    ]
    both = MaskPlan.cat(plans)
    assert both.token_of_rank.shape == (6, 49) and both[2:] == plans[0][2:]
    assert torch.equal(both.ids_keep(0), torch.cat([plan.ids_keep(0) for plan in plans]))
    assert both.to("meta").rank_of_token.device.type == "meta"
    with pytest.raises(ValueError, match=r"plans differ in .*\(12, 1, 49\), \(24, 1, 49\)"):
        MaskPlan.cat([plans[0], complementary_masks(torch.arange(3), (7, 7), 0.5, num_views=1)])
    with pytest.raises(ValueError, match="plans is empty"):
        MaskPlan.cat([])
    with pytest.raises(ValueError, match=r"view=1 is not in 0\.\.0"):
        both.ids_keep(1)


IDS = torch.arange(2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_ratio": 0.6}, "num_views=3 disjoint views of 78 visible tokens .* 196 tokens"),
        ({"mask_ratio": "3/4"}, "mask_ratio must be a number, got '3/4'"),
        ({"mask_ratio": 1.1}, r"mask_ratio=1.1 is not in 0\.\.1"),
        ({"mask_ratio": 0.999}, "mask_ratio=0.999 keeps none of 196 tokens"),
        ({"num_views": 0}, "num_views=0 is not at least 1"),
        ({"num_views": 2.0}, "num_views=2.0 is not an int"),
        ({"mode": "diagonal"}, "mode='diagonal' is not one of unstructured, time"),
        ({"mode": "tube"}, r"grid=\(14, 14\) has 2 axes, mode 'tube' needs 3"),
        ({"mode": "time", "grid": (2, 3, 4)}, "has 3 axes, mode 'time' needs 2"),
        ({"grid": (0, 4)}, r"grid must be a tuple of positive ints, got \(0, 4\)"),
        ({"grid": 14}, "grid must be a tuple of positive ints, got 14"),
        ({"grid": (256, 128)}, r"grid=\(256, 128\) has 32768 tokens, at most 32767"),
        ({"sample_ids": IDS[None]}, r"sample_ids must be \(B,\), got shape \(1, 2\)"),
        ({"sample_ids": IDS.int()}, "sample_ids must be one of int64, got torch.int32"),
        ({"sample_ids": [0, 1]}, r"sample_ids must be a tensor \(B,\), got list"),
        ({"seed": -1}, "seed=-1 is not in"),
        ({"seed": 0.5}, "seed=0.5 is not an int"),
        ({"step": 1.0}, "step=1.0 is not an int"),
        ({"stream": 1.0}, "stream=1.0 is not an int"),
        ({"seed": 2**63}, "seed=9223372036854775808 is not in"),
        ({"step": 2**32}, "step=4294967296 is not in"),
        ({"step": torch.tensor([1])}, r"step must be an int or a 0-d int64 tensor .* \(1,\)"),
        ({"stream": 256}, "stream=256 is not in"),
        ({"noise": torch.rand(2, 195)}, r"noise must be \(B, L\) = \(2, 196\), got \(2, 195\)"),
        ({"noise": torch.ones(2, 196).long()}, "noise must be one of .*, got torch.int64"),
        ({"noise": torch.rand(2, 196, device="meta")}, "noise is on meta, sample_ids on cpu"),
        ({"noise": torch.rand(2, 196), "mode": "block"}, "mode='block' does not go with noise"),
        ({"impl": "cuda"}, "impl='cuda' of complementary_masks is not available here"),
        ({"impl": "fast"}, "impl='fast' is not one of"),
    ],
)
def test_errors(options, message):
    arguments = {"sample_ids": IDS, "grid": (14, 14), "mask_ratio": 0.75, "num_views": 3, **options}
    with pytest.raises(ValueError, match=message):
        complementary_masks(**arguments)


@pytest.mark.parametrize("step_tensor", [None, torch.tensor(3)])
def test_opcheck_plan(step_tensor, impl):
    op = getattr(torch.ops.kdcmae_fast, "mask_plan" if impl == "torch" else "mask_plan_cpp")
    torch.library.opcheck(op.default, (torch.arange(3), step_tensor, 1, 2, 3, 3, [4, 6], [2, 3]))


def test_opcheck_noise(impl):
    op = getattr(torch.ops.kdcmae_fast, "rank_noise" if impl == "torch" else "rank_noise_cpp")
    torch.library.opcheck(op.default, (torch.rand(3, 8),))


def test_compiles_whole_for_any_batch_and_step(impl):
    from torch._dynamo.testing import CompileCounterWithBackend

    recorded = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=recorded)
    def masks(ids, step):
        plan = complementary_masks(ids, (4, 6), 0.75, mode="time", step=step, impl=impl)
        return plan.ids_keep(1), plan.mask(0)

    for batch, step in ((3, 5), (4, 6), (9, 1000), (17, 2**31)):
        ids = torch.arange(batch)
        plan = complementary_masks(ids, (4, 6), 0.75, mode="time", step=step, impl=impl)
        keep, mask = masks(ids, step)
        assert torch.equal(keep, plan.ids_keep(1)) and torch.equal(mask, plan.mask(0))
    assert recorded.frame_count == 1


@pytest.mark.skipif(
    unavailable("complementary_masks", "cpp", "cpu") is not None, reason="kdcmae_fast._C not built"
)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.arange(3).int(), None, 0, 0, 0, 0, [4], []), "sample_ids must be"),
        ((torch.arange(3), None, 0, 0, 0, 9, [4], []), "mode 9"),
        ((torch.arange(3), None, 0, 0, 0, 1, [4], []), "needs a grid of 2 axes"),
        ((torch.arange(3), None, 0, 0, 0, 5, [4, 4], [1, 5, 1, 2]), "rectangle side 1..5"),
        ((torch.arange(3), None, 0, 0, 0, 0, [200, 200], []), "40000 tokens"),
    ],
)
def test_the_compiled_op_checks_what_it_indexes_with(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.kdcmae_fast.mask_plan_cpp(*arguments)
