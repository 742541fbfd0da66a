"""Fixed sine-cosine position tables of the patch grids (MAE, arXiv 2111.06377)."""

import torch
from torch import Tensor


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Position table of a (rows, columns) grid: (rows * columns, dim) float64, row-major.

    With w_k = 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1, the token at (row r, column c) has
    [sin(c w), cos(c w), sin(r w), cos(r w)]: the column (audio: time, image: x) comes first.
    dim: a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4 for a two-axis position table")
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * omega for n in grid)
    across = torch.cat([columns.sin(), columns.cos()], dim=1).repeat(grid[0], 1)
    down = torch.cat([rows.sin(), rows.cos()], dim=1).repeat_interleave(grid[1], dim=0)
    return torch.cat([across, down], dim=1)
