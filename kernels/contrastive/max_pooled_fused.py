"""Max-pooled logits and their gradients as ops: csrc/cpu/max_pooled.cpp and kernel_max_pooled.py.

The same quantities as in max_pooled_reference.py, from three ops. The C++ ops take the maps as they
are, of any strides, and apply the cells' inverse norms to the products; the Triton ops take unit
cells in the operand dtype, contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from .fused import define
from .max_pooled_reference import INDEX


def scores(
    impl: str, maps: Tensor, inverse: Tensor, vectors: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (N, M) and cells (N, M) of maps (N, P, D), inverse norms (N, P), vectors (M, D)."""
    return _SCORES[impl](maps, inverse, vectors, scale)


def gradient_by_maps(
    impl: str,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    unit: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient (N, P, D), in `dtype`, by what the maps are of, from `unit` times `grad`.

    rows: the four tensors of `scores`. found: grad, by the logits; logits; cells; (N, M) each.
    """
    return _BY_MAPS[impl](*rows, unit, *found, normalize, dtype)


def gradient_by_vectors(
    impl: str,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    unit: Tensor,
    grad: Tensor,
    cells: Tensor,
) -> Tensor:
    """Gradient by the vectors (M, D) from `unit` times `grad`, in the dtype of the logits."""
    return _BY_VECTORS[impl](*rows, unit, grad, cells)


def _scores_fake(
    maps: Tensor, inverse: Tensor, vectors: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    logits = scale.new_empty(maps.shape[0], vectors.shape[0])
    return logits, logits.new_empty(logits.shape, dtype=INDEX)


def _by_maps_fake(maps: Tensor, inverse: Tensor, vectors: Tensor, *rest: Any) -> Tensor:
    return maps.new_empty(maps.shape, dtype=rest[-1])


def _by_vectors_fake(
    maps: Tensor, inverse: Tensor, vectors: Tensor, scale: Tensor, *rest: Any
) -> Tensor:
    return scale.new_empty(vectors.shape)


def _triton_scores(*args: Any) -> tuple[Tensor, Tensor]:
    from . import kernel_max_pooled

    return kernel_max_pooled.scores(*args)


def _triton_by_maps(*args: Any) -> Tensor:
    from . import kernel_max_pooled

    return kernel_max_pooled.gradient_by_maps(*args)


def _triton_by_vectors(*args: Any) -> Tensor:
    from . import kernel_max_pooled

    return kernel_max_pooled.gradient_by_vectors(*args)


def _both(name: str, schema: str, fake: Any, triton: Any) -> dict[str, Any]:
    """The op of csrc/cpu/max_pooled.cpp and the one in Triton."""
    return {
        "cpp": define(f"max_pooled_{name}_cpp", schema, fake),
        "triton": define(f"max_pooled_{name}_triton", schema, fake, triton),
    }


_ROWS = "Tensor maps, Tensor inverse, Tensor vectors, Tensor scale"
_SCORES = _both("scores", f"({_ROWS}) -> (Tensor, Tensor)", _scores_fake, _triton_scores)
_BY_MAPS = _both(
    "gradient_by_maps",
    f"({_ROWS}, Tensor unit, Tensor grad, Tensor logits, Tensor cells, bool normalize,"
    " ScalarType dtype) -> Tensor",
    _by_maps_fake,
    _triton_by_maps,
)
_BY_VECTORS = _both(
    "gradient_by_vectors",
    f"({_ROWS}, Tensor unit, Tensor grad, Tensor cells) -> Tensor",
    _by_vectors_fake,
    _triton_by_vectors,
)
