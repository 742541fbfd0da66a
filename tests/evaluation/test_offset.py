"""The offset of a clip's sound: against a loop, known shifts, ties, and what is refused."""

import pytest
import torch

from kdcmae_fast.evaluation.offset import best_offset, best_offsets, max_offset


def by_loop(similarity: torch.Tensor) -> tuple[int, list[float]]:
    """Every offset with at least T / 2 entries, from the smallest; the nearest to 0 of equals."""
    size = len(similarity)
    means = {}
    for k in range(-size + 1, size):
        entries = [float(similarity[i, i + k]) for i in range(size) if 0 <= i + k < size]
        if len(entries) >= size / 2:
            means[k] = sum(entries) / len(entries)
    best = max(means, key=lambda k: (means[k], -abs(k), k))
    return best, list(means.values())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_equals_the_loop(size):
    matrices = torch.randn(9, size, size, dtype=torch.float64)
    found = best_offsets(matrices)
    assert found.means.shape == (9, 2 * max_offset(size) + 1)
    for row, matrix in enumerate(matrices):
        offset, means = by_loop(matrix)
        alone = best_offset(matrix)
        assert offset == alone.offset == found.offset[row]
        torch.testing.assert_close(alone.means, torch.tensor(means, dtype=torch.float64))
        assert torch.equal(alone.means, found.means[row])


@pytest.mark.parametrize("shift", range(-5, 6))
def test_a_known_shift_is_found(shift):
    """Frames of a random walk; segment i has what frame i + shift shows, so the sound leads."""
    walk = torch.randn(30, 8).cumsum(0)
    video, audio = walk[10:20], walk[10 + shift : 20 + shift]
    units = (torch.nn.functional.normalize(x, dim=1) for x in (audio, video))
    sound, picture = units
    assert best_offset(sound @ picture.t()).offset == shift


def test_equal_means_take_the_nearest_offset_and_then_the_leading_sound():
    assert best_offset(torch.ones(6, 6)).offset == 0
    both = torch.zeros(5, 5)
    both.diagonal(2).fill_(1)
    both.diagonal(-2).fill_(1)
    assert best_offset(both).offset == 2
    both.diagonal(-1).fill_(1)
    assert best_offset(both).offset == -1


def test_a_short_diagonal_does_not_count():
    matrix = torch.zeros(8, 8)
    matrix[0, 7] = matrix[7, 0] = 100
    matrix.diagonal(4).fill_(1)  # 4 of 8 entries: the shortest that counts
    assert best_offset(matrix).offset == 4


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (torch.zeros(3, 4), r"must be \(B, T, T\).* got \(1, 3, 4\)"),
        (torch.zeros(2, 3, 3), r"must be \(T, T\), got \(2, 3, 3\)"),
        (torch.zeros(0, 0), "B and T at least 1"),
        (torch.full((2, 2), float("nan")), "not finite"),
    ],
)
def test_what_is_no_matrix_is_refused(similarity, message):
    with pytest.raises(ValueError, match=message):
        best_offset(similarity)
