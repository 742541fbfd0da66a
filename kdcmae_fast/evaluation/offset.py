"""By how many frames a clip's sound is shifted against its picture.

A clip of T frames and T segments of sound has a T x T matrix of similarities, and a shift of the
sound shows as a diagonal off the main one. The clip's offset is that of the diagonal with the
highest mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class OffsetScore(NamedTuple):
    """The best offset of one clip, in frames, and the mean of every diagonal that was compared.

    offset: k > 0: the sound comes k frames before the picture it belongs to (it leads); k < 0: it
    comes after it (it lags). means: (2 K + 1,), of offsets -K ... K, K = `max_offset(T)`.
    """

    offset: int
    means: Tensor


class OffsetScores(NamedTuple):
    """`OffsetScore` of B clips: offset (B,) int64, means (B, 2 K + 1)."""

    offset: Tensor
    means: Tensor


def max_offset(num_frames: int) -> int:
    """K: the largest offset whose diagonal has at least T / 2 entries, half of T rounded down."""
    return num_frames // 2


def best_offset(similarity: Tensor) -> OffsetScore:
    """The offset k with the highest mean of the entries [i, i + k].

    similarity: (T, T), entry [i, j] of audio segment i with video frame j. Offsets whose diagonal
    has fewer than T / 2 entries are left out: a mean of few entries is high by chance too often. Of
    equal means the offset nearest to 0 counts, of -k and k the sound that leads.

    Errors: ValueError for another shape and for entries that are not finite.
    """
    if similarity.ndim != 2:
        raise ValueError(f"similarity must be (T, T), got {tuple(similarity.shape)}")
    found = best_offsets(similarity[None])
    return OffsetScore(int(found.offset), found.means[0])


def best_offsets(similarity: Tensor) -> OffsetScores:
    """`best_offset` of every clip, similarity (B, T, T)."""
    if similarity.ndim != 3 or similarity.shape[1] != similarity.shape[2] or not similarity.numel():
        raise ValueError(
            f"similarity must be (B, T, T), B and T at least 1, got {tuple(similarity.shape)}"
        )
    if not similarity.isfinite().all():
        raise ValueError("similarity has entries that are not finite; check the clip's features")
    reach = max_offset(similarity.shape[1])
    offsets = torch.arange(-reach, reach + 1, device=similarity.device)
    means = torch.stack(
        [similarity.diagonal(k, 1, 2).mean(1) for k in range(-reach, reach + 1)], dim=1
    )
    nearness = -2 * offsets.abs() + (offsets > 0).long()  # all different, 0 is nearest
    candidates = nearness.where(means == means.amax(1, keepdim=True), nearness.min() - 1)
    return OffsetScores(offsets[candidates.argmax(1)], means)
