"""Position tables of sound of another length. Rows: mel bands; columns: steps in time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcmae_fast.models.positions import sincos_positions

EXACT = 1e-5  # how far a table stored in fp32 may be from the formula


def distance_from_sincos(table: Tensor, grid: tuple[int, int]) -> float:
    """Largest difference of a table (1, L, D) from the sine-cosine one of its grid."""
    exact = sincos_positions(table.shape[-1], grid)
    return (table[0].to(torch.float64) - exact).abs().max().item()


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Audio positions (1, rows * any, D) for `columns` steps in time, (1, rows * columns, D).

    The sine-cosine table is made anew. A trained one keeps its first columns, or is interpolated
    along time where that is not enough.
    """
    before = table.shape[1] // rows
    if table.shape[1] != rows * before:
        raise ValueError(f"a table of {table.shape[1]} audio positions has no {rows} mel bands")
    if distance_from_sincos(table, (rows, before)) <= EXACT:
        return sincos_positions(table.shape[-1], (rows, columns)).to(table.dtype)[None]
    bands = table.unflatten(1, (rows, before))  # tokens are numbered band by band
    if columns <= before:
        return bands[:, :, :columns].flatten(1, 2)
    along_time = bands[0].transpose(1, 2)  # (rows, D, before)
    longer = F.interpolate(along_time, size=columns, mode="linear", align_corners=False)
    return longer.transpose(1, 2).flatten(0, 1)[None]
