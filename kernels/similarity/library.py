"""The registered ops: csrc/cpu/similarity.cpp, kernel.py, and norms shared by them.

Frames go in as they are, with their inverse norms beside them: no normalised copy is made.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import TINY_NORM

CHUNK = 2**20  # elements whose norms are taken at once
MAXIMA = ("diagonal_max", "max")


def inverse_norms(x: Tensor, dtype: torch.dtype, normalize: bool, finite: str = "") -> Tensor:
    """What the frames of x (N, T, D) are multiplied by, (N, T); ones unless `normalize`.

    finite: raise ValueError if a frame is not finite, under this name ("": let it pass).
    """
    return _INVERSE_NORMS(x, dtype, normalize, finite)


def forward(
    impl: str, a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, strategy: str
) -> tuple[Tensor, Tensor]:
    """Scores (N, M) in the dtype of the inverse norms; where the maxima are, int32, else (0, 0)."""
    return _FORWARD[impl](a, b, a_inverse, b_inverse, strategy)


def gradient(
    impl: str, grad: Tensor, saved: tuple[Tensor, ...], strategy: str, normalize: bool, of_b: bool
) -> Tensor:
    """Gradient by a, or b; saved: index, a, b and their inverse norms."""
    return _BACKWARD[impl](grad, *saved, strategy, normalize, of_b)


def pair_counts(impl: str, *args: Any) -> Tensor:
    """`reference.pair_counts`."""
    return _COUNTS[impl](*args)


def _inverse_norms(x: Tensor, dtype: torch.dtype, normalize: bool, finite: str) -> Tensor:
    clips, frames, width = x.shape
    inverse = torch.ones(clips, frames, dtype=dtype, device=x.device)
    if not normalize and not finite:
        return inverse
    for part, out in zip(*(y.split(max(1, CHUNK // (frames * width))) for y in (x, inverse)),
                         strict=True):  # fmt: skip
        out.copy_(torch.linalg.vector_norm(part, dim=-1, dtype=dtype))
    if finite and not inverse.isfinite().all():
        _check_finite(finite, x, inverse)
    return inverse.clamp_min_(TINY_NORM).reciprocal_() if normalize else inverse.fill_(1)


def _check_finite(name: str, x: Tensor, norms: Tensor) -> None:
    suspects = (~norms.isfinite()).any(1).nonzero().flatten().tolist()
    bad = [clip for clip in suspects if not x[clip].isfinite().all()]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{name} is not finite in {len(bad)} of {len(x)} clips (rows {shown}); "
            "ties='published' leaves them out"
        )


def _inverse_norms_fake(x: Tensor, dtype: torch.dtype, normalize: bool, finite: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=dtype)


def _forward_fake(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, strategy: str
) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], b.shape[0])
    index = shape if strategy in MAXIMA else (0, 0)
    return a_inverse.new_empty(shape), a_inverse.new_empty(index, dtype=torch.int32)


def _backward_fake(
    grad: Tensor,
    index: Tensor,
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    strategy: str,
    normalize: bool,
    of_b: bool,
) -> Tensor:
    x = b if of_b else a
    return x.new_empty(x.shape)


def _counts_fake(a: Tensor, *rest: object) -> Tensor:
    return a.new_empty((4, a.shape[0]), dtype=torch.int64)


def _triton(name: str) -> Any:
    def call(*args: Any) -> Any:
        from . import kernel

        return getattr(kernel, name)(*args)

    return call


def _define(name: str, schema: str, fake: Any, implementation: Any = None) -> Any:
    torch.library.define(f"kdcmae_fast::{name}", schema)
    torch.library.register_fake(f"kdcmae_fast::{name}", fake)
    if implementation is not None:
        torch.library.impl(f"kdcmae_fast::{name}", ("cuda", "cpu"), implementation)
    return getattr(torch.ops.kdcmae_fast, name).default


def _define_fused(name: str, schema: str, fake: Any, function: str) -> dict[str, Any]:
    """One op per fused implementation; csrc/cpu/similarity.cpp fills in `_cpp`."""
    return {
        "cpp": _define(f"{name}_cpp", schema, fake),
        "triton": _define(f"{name}_triton", schema, fake, _triton(function)),
    }


_SIDES = "Tensor a, Tensor b, Tensor a_inverse, Tensor b_inverse, str strategy"
_COUNTING = f"({_SIDES}, float tolerance, bool relative, int tile_size) -> Tensor"

_INVERSE_NORMS = _define(
    "frame_inverse_norms",
    "(Tensor x, ScalarType dtype, bool normalize, str finite) -> Tensor",
    _inverse_norms_fake,
    _inverse_norms,
)
_FORWARD = _define_fused(
    "frame_similarity", f"({_SIDES}) -> (Tensor, Tensor)", _forward_fake, "scores"
)
_BACKWARD = _define_fused(
    "frame_similarity_grad",
    f"(Tensor grad, Tensor index, {_SIDES}, bool normalize, bool of_b) -> Tensor",
    _backward_fake,
    "scores_grad",
)
_COUNTS = _define_fused("similarity_counts", _COUNTING, _counts_fake, "pair_counts")
_COUNTS["torch"] = _define(
    "similarity_counts_torch", _COUNTING, _counts_fake, reference.pair_counts
)
