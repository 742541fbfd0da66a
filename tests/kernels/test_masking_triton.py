"""kernels/masking in Triton: the same bits as the reference."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdcmae_fast.kernels import complementary_masks

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/masks/mask_rng_1.json").read_text())
GRIDS = {
    "unstructured": (7, 9), "time": (3, 13), "freq": (13, 3), "tf": (7, 9),
    "tube": (3, 4, 5), "block": (7, 9),
}  # fmt: skip

pytestmark = pytest.mark.triton


@pytest.fixture
def large_blocks(triton_device, monkeypatch):
    """Fewer and larger programs: the interpreter pays by the program. No registers hold them."""
    if triton_device == "cpu":
        from kdcmae_fast.kernels.masking import kernel

        monkeypatch.setattr(kernel, "BLOCK_T", 1024)
        monkeypatch.setattr(kernel, "BLOCK_S", 256)


def both(device, sample_ids, grid, ratio=0.75, **options):
    """The plan by Triton on `device` and by the reference, both on the CPU."""
    ours = complementary_masks(
        sample_ids.to(device), grid, ratio, num_views=1, impl="triton", **options
    )
    return ours.to("cpu"), complementary_masks(
        sample_ids, grid, ratio, num_views=1, impl="torch", **options
    )


def assert_equal(ours, reference):
    assert torch.equal(ours.token_of_rank, reference.token_of_rank)
    assert torch.equal(ours.rank_of_token, reference.rank_of_token)


@pytest.mark.parametrize("mode", GRIDS)
def test_modes(mode, triton_device):
    ids = torch.tensor([0, 2**48 - 1])
    options = {"mode": mode, "seed": 2**63 - 1, "step": 2**32 - 1, "stream": 255}
    assert_equal(*both(triton_device, ids, GRIDS[mode], **options))


def test_block_of_three_axes(triton_device):
    assert_equal(*both(triton_device, torch.tensor([5]), (3, 5, 6), mode="block"))


@pytest.mark.parametrize("grid", [(1,), (49,), (14, 14), (130,)])
def test_token_counts(grid, triton_device):
    assert_equal(*both(triton_device, torch.tensor([3]), grid, 0.0))


@pytest.mark.parametrize("grid", [(8, 64), (35, 16), (1568,)])
def test_many_tokens(grid, triton_device, large_blocks):
    assert_equal(*both(triton_device, torch.tensor([3]), grid))


@settings(max_examples=10, deadline=None)
@example(mode="unstructured", axes=(2, 2, 1), seed=2**31 + 1, sample_id=0)
@given(
    mode=st.sampled_from(sorted(GRIDS)),
    axes=st.tuples(*[st.integers(1, 7)] * 3),
    seed=st.integers(0, 2**63 - 1),
    sample_id=st.integers(0, 2**48 - 1),
)
def test_any_grid(mode, axes, seed, sample_id, triton_device):
    ids, grid = torch.tensor([sample_id]), axes[: len(GRIDS[mode])]
    assert_equal(*both(triton_device, ids, grid, 0.0, mode=mode, seed=seed))


def test_step_as_a_tensor(triton_device):
    ids = torch.arange(2)
    step = torch.tensor(41, device=triton_device)
    ours = complementary_masks(ids.to(triton_device), (7, 7), 0.75, step=step, impl="triton")
    assert_equal(ours.to("cpu"), complementary_masks(ids, (7, 7), 0.75, step=41, impl="torch"))


def test_strided_ids_and_empty_batch(triton_device):
    assert_equal(*both(triton_device, torch.arange(6)[::3], (7, 7)))
    empty = complementary_masks(torch.arange(0, device=triton_device), (7, 7), 0.75, impl="triton")
    assert empty.token_of_rank.shape == (0, 49)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise(dtype, triton_device):
    noise = torch.randint(-9, 9, (2, 49)).to(dtype) / 8
    noise[0, 3] = noise[0, 30] = float("nan")
    noise[0, 4], noise[0, 5] = float("inf"), float("-inf")
    noise[1, 7] = -0.0
    ids = torch.arange(2)
    ours = complementary_masks(
        ids.to(triton_device), (7, 7), 0.75, noise=noise.to(triton_device), impl="triton"
    )
    assert_equal(ours.to("cpu"), complementary_masks(ids, (7, 7), 0.75, noise=noise, impl="torch"))


@pytest.mark.parametrize("case", GOLDEN["plans"], ids=lambda case: case["name"])
def test_golden(case, triton_device, large_blocks):
    ids = torch.tensor(case["sample_ids"][:1], device=triton_device)
    plan = complementary_masks(
        ids, tuple(case["grid"]), case["mask_ratio"], num_views=1, mode=case["mode"],
        seed=case["seed"], step=case["step"], stream=case["stream"], impl="triton",
    )  # fmt: skip
    assert plan.token_of_rank.tolist() == case["token_of_rank"][:1]


@pytest.mark.parametrize("name", ["mask_plan_triton", "rank_noise_triton"])
def test_opcheck(name, triton_device):
    ids, noise = torch.arange(2, device=triton_device), torch.rand(2, 6, device=triton_device)
    arguments = (noise,) if name == "rank_noise_triton" else (ids, None, 1, 2, 3, 1, [2, 3], [])
    torch.library.opcheck(getattr(torch.ops.kdcmae_fast, name).default, arguments)
