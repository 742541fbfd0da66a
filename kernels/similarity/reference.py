"""Similarities of clips of T frames, and the counts behind ranks, in plain PyTorch.

Letters: N clips of a, M clips of b, T frames each, D features. The README has the maths.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TINY_NORM = 1e-12  # smallest norm a frame is divided by
BLOCK_PRODUCTS = 2**24  # frame products alive at once: 64 MiB in float32
TILE_CLIPS = 256  # a side of a tile of ranks, where frames meet one by one
TILE_FRAMES = 1024  # the same in frames, where all meet all


def unit_frames(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """x (N, T, D) in `dtype`, each frame over its L2 norm."""
    x = x.to(dtype)
    if not normalize:
        return x
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY_NORM)


def frame_similarity(
    a: Tensor, b: Tensor, strategy: str, normalize: bool, dtype: torch.dtype
) -> Tensor:
    """a (N, T, D), b (M, T, D) -> (N, M), differentiable; holds some rows' products at a time."""
    a, b = unit_frames(a, dtype, normalize), unit_frames(b, dtype, normalize)
    if strategy in ("diagonal_mean", "mean"):
        return block_scores(a, b, strategy)
    frames, others = a.shape[1], b.shape[0]
    per_pair = frames * frames if strategy == "max" else frames
    step = max(1, BLOCK_PRODUCTS // max(1, others * per_pair))
    return torch.cat([block_scores(rows, b, strategy) for rows in a.split(step)])


def block_scores(a: Tensor, b: Tensor, strategy: str) -> Tensor:
    """Scores (n, m) of scaled frames a (n, T, D), b (m, T, D).

    The gradient of a maximum goes to the first of its equal products in (k, l) order.
    """
    frames = a.shape[1]
    if strategy == "diagonal_mean":
        return a.flatten(1) @ b.flatten(1).t() / frames
    if strategy == "mean":
        return a.mean(1) @ b.mean(1).t()
    if strategy == "diagonal_max":
        return torch.bmm(a.transpose(0, 1), b.permute(1, 2, 0)).max(0).values
    products = (a.flatten(0, 1) @ b.flatten(0, 1).t()).unflatten(0, (-1, frames))
    products = products.unflatten(2, (-1, frames)).transpose(1, 2).flatten(2)
    return products.max(2).values


def pair_counts(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    strategy: str,
    tolerance: float,
    relative: bool,
    tile_size: int,
) -> Tensor:
    """Compare every pair's score with those of its row and of its column: (4, N) int64.

    a, b (N, T, D); a_inverse, b_inverse (N, T) float64, what frames are multiplied by. Row 0: the
    clips of b more similar to a clip of a than its own pair; row 1: those as similar, the pair
    included (none if its score is NaN); rows 2, 3: the same per clip of b. Scores that differ by
    `tolerance` or less, times the pair's own if `relative`, are the same. tile_size: most clips on
    a side of a tile, 0 for the default.
    """
    most = TILE_CLIPS if strategy != "max" else max(1, TILE_FRAMES // a.shape[1])
    size = min(tile_size, most) if tile_size else most
    starts = range(0, a.shape[0], size)

    def tile(i: int, j: int) -> Tensor:
        x = a[i : i + size].double() * a_inverse[i : i + size, :, None]
        y = b[j : j + size].double() * b_inverse[j : j + size, :, None]
        return block_scores(x, y, strategy)

    counts = torch.zeros(4, a.shape[0], dtype=torch.int64, device=a.device)
    own = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
    for i, j, scores in _tiles_own_first(starts, tile):
        rows, columns = slice(i, i + size), slice(j, j + size)
        if i == j:
            own[rows] = scores.diagonal()
        for first, side, axis in ((0, rows, 1), (2, columns, 0)):
            pair = own[side].unsqueeze(axis)
            slack = tolerance * pair.abs().where(pair.isfinite(), 0) if relative else tolerance
            counts[first, side] += (scores > pair + slack).sum(axis)
            counts[first + 1, side] += (scores >= pair - slack).sum(axis)
    counts[1::2] -= counts[::2]
    return counts


def _tiles_own_first(
    starts: range, tile: Callable[[int, int], Tensor]
) -> Iterator[tuple[int, int, Tensor]]:
    """Every tile once; those on the diagonal, with the pairs' own scores, before all others."""
    for i in starts:
        yield i, i, tile(i, i)
    for i in starts:
        for j in starts:
            if i != j:
                yield i, j, tile(i, j)
