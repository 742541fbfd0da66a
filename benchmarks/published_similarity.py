"""The published CAV-MAE Sync retrieval evaluation, in our own words, timed on a sample of pairs.

A Python loop over all pairs of clips calls one NumPy cosine per pair of frames, each of which moves
two rows out of a tensor and takes the norms of vectors that are unit length already. Then every row
is sorted. It runs once per direction.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def frame_cosine(x: Tensor, y: Tensor) -> float:
    """Cosine of two frames (D,), through NumPy."""
    x_row, y_row = x.cpu().numpy(), y.cpu().numpy()
    return np.dot(x_row, y_row) / (
        np.linalg.norm(x.cpu().numpy()) * np.linalg.norm(y.cpu().numpy())
    )


def pair_similarity(x: Tensor, y: Tensor, strategy: str) -> float:
    """Two clips (T, D) -> one number."""
    frames = range(len(x))
    if strategy.startswith("diagonal"):
        cosines = [frame_cosine(x[k], y[k]) for k in frames]
    else:
        cosines = [frame_cosine(x[k], y[l]) for k in frames for l in frames]  # noqa: E741
    return max(cosines) if strategy.endswith("max") else float(np.mean(cosines))


def similarity(a: Tensor, b: Tensor, strategy: str) -> Tensor:
    """a (N, T, D), b (M, T, D) -> (N, M), pair by pair."""
    rows = [[pair_similarity(x, y, strategy) for y in b] for x in a]
    return torch.tensor(rows, dtype=torch.float64)


def ranks(similarity: Tensor) -> Tensor:
    """Places of the true pairs in the sorted rows of (N, N), every tied place listed."""
    rows = similarity.numpy()
    ordered = -np.sort(-rows, axis=1)
    return torch.from_numpy(np.where(ordered == rows.diagonal()[:, None])[1])


def seconds_of_both_directions(
    a: Tensor, b: Tensor, strategy: str, pairs: int, repeats: int
) -> Iterator[float]:
    """Extrapolated: the time of `pairs` random pairs, times all pairs of both directions.

    Each repeat takes other pairs. Sorting and extracting features are left out, in our disfavour.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        chosen = torch.randint(len(a), (pairs, 2), generator=generator).tolist()
        start = time.perf_counter()
        for i, j in chosen:
            pair_similarity(a[i], b[j], strategy)
        yield (time.perf_counter() - start) / pairs * 2 * len(a) * len(b)
