"""kernels/masking: the contract, restated with Python integers, and what follows from it."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcmae_fast.kernels import complementary_masks
from kdcmae_fast.kernels.common import unavailable
from kdcmae_fast.kernels.masking import len_keep
from kdcmae_fast.kernels.masking.reference import MODES, philox4x32

OP = "complementary_masks"  # of the fixture impl
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/masks/mask_rng_1.json").read_text())
GRIDS = {
    "unstructured": (14, 14), "time": (8, 64), "freq": (8, 64), "tf": (8, 64),
    "tube": (4, 7, 7), "block": (14, 14),
}  # fmt: skip


def philox(counter, key):
    """Philox4x32-10 on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b % 2**32, a >> 32 ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def plan_by_hand(sample_id, grid, ratio, mode, seed=0, step=0, stream=0):
    """token_of_rank of one sample, straight from kernels/masking/README.md."""

    def words(domain, count):
        high = (sample_id >> 32) % 2**16 << 16 | MODES.index(mode) << 8 | stream
        blocks = (
            philox(
                (domain << 24 | block, sample_id % 2**32, step, high), (seed % 2**32, seed >> 32)
            )
            for block in range(math.ceil(count / 4))
        )
        return [word for block in blocks for word in block][:count]

    def floor(value):
        return math.floor(value + 1e-6)

    def ranks(domain, count):
        drawn = words(domain, count)
        order = sorted(range(count), key=lambda i: (drawn[i], i))
        return [order.index(i) for i in range(count)]

    rows, columns = grid[-2:] if len(grid) > 1 else (1, grid[0])
    if mode == "unstructured":
        classes = [0] * math.prod(grid)
    elif mode == "time":
        rank = ranks(1, columns)
        classes = [rank[x] for _ in range(rows) for x in range(columns)]
    elif mode == "freq":
        rank = ranks(2, rows)
        classes = [rank[y] for y in range(rows) for _ in range(columns)]
    elif mode == "tf":
        row, column = ranks(2, rows), ranks(1, columns)
        y_masked = [r >= rows - floor(0.7 * ratio * rows) for r in row]
        x_masked = [r >= columns - floor(0.7 * ratio * columns) for r in column]
        classes = [[[0, 3], [2, 1]][y][x] for y in y_masked for x in x_masked]
    elif mode == "tube":
        classes = ranks(3, rows * columns) * grid[0]
    else:
        classes = [0] * (rows * columns)
        drawn = words(4, 16)
        for w in (drawn[0:4], drawn[4:8], drawn[8:12], drawn[12:16]):
            extents, starts = [], []
            for word, place, axis in zip(w[:2], w[2:], (rows, columns), strict=True):
                side = math.sqrt(ratio / 4) * axis
                low = max(1, floor(0.75 * side))
                high = max(low, min(axis, floor(1.25 * side)))
                extents.append(low + (word * (high - low + 1) >> 32))
                starts.append(place * (axis - extents[-1] + 1) >> 32)
            for y in range(starts[0], starts[0] + extents[0]):
                for x in range(starts[1], starts[1] + extents[1]):
                    classes[y * columns + x] = 1
        classes *= grid[0] if len(grid) == 3 else 1
    drawn = words(0, len(classes))
    return sorted(range(len(classes)), key=lambda t: (classes[t], drawn[t], t))


def digest(plan):
    return hashlib.sha256(plan.token_of_rank.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # from the authors' Random123 distribution, kat_vectors
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(word) for word in counter), tuple(key))
    assert [word.item() for word in words] == expected
    assert list(philox(counter, key)) == expected


@pytest.mark.parametrize("case", GOLDEN["plans"], ids=lambda case: case["name"])
def test_golden_plans(case, impl):
    plan = complementary_masks(
        torch.tensor(case["sample_ids"]), tuple(case["grid"]), case["mask_ratio"], num_views=1,
        mode=case["mode"], seed=case["seed"], step=case["step"], stream=case["stream"], impl=impl,
    )  # fmt: skip
    assert plan.token_of_rank.tolist() == case["token_of_rank"]


@pytest.mark.parametrize("case", GOLDEN["digests"], ids=lambda case: case["name"])
def test_golden_digests(case, impl):
    plan = complementary_masks(
        torch.arange(64), tuple(case["grid"]), case["mask_ratio"], num_views=1,
        mode=case["mode"], seed=case["seed"], step=case["step"], stream=case["stream"], impl=impl,
    )  # fmt: skip
    assert digest(plan) == case["sha256"]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    axes=st.tuples(*[st.integers(1, 9)] * 3),
    ratio=st.integers(0, 100),
    draw=st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255)),
    sample_id=st.integers(0, 2**48 - 1),
)
def test_equals_the_contract_restated(mode, axes, ratio, draw, sample_id):
    grid = axes[: len(GRIDS[mode])]
    ratio = ratio / 100 if len_keep(math.prod(grid), ratio / 100) else 0.0
    seed, step, stream = draw
    expected = plan_by_hand(sample_id, grid, ratio, mode, seed, step, stream)
    for impl in ("torch", "cpp"):
        if unavailable("complementary_masks", impl, "cpu"):
            continue
        plan = complementary_masks(
            torch.tensor([sample_id]), grid, ratio, num_views=1, mode=mode,
            seed=seed, step=step, stream=stream, impl=impl,
        )  # fmt: skip
        assert plan.token_of_rank.tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    axes=st.tuples(*[st.integers(1, 12)] * 3),
    ratio=st.floats(0, 1),
    num_views=st.integers(1, 4),
    batch=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_plans_are_disjoint_exact_and_invertible(mode, axes, ratio, num_views, batch, seed):
    grid = axes[: len(GRIDS[mode])]
    tokens = math.prod(grid)
    if num_views * len_keep(tokens, ratio) > tokens or (ratio < 1 and not len_keep(tokens, ratio)):
        return
    plan = complementary_masks(
        torch.arange(batch), grid, ratio, num_views=num_views, mode=mode, seed=seed
    )
    assert plan.token_of_rank.dtype == plan.rank_of_token.dtype == torch.int16
    check_plan(plan, batch, tokens, num_views)


def check_plan(plan, batch, tokens, num_views):
    everything = torch.arange(tokens).expand(batch, tokens)
    assert torch.equal(plan.token_of_rank.long().sort(1).values, everything)
    seen = torch.zeros(batch, tokens)
    for view in range(num_views):
        keep, masked, restore = plan.ids_keep(view), plan.ids_masked(view), plan.ids_restore(view)
        assert keep.dtype == masked.dtype == restore.dtype == torch.int64
        assert keep.shape == (batch, plan.len_keep)
        assert torch.equal(torch.cat([keep, masked], 1).gather(1, restore), everything)
        mask = plan.mask(view)
        assert mask.dtype == torch.float32
        assert torch.equal(mask, torch.ones(batch, tokens).scatter(1, keep, 0.0))
        seen += 1 - mask
    assert (seen <= 1).all()
    assert torch.equal(seen.sum(1), torch.full((batch,), float(num_views * plan.len_keep)))


@pytest.mark.parametrize("grid", [(49,), (14, 14), (8, 64), (35, 16), (1568,)])
@pytest.mark.parametrize("num_views", [1, 2, 3, 4])
def test_sizes(grid, num_views, impl):
    ids = torch.randint(0, 2**48, (3,))
    plan = complementary_masks(ids, grid, 0.77, num_views=num_views, impl=impl)
    assert plan.len_keep == math.floor(math.prod(grid) * 0.23)
    check_plan(plan, 3, math.prod(grid), num_views)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_has_its_plan_in_every_batch(mode, impl):
    ids = torch.randint(0, 2**48, (65,))
    grid, options = GRIDS[mode], {"mode": mode, "seed": 11, "step": 5, "impl": impl}
    plan = complementary_masks(ids, grid, 0.75, **options)
    shuffle = torch.randperm(65)
    shuffled = complementary_masks(ids[shuffle], grid, 0.75, **options)
    assert torch.equal(shuffled.token_of_rank, plan.token_of_rank[shuffle])
    part = complementary_masks(ids[::7], grid, 0.75, **options)
    assert torch.equal(part.rank_of_token, plan.rank_of_token[::7])


@pytest.mark.parametrize("mode", MODES)
def test_implementations_agree(mode, impl):
    for batch in (1, 3, 257):
        ids = torch.randint(-(2**63), 2**63 - 1, (batch,))
        ours, reference = (
            complementary_masks(ids, GRIDS[mode], 0.75, mode=mode, seed=2**40, impl=which)
            for which in (impl, "torch")
        )
        assert torch.equal(ours.token_of_rank, reference.token_of_rank)
        assert torch.equal(ours.rank_of_token, reference.rank_of_token)


def test_every_input_changes_the_plan(impl):
    def draw(sample_id=3, mode="unstructured", **options):
        plan = complementary_masks(
            torch.tensor([sample_id]), (8, 64), 0.75, mode=mode, impl=impl, **options
        )
        return plan.token_of_rank.tolist()

    plans = [
        draw(), draw(4), draw(3 + 2**32), draw(seed=1), draw(seed=2**32), draw(step=1),
        draw(stream=1), draw(mode="block"),
    ]  # fmt: skip
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_step_as_a_tensor(impl):
    ids = torch.arange(4)
    for step in (0, 7, 2**32 - 1):
        plans = [
            complementary_masks(ids, (7, 7), 0.75, step=value, impl=impl)
            for value in (step, torch.tensor(step))
        ]
        assert torch.equal(plans[0].token_of_rank, plans[1].token_of_rank)


def chi_squared_z(counts, expected, degrees):
    """How many standard deviations the chi-squared statistic is from its mean."""
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("mode", ["unstructured", "time", "freq", "tube"])
def test_permutations_are_uniform(mode):
    grid = {"tube": (2, 3, 4)}.get(mode, (4, 6))
    batch, tokens = 40_000, 24
    plan = complementary_masks(torch.arange(batch), grid, 0.75, mode=mode, seed=1)
    table = torch.zeros(tokens, tokens, dtype=torch.float64)
    rank = plan.rank_of_token.long()
    for token in range(tokens):
        table[token] = rank[:, token].bincount(minlength=tokens)
    # Each token takes each rank equally often: rows and columns of the table sum to `batch`.
    assert abs(chi_squared_z(table, batch / tokens, (tokens - 1) ** 2)) < 4 * (
        1 + (mode != MODES[0])
    )


def test_pairs_are_kept_together_as_often_as_chance():
    batch, tokens, keep = 40_000, 12, 4
    plan = complementary_masks(torch.arange(batch), (12,), 1 - keep / tokens, seed=2)
    for view in range(2):
        kept = 1 - plan.mask(view).double()
        together = (kept.T @ kept)[tuple(torch.triu_indices(tokens, tokens, 1))]
        chance = batch * keep * (keep - 1) / (tokens * (tokens - 1))
        z = (together - chance) / math.sqrt(chance * (1 - chance / batch))
        assert z.abs().max() < 4.5


def kept_map(plan, view, grid):
    return 1 - plan.mask(view).view(-1, *grid)


def test_time_and_freq_views_own_columns_and_rows(impl):
    ids = torch.arange(32)
    columns = complementary_masks(ids, (8, 64), 0.75, num_views=4, mode="time", impl=impl)
    rows = complementary_masks(ids, (8, 64), 0.75, num_views=4, mode="freq", impl=impl)
    for view in range(4):
        kept = kept_map(columns, view, (8, 64))
        assert torch.equal(kept.sum(1), 8 * kept[:, 0]) and kept[:, 0].sum() == 32 * 16
        kept = kept_map(rows, view, (8, 64))
        assert torch.equal(kept.sum(2), 64 * kept[:, :, 0]) and kept[:, :, 0].sum() == 32 * 2


def test_tf_views_own_sub_grids(impl):
    plan = complementary_masks(torch.arange(32), (8, 64), 0.75, mode="tf", impl=impl)
    first, second = kept_map(plan, 0, (8, 64)), kept_map(plan, 1, (8, 64))
    # 33 of 64 columns and 4 of 8 rows are masked: 4 x 31 of the 128 tokens are the sub-grid.
    for kept, width in ((first, 31), (second, 33)):
        rows = kept.sum(2) >= width - 4
        assert rows.sum(1).eq(4).all()
    assert ((first.sum(2) >= 27) & (second.sum(2) >= 27)).sum() == 0


def test_tube_masks_are_constant_in_time(impl):
    plan = complementary_masks(torch.arange(32), (8, 14, 14), 0.75, mode="tube", impl=impl)
    for view in range(2):
        kept = kept_map(plan, view, (8, 14, 14))
        assert torch.equal(kept, kept[:, :1].expand_as(kept))


def test_blocks_are_kept_last(impl):
    plan = complementary_masks(
        torch.arange(200), (14, 14), 0.75, num_views=1, mode="block", impl=impl
    )
    removed = plan.mask(0).view(200, 1, 14, 14)
    whole = torch.nn.functional.avg_pool2d(removed, 4, stride=1) == 1
    assert whole.flatten(1).any(1).all(), "the smallest rectangle is 4 x 4"
    assert removed.mean() == 147 / 196
