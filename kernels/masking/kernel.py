"""Mask plans in Triton: rank by counting, bit-equal to reference.py.

One kernel writes a 63-bit key per token, the next ranks them: rank[t] = how many keys are smaller.
No sort network; each program owns BLOCK_T tokens of a sample and reads all its keys in chunks of
BLOCK_S. The keys go through memory (8 L bytes per sample) because a program that drew them anew
would spend most of its instructions on Philox: every thread needs every key of the chunk.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

BLOCK_T = 128
BLOCK_S = 16  # 32 makes ptxas spill on sm_100
NUM_WARPS = 4

_TIME = tl.constexpr(reference.MODES.index("time"))
_FREQ = tl.constexpr(reference.MODES.index("freq"))
_TF = tl.constexpr(reference.MODES.index("tf"))
_TUBE = tl.constexpr(reference.MODES.index("tube"))
_BLOCK = tl.constexpr(reference.MODES.index("block"))
_TOKENS = tl.constexpr(reference.TOKENS)
_COLUMNS = tl.constexpr(reference.COLUMNS)
_ROWS = tl.constexpr(reference.ROWS)
_TUBES = tl.constexpr(reference.TUBES)
_RECTANGLES = tl.constexpr(reference.RECTANGLES)
_DOMAIN_SHIFT = tl.constexpr(reference.DOMAIN_SHIFT)
_NUM_RECTANGLES = tl.constexpr(reference.NUM_RECTANGLES)
_INDEX_BITS = tl.constexpr(reference.INDEX_BITS)
_LAST_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def _philox_block(block, c1, c2, c3, k0, k1):
    """The four words of Philox4x32-10 for a tensor of block numbers; all operands uint32."""
    c0 = block
    c1, c2, c3 = c1 + block * 0, c2 + block * 0, c3 + block * 0
    for _ in tl.static_range(10):
        m0 = tl.full((), 0xD2511F53, tl.uint32)
        m1 = tl.full((), 0xCD9E8D57, tl.uint32)
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _words(index, DOMAIN: tl.constexpr, c1, c2, c3, k0, k1):
    """The random word of each index (int32) of a domain."""
    block = (index >> 2).to(tl.uint32) | tl.full((), DOMAIN << _DOMAIN_SHIFT, tl.uint32)
    w0, w1, w2, w3 = _philox_block(block, c1, c2, c3, k0, k1)
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def _count_smaller(words, index, N: tl.constexpr, DOMAIN: tl.constexpr, BLOCK: tl.constexpr,
                   c1, c2, c3, k0, k1):  # fmt: skip
    """Ranks of (words, index) among the N entries of a domain."""
    keys = (words.to(tl.int64) << _INDEX_BITS) | index
    rank = tl.zeros_like(index)
    for start in range(0, N, BLOCK):
        other = start + tl.arange(0, BLOCK)
        drawn = _words(other, DOMAIN, c1, c2, c3, k0, k1).to(tl.int64)
        others = tl.where(other < N, (drawn << _INDEX_BITS) | other, _LAST_KEY)
        rank += tl.sum((others[:, None] < keys[None, :]).to(tl.int32), axis=0)
    return rank


@triton.jit
def _axis_ranks(index, N: tl.constexpr, DOMAIN: tl.constexpr, BLOCK: tl.constexpr,
                c1, c2, c3, k0, k1):  # fmt: skip
    """The random rank of each index among the N rows, columns or tubes."""
    words = _words(index, DOMAIN, c1, c2, c3, k0, k1)
    return _count_smaller(words, index, N, DOMAIN, BLOCK, c1, c2, c3, k0, k1)


@triton.jit
def _below(word, bound):
    return ((word.to(tl.int64) * bound) >> 32).to(tl.int32)


@triton.jit
def _inside_rectangles(y, x, H: tl.constexpr, W: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
                       S2: tl.constexpr, S3: tl.constexpr, c1, c2, c3, k0, k1):  # fmt: skip
    inside = y < 0
    for r in tl.static_range(_NUM_RECTANGLES):
        block = tl.full((), (_RECTANGLES << _DOMAIN_SHIFT) + r, tl.uint32)
        w0, w1, w2, w3 = _philox_block(block, c1, c2, c3, k0, k1)
        height, width = S0 + _below(w0, S1 - S0 + 1), S2 + _below(w1, S3 - S2 + 1)
        top, left = _below(w2, H - height + 1), _below(w3, W - width + 1)
        inside |= (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return inside.to(tl.int32)


@triton.jit
def _classes(t, MODE: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
             S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
             BLOCK: tl.constexpr, c1, c2, c3, k0, k1):  # fmt: skip
    """Priority class of tokens t (int32). G1 x G2 are the last two axes of the grid."""
    row, column = t // G2 % G1, t % G2
    if MODE == _TUBE:
        return _axis_ranks(t % (G1 * G2), G1 * G2, _TUBES, BLOCK, c1, c2, c3, k0, k1)
    elif MODE == _BLOCK:
        return _inside_rectangles(row, column, G1, G2, S0, S1, S2, S3, c1, c2, c3, k0, k1)
    elif MODE == _TIME:
        return _axis_ranks(column, G2, _COLUMNS, BLOCK, c1, c2, c3, k0, k1)
    elif MODE == _FREQ:
        return _axis_ranks(row, G1, _ROWS, BLOCK, c1, c2, c3, k0, k1)
    elif MODE == _TF:
        y = _axis_ranks(row, G1, _ROWS, BLOCK, c1, c2, c3, k0, k1) >= G1 - S0
        x = _axis_ranks(column, G2, _COLUMNS, BLOCK, c1, c2, c3, k0, k1) >= G2 - S1
        return tl.where(y, tl.where(x, 1, 2), tl.where(x, 3, 0))
    else:
        return t * 0


# Seeds and steps that happen to be 1 or divisible by 16 must not compile another variant.
# The seed comes in signed halves: the interpreter goes by an argument's value, not by its
# annotation, and shifts one between 2^31 and 2^32 as a 32-bit number.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream"])
def mask_keys_kernel(
    sample_ids_ptr, step_ptr, keys_ptr, stride_ids,
    seed_low: tl.int32, seed_high: tl.int32, step: tl.int64, stream: tl.int64,
    L: tl.constexpr, MODE: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    HAS_STEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(class, random word, index) of each token, packed. Grid: B * cdiv(L, BLOCK_T)."""
    blocks: tl.constexpr = (L + BLOCK_T - 1) // BLOCK_T
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    sample_id = tl.load(sample_ids_ptr + b * stride_ids)
    now = tl.cast(step, tl.int64)
    if HAS_STEP:
        now += tl.load(step_ptr)
    k0, k1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    c1, c2 = sample_id.to(tl.uint32), now.to(tl.uint32)
    c3 = (((sample_id >> 32) & 0xFFFF) << 16 | MODE << 8 | tl.cast(stream, tl.int64)).to(tl.uint32)
    t = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    cls = _classes(t, MODE, G1, G2, S0, S1, S2, S3, BLOCK_S, c1, c2, c3, k0, k1)
    words = _words(t, _TOKENS, c1, c2, c3, k0, k1)
    keys = (((cls.to(tl.int64) << 32) | words) << _INDEX_BITS) | t
    tl.store(keys_ptr + b * L + t, keys, mask=t < L)


@triton.jit
def rank_keys_kernel(
    keys_ptr, token_of_rank_ptr, rank_of_token_ptr, L: tl.constexpr, UNIQUE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stable ascending ranks of int64 keys (B, L). Grid: B * cdiv(L, BLOCK_T)."""
    blocks: tl.constexpr = (L + BLOCK_T - 1) // BLOCK_T
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * L
    t = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    keys = tl.load(keys_ptr + row + t, mask=t < L, other=0)
    # Counts are summed over the chunks before the threads: one reduction in all.
    smaller = tl.zeros((BLOCK_S, BLOCK_T), tl.int32)
    for start in range(0, L, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        others = tl.load(keys_ptr + row + s, mask=s < L, other=_LAST_KEY)
        earlier = others[:, None] < keys[None, :]
        if not UNIQUE:
            tie = (others[:, None] == keys[None, :]) & (s[:, None] < t[None, :])
            earlier = earlier | tie
        smaller += earlier.to(tl.int32)
    rank = tl.sum(smaller, axis=0)
    tl.store(rank_of_token_ptr + row + t, rank.to(tl.int16), mask=t < L)
    tl.store(token_of_rank_ptr + row + rank, t.to(tl.int16), mask=t < L)


def mask_plan(
    sample_ids: Tensor,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    mode: int,
    grid: list[int],
    sizes: list[int],
) -> tuple[Tensor, Tensor]:
    """sample_ids (B,) int64 -> token_of_rank, rank_of_token (B, L) int16."""
    num_tokens = math.prod(grid)
    rows, columns = grid[-2:] if mode else (1, 1)
    keys = sample_ids.new_empty(sample_ids.shape[0], num_tokens)
    with torch.cuda.device_of(keys):
        mask_keys_kernel[_programs(keys)](
            sample_ids, step_tensor, keys, sample_ids.stride(0),
            _signed(seed & reference.WORD), _signed(seed >> 32), step, stream,
            num_tokens, mode, rows, columns, *(sizes + [0] * 4)[:4], step_tensor is not None,
            BLOCK_T, BLOCK_S, num_warps=NUM_WARPS,
        )  # fmt: skip
    return _rank(keys, unique=True)


def rank_noise(noise: Tensor) -> tuple[Tensor, Tensor]:
    """noise (B, L) floats -> token_of_rank, rank_of_token (B, L) int16."""
    # The bits of a double, negative ones flipped, are in the order of its values; + 0.0 merges the
    # two zeros and one NaN stands for all, above infinity.
    bits = (noise.double() + 0.0).masked_fill(noise.isnan(), math.nan).view(torch.int64)
    return _rank(torch.where(bits < 0, bits ^ (2**63 - 1), bits).contiguous(), unique=False)


def _rank(keys: Tensor, unique: bool) -> tuple[Tensor, Tensor]:
    token_of_rank = torch.empty_like(keys, dtype=torch.int16)
    rank_of_token = torch.empty_like(keys, dtype=torch.int16)
    with torch.cuda.device_of(keys):
        rank_keys_kernel[_programs(keys)](
            keys, token_of_rank, rank_of_token, keys.shape[1], unique, BLOCK_T, BLOCK_S,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return token_of_rank, rank_of_token


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - (word >> 31 << 32)


def _programs(keys: Tensor) -> tuple[int]:
    batch, num_tokens = keys.shape
    return (batch * triton.cdiv(num_tokens, BLOCK_T),)
