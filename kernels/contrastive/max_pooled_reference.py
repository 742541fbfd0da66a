"""Max-pooled logits of one rank's maps against all vectors, and their gradient, in plain PyTorch.

Letters: N maps (this rank's) of P cells, M vectors (every rank's, in rank order). Of the N x P x M
products never more than one block of reference.BLOCK_ELEMENTS exists: images are walked in blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import blocks, product

INDEX = torch.int16  # of a cell
MAX_CELLS = 2**15


def scores(
    maps: Tensor, inverse: Tensor, vectors: Tensor, scale: Tensor, operand: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits (N, M) and the cell each one is of, the first of equal ones.

    maps (N, P, D) as they are, with their cells' inverse norms (N, P); vectors (M, D): unit rows.
    """
    logits = scale.new_empty(maps.shape[0], vectors.shape[0])
    cells = torch.empty(logits.shape, dtype=INDEX, device=maps.device)
    for start, stop in _blocks(maps, vectors):
        unit = _unit(maps, inverse, start, stop)
        products = product(unit.flatten(0, 1), vectors.t(), operand)
        top, at = products.unflatten(0, (stop - start, -1)).max(dim=1)
        logits[start:stop] = top * scale
        cells[start:stop] = at
    return logits, cells


def gradients(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    unit: Tensor,
    operand: torch.dtype,
    grad: Tensor,
    cells: Tensor,
    normalize: bool,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients by maps and by vectors (M, D) from `unit` times `grad`, those by the logits (N, M).

    rows: the four tensors of `scores`. normalize: the maps' gradient goes through their norms.
    needed: which of the two to compute; the other comes back empty.
    """
    maps, inverse, vectors, scale = rows
    need_maps, need_vectors = needed
    scale = scale * unit
    by_maps = []
    by_vectors = scale.new_zeros(vectors.shape if need_vectors else (0,))
    for start, stop in _blocks(maps, vectors):
        x = _unit(maps, inverse, start, stop)
        spread = grad.new_zeros(stop - start, maps.shape[1], vectors.shape[0])
        at = cells[start:stop, None].long()
        spread = spread.scatter_(1, at, grad[start:stop, None]).flatten(0, 1)
        if need_vectors:
            by_vectors = by_vectors + product(spread.t(), x.flatten(0, 1), operand) * scale
        if need_maps:
            by_x = (product(spread, vectors, operand) * scale).view(x.shape)
            if normalize:
                by_x -= x * (x * by_x).sum(2, keepdim=True)
                by_x *= inverse[start:stop, :, None]
            by_maps.append(by_x.to(maps.dtype))
    return torch.cat(by_maps) if need_maps else maps.new_empty(0), by_vectors


def _blocks(maps: Tensor, vectors: Tensor) -> Iterator[tuple[int, int]]:
    return blocks(maps.shape[0], maps.shape[1] * max(vectors.shape))


def _unit(maps: Tensor, inverse: Tensor, start: int, stop: int) -> Tensor:
    """Some maps' cells over their norms, in the dtype of the norms."""
    return maps[start:stop].to(inverse.dtype) * inverse[start:stop, :, None]
