"""Mask plans in plain torch: the definition of `mask_rng` version 1 (contract in README.md).

Everything is integer arithmetic on Philox4x32-10 words, so every implementation gives these bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import floor_exact

# The index of a mode is its code in the Philox counter. Only ever append.
MODES = ("unstructured", "time", "freq", "tf", "tube", "block")
MAX_TOKENS = 32767  # ranks are int16
INDEX_BITS = 15

# What a draw is for: the top byte of the first counter word.
TOKENS, COLUMNS, ROWS, TUBES, RECTANGLES = range(5)
DOMAIN_SHIFT = 24
NUM_RECTANGLES = 4

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Draw(NamedTuple):
    """What selects random numbers besides the sample: 63-bit seed, 32-bit step, 8-bit stream."""

    seed: int
    step: int | Tensor
    stream: int
    mode: int


def mode_sizes(mode: str, grid: tuple[int, ...], mask_ratio: float) -> list[int]:
    """The integers a mode needs besides its grid; floats end here.

    tf: [masked rows, masked columns], 0.7 of the ratio on each axis as in CAV-MAE.
    block: [min height, max height, min width, max width] of the rectangles, whose areas add up
    to about mask_ratio of the image before they overlap.
    """
    if mode == "tf":
        return [floor_exact(0.7 * mask_ratio * axis) for axis in grid]
    if mode == "block":
        scale = (mask_ratio / NUM_RECTANGLES) ** 0.5
        sizes = []
        for axis in grid[-2:]:
            smallest = max(1, floor_exact(0.75 * scale * axis))
            sizes += [smallest, max(smallest, min(axis, floor_exact(1.25 * scale * axis)))]
        return sizes
    return []


def mask_plan(
    sample_ids: Tensor, draw: Draw, grid: tuple[int, ...], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """sample_ids (B,) int64 -> token_of_rank, rank_of_token (B, L) int16.

    Tokens are ordered by (class, 32-bit random word, index); the mode defines the class.
    """
    num_tokens = 1
    for axis in grid:
        num_tokens *= axis
    words = random_words(sample_ids, draw, TOKENS, num_tokens)
    classes = _classes(sample_ids, draw, grid, sizes)
    order, ranks = _order(words if classes is None else words + (classes << 32))
    return order.to(torch.int16), ranks.to(torch.int16)


def rank_noise(noise: Tensor) -> tuple[Tensor, Tensor]:
    """noise (B, L) floats -> the plan of their stable ascending order (NaN last)."""
    order = torch.sort(noise, dim=1, stable=True).indices
    return order.to(torch.int16), _inverse(order).to(torch.int16)


def random_words(sample_ids: Tensor, draw: Draw, domain: int, count: int) -> Tensor:
    """(B, count) int64 in [0, 2^32): word i & 3 of the Philox block number i >> 2 of a domain."""
    blocks = torch.arange(-(-count // 4), device=sample_ids.device) + (domain << DOMAIN_SHIFT)
    high = (sample_ids >> 32 & 0xFFFF) << 16 | draw.mode << 8 | draw.stream
    step = torch.as_tensor(draw.step, dtype=torch.int64, device=sample_ids.device) & WORD
    words = philox4x32(
        (blocks[None], (sample_ids & WORD)[:, None], step, high[:, None]),
        (draw.seed & WORD, draw.seed >> 32 & WORD),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) on broadcastable int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & WORD, k1 + _WEYL[1] & WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in halves so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    rest = a * (b >> 16) + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | low & 0xFFFF


def _classes(
    sample_ids: Tensor, draw: Draw, grid: tuple[int, ...], sizes: list[int]
) -> Tensor | None:
    """(B, L) int64 priority class of each token, lowest kept first; None where all are equal."""
    mode = MODES[draw.mode]
    if mode == "unstructured":
        return None
    if mode == "tube":
        return _axis_ranks(sample_ids, draw, TUBES, grid[1] * grid[2]).repeat(1, grid[0])
    if mode == "block":
        inside = _inside_rectangles(sample_ids, draw, grid[-2:], sizes)
        return inside.flatten(1).long().repeat(1, grid[0] if len(grid) == 3 else 1)
    rows, columns = grid
    if mode == "time":
        return _axis_ranks(sample_ids, draw, COLUMNS, columns).repeat(1, rows)
    if mode == "freq":
        return _axis_ranks(sample_ids, draw, ROWS, rows).repeat_interleave(columns, dim=1)
    row_masked = _axis_ranks(sample_ids, draw, ROWS, rows) >= rows - sizes[0]
    column_masked = _axis_ranks(sample_ids, draw, COLUMNS, columns) >= columns - sizes[1]
    y, x = row_masked[:, :, None].long(), column_masked[:, None, :].long()
    # neither 0, both 1, row only 2, column only 3: the first two views share no row and no column.
    return ((y ^ x) * (3 - y) + (y & x)).flatten(1)


def _inside_rectangles(
    sample_ids: Tensor, draw: Draw, grid: tuple[int, ...], sizes: list[int]
) -> Tensor:
    """(B, H, W) bool: covered by one of the sample's rectangles."""
    words = random_words(sample_ids, draw, RECTANGLES, 4 * NUM_RECTANGLES)
    words = words.unflatten(1, (NUM_RECTANGLES, 4))
    covered = []
    for axis, length in enumerate(grid):
        smallest, largest = sizes[2 * axis : 2 * axis + 2]
        extent = smallest + _below(words[..., axis], largest - smallest + 1)
        start = _below(words[..., 2 + axis], length - extent + 1)
        index = torch.arange(length, device=words.device)
        first, last = start[..., None], (start + extent)[..., None]
        covered.append((index >= first) & (index < last))
    return (covered[0][..., None] & covered[1][:, :, None]).any(1)


def _below(words: Tensor, bound: int | Tensor) -> Tensor:
    """Integers in [0, bound) from 32-bit words; bound < 2^15 keeps the bias under 2^-17."""
    return words * bound >> 32


def _axis_ranks(sample_ids: Tensor, draw: Draw, domain: int, length: int) -> Tensor:
    """(B, length) int64: a random rank for each row, column or tube."""
    return _order(random_words(sample_ids, draw, domain, length))[1]


def _order(keys: Tensor) -> tuple[Tensor, Tensor]:
    """keys (B, N) int64 below 2^48 -> indices in ascending order of (key, index), and the ranks."""
    index = torch.arange(keys.shape[1], device=keys.device)
    order = torch.sort(keys << INDEX_BITS | index, dim=1).values & MAX_TOKENS
    return order, _inverse(order)


def _inverse(order: Tensor) -> Tensor:
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, index)
