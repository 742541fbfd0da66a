"""InfoNCE's statistics and gradients as ops: csrc/cpu/contrastive.cpp and kernel.py.

The same quantities as in reference.py. The C++ ops differ in one thing: rows go in as they are, and
their inverse norms beside them, so that no normalised copy is made; logits are
scale * b_inverse_j * a_inverse_i * <b_j, a_i>. The Triton ops ("tile") take unit rows.
"""

from typing import Any

import torch
from torch import Tensor

from .reference import TINY_NORM, Statistics, Targets

KEPT_ELEMENTS = 2**20  # kKeptElements of the C++ source: that many logits are kept for backward


def inverse_norms(x: Tensor, enabled: bool, dtype: torch.dtype) -> Tensor:
    """One over the L2 norm of each row of x (N, D), as (N, 1) in `dtype`; ones if disabled."""
    if not enabled:
        return x.new_ones(x.shape[0], 1, dtype=dtype)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    return norm.clamp_min(TINY_NORM).reciprocal()


def statistics(
    b: Tensor,
    a: Tensor,
    inverses: tuple[Tensor, Tensor],
    scale: Tensor,
    offset: int,
    columns: bool,
) -> Statistics:
    """`reference.statistics` of rows b (N, D) and a (M, D) with their inverse norms (b's, a's)."""
    return Statistics(*_STATISTICS(b, a, *inverses, scale, offset, columns))


def gradients(
    b: Tensor,
    a: Tensor,
    inverses: tuple[Tensor, Tensor],
    scale: Tensor,
    offset: int,
    targets: Targets,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by b, a and scale; those by b and a hold the inverse norms fixed."""
    return _GRADIENTS(b, a, *inverses, scale, offset, *targets)


def unit_rows(x: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.normalise`, rounded to the operand dtype in the same pass."""
    return _UNIT_ROWS(x, operand)


def tile_statistics(
    b: Tensor, a: Tensor, scale: Tensor, offset: int, columns: bool, bounded: bool
) -> Statistics:
    """`reference.statistics`; bounded: rows are unit vectors, so no logit exceeds `scale`."""
    sums = _TILE_STATISTICS(b, a, scale, offset, columns, bounded)
    return Statistics._make((*sums, scale.new_empty(0, 0)))


def tile_gradients(
    b: Tensor, a: Tensor, scale: Tensor, offset: int, targets: Targets
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gradients`, all three."""
    return _TILE_GRADIENTS(b, a, scale, offset, *targets[:-1])


def norm_grad_(grad: Tensor, x: Tensor, inverse: Tensor, enabled: bool) -> Tensor:
    """Adds to `grad` (N, D), in place, what flows through the norms of x: x's whole gradient."""
    if not enabled:
        return grad
    x = x.to(grad.dtype)
    along = torch.bmm(x.unsqueeze(1), grad.unsqueeze(2)).squeeze(2)
    return grad.addcmul_(x, along * inverse.square(), value=-1)


def _statistics_fake(
    b: Tensor,
    a: Tensor,
    b_inverse: Tensor,
    a_inverse: Tensor,
    scale: Tensor,
    offset: int,
    columns: bool,
) -> tuple[Tensor, ...]:
    rows, width = b.shape[0], a.shape[0]
    summed = width if columns else 0
    kept = (rows, width) if rows * width <= KEPT_ELEMENTS else (0, 0)
    shapes = ((rows,), (rows,), (rows,), (summed,), (summed,), kept)
    return tuple(scale.new_empty(shape) for shape in shapes)


def _gradients_fake(
    b: Tensor, a: Tensor, b_inverse: Tensor, a_inverse: Tensor, scale: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(b.shape), scale.new_empty(a.shape), scale.new_empty(())


def _unit_rows_fake(x: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=operand), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _tile_statistics_fake(
    b: Tensor, a: Tensor, scale: Tensor, offset: int, columns: bool, bounded: bool
) -> tuple[Tensor, ...]:
    rows, summed = (b.shape[0],), (a.shape[0] if columns else 0,)
    return tuple(scale.new_empty(shape) for shape in (rows, rows, rows, summed, summed))


def _tile_gradients_fake(
    b: Tensor, a: Tensor, scale: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(b.shape), scale.new_empty(a.shape), scale.new_empty(())


def _unit_rows(x: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.normalise(x, operand)


def _tile_statistics(*args: Any) -> tuple[Tensor, ...]:
    from . import kernel

    return kernel.statistics(*args)


def _tile_gradients(*args: Any) -> tuple[Tensor, ...]:
    from . import kernel

    return kernel.gradients(*args)


def define(name: str, schema: str, fake: Any, implementation: Any = None) -> Any:
    """Register an op; `implementation` is its Triton one, the C++ ones register themselves."""
    torch.library.define(f"kdcmae_fast::{name}", schema)
    torch.library.register_fake(f"kdcmae_fast::{name}", fake)
    if implementation is not None:
        torch.library.impl(f"kdcmae_fast::{name}", ("cuda", "cpu"), implementation)
    return getattr(torch.ops.kdcmae_fast, name).default


_NORMS = "Tensor b_inverse, Tensor a_inverse, "
_TARGETS = (
    "Tensor row_lse, Tensor row_weight, Tensor positive_grad, Tensor column_lse,"
    " Tensor column_weight"
)

# csrc/cpu/contrastive.cpp fills in the first two.
_STATISTICS = define(
    "info_nce_statistics_cpp",
    f"(Tensor b, Tensor a, {_NORMS}Tensor scale, SymInt offset, bool columns)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _statistics_fake,
)
_GRADIENTS = define(
    "info_nce_gradients_cpp",
    f"(Tensor b, Tensor a, {_NORMS}Tensor scale, SymInt offset, {_TARGETS}, Tensor logits)"
    " -> (Tensor, Tensor, Tensor)",
    _gradients_fake,
)
_UNIT_ROWS = define(
    "info_nce_unit_rows_triton",
    "(Tensor x, ScalarType operand) -> (Tensor, Tensor)",
    _unit_rows_fake,
    _unit_rows,
)
_TILE_STATISTICS = define(
    "info_nce_statistics_triton",
    "(Tensor b, Tensor a, Tensor scale, SymInt offset, bool columns, bool bounded)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _tile_statistics_fake,
    _tile_statistics,
)
_TILE_GRADIENTS = define(
    "info_nce_gradients_triton",
    f"(Tensor b, Tensor a, Tensor scale, SymInt offset, {_TARGETS}) -> (Tensor, Tensor, Tensor)",
    _tile_gradients_fake,
    _tile_gradients,
)
