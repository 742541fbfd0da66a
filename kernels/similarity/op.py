"""The public similarity and rank functions: argument checks, autograd, the choice of impl."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import (
    check_dtype,
    check_ndim,
    compute_dtype,
    distinct,
    register_op,
    resolve,
    without_autocast,
)
from . import library, reference

Strategy = Literal["diagonal_mean", "diagonal_max", "mean", "max"]
Ties = Literal["average", "optimistic", "published"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_TRITON_FRAMES = 64  # of strategy "max", whose tiles hold whole clips

register_op("frame_similarity", impls=("cpp", "triton", "torch"))
register_op("retrieval_ranks", impls=("cpp", "triton", "torch"))


class PairRanks(NamedTuple):
    """How the true pair of each of N queries fares against the whole gallery.

    rank: (N,) float64, 1 is best, ties counted as asked for; NaN if the pair's score is NaN.
    above: (N,) int64, gallery items that are more similar to the query than its own pair.
    equal: (N,) int64, items as similar as the pair, itself included; 0 if its score is NaN.
    """

    rank: Tensor
    above: Tensor
    equal: Tensor


class RetrievalRanks(NamedTuple):
    """Both directions: clips of a as queries for those of b, and the other way round."""

    a_to_b: PairRanks
    b_to_a: PairRanks


def frame_similarity(
    a: Tensor,
    b: Tensor,
    *,
    strategy: Strategy = "diagonal_mean",
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Similarity of every clip of a with every clip of b (CAV-MAE Sync, arXiv 2505.01237).

    a, b: (N, T, D) and (M, T, D) frame features, float64, float32, bfloat16 or float16.
    strategy: how the cosines c_kl of frame k of a and frame l of b become one number:
        "diagonal_mean", the mean of c_kk; "diagonal_max", the largest c_kk; "mean", the mean of
        all T x T; "max", the largest of all.
    normalize: False takes the products of the frames as they are instead of cosines. A frame
        whose norm is below 1e-12 is divided by 1e-12.
    impl: "auto", "torch", "cpp" or "triton" ("max": T up to 64); the last two are differentiable
        once.

    Returns (N, M), float32 (float64 if an input is float64). Gradients of a maximum go to the
    first of equal products in (k, l) order. A NaN in a frame makes every score NaN that the frame
    has a part in. Deterministic. Errors are ValueErrors that name the argument.
    """
    _check(a, b, strategy)
    impl = _resolve("frame_similarity", a, strategy, impl)
    dtype = compute_dtype(a, b)
    with without_autocast(a.device):
        if impl == "torch":
            return reference.frame_similarity(a, b, strategy, normalize, dtype)
        return _FusedScores.apply(*distinct(a, b), strategy, normalize, impl)


def retrieval_ranks(
    a: Tensor,
    b: Tensor,
    *,
    strategy: Strategy = "diagonal_mean",
    ties: Ties = "average",
    normalize: bool = True,
    tolerance: float = 1e-10,
    tile_size: int | None = None,
    impl: str = "auto",
) -> RetrievalRanks:
    """Where the pair (a[i], b[i]) ranks among all (a[i], b[j]), and among all (a[j], b[i]).

    a, b: (N, T, D) frame features of the same clips; strategy, normalize: see `frame_similarity`.
    ties: the rank of a pair that scores as high as e - 1 other items, below g items: "average"
        g + (e + 1) / 2, which constant features cannot exploit; "optimistic" g + 1; "published"
        g + 1 too, for the released evaluation, which lists such a query e times, at ranks
        g + 1 ... g + e, and one whose score is NaN not at all: its rank is NaN and its `equal` 0.
    tolerance: scores are computed in float64 whatever the inputs, and those no further apart than
        this are equal, so that clips with equal features tie although their scores are rounded
        differently. Without `normalize` it is relative to the pair's own score.
    tile_size: most clips on a side of the tiles of scores that exist at once; None leaves it to
        the implementation. "triton" has a size of its own and takes None only.
    impl: "auto", "torch", "cpp" or "triton" ("max": T up to 64).

    One pass over the scores serves both directions; memory is O(N) and a few tiles ("mean" also
    holds the N mean frames). Ranks do not depend on impl, tiles or threads, unless scores differ
    by `tolerance` to within rounding. Not differentiable. Raises ValueError for shapes that do
    not pair up, and for frames that are not finite unless ties="published"; on a GPU that check
    waits for the device.
    """
    _check(a, b, strategy)
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"a and b must be the same clips, got {a.shape[0]} and {b.shape[0]} of them"
        )
    if ties not in get_args(Ties):
        raise ValueError(f"ties={ties!r} is not one of {', '.join(get_args(Ties))}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size={tile_size} must be positive, or None")
    impl = _resolve("retrieval_ranks", a, strategy, impl)
    if impl == "triton" and tile_size is not None:
        raise ValueError(f"tile_size={tile_size}: the Triton kernel has its own; leave it at None")
    a, b = a.detach(), b.detach()
    strict = ties != "published"
    with without_autocast(a.device):
        inverses = (
            library.inverse_norms(x, torch.float64, normalize, name if strict else "")
            for name, x in (("a", a), ("b", b))
        )
        counts = library.pair_counts(
            impl, a, b, *inverses, strategy, tolerance, not normalize, tile_size or 0
        )
    return RetrievalRanks(_ranks(counts[0], counts[1], ties), _ranks(counts[2], counts[3], ties))


def _ranks(above: Tensor, equal: Tensor, ties: str) -> PairRanks:
    rank = (above + 1).double()
    if ties == "average":
        rank = rank + (equal - 1) / 2
    return PairRanks(rank.where(equal > 0, math.nan), above, equal)


def _resolve(op: str, a: Tensor, strategy: str, impl: str) -> str:
    found = resolve(op, impl, a.device.type)
    if found != "triton" or strategy != "max" or a.shape[1] <= MAX_TRITON_FRAMES:
        return found
    if impl == "triton":
        raise ValueError(
            f"impl='triton' takes clips of at most {MAX_TRITON_FRAMES} frames for "
            f"strategy='max', a has {a.shape[1]}; use impl='auto' or 'torch'"
        )
    return "torch"


class _FusedScores(torch.autograd.Function):
    """Scores by a fused implementation; keeps the inputs, their norms and where maxima are."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, strategy: str, normalize: bool, impl: str
    ) -> Tensor:
        dtype = compute_dtype(a, b)
        a_inverse, b_inverse = (library.inverse_norms(x, dtype, normalize) for x in (a, b))
        scores, index = library.forward(impl, a, b, a_inverse, b_inverse, strategy)
        ctx.save_for_backward(index, a, b, a_inverse, b_inverse)
        ctx.options = (strategy, normalize)
        ctx.impl = impl
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        strategy, normalize = ctx.options
        by_a, by_b = (
            library.gradient(ctx.impl, grad, ctx.saved_tensors, strategy, normalize, of_b)
            if needed
            else None
            for of_b, needed in zip((False, True), ctx.needs_input_grad[:2], strict=True)
        )
        return by_a, by_b, None, None, None


def _check(a: Tensor, b: Tensor, strategy: str) -> None:
    for name, x, layout in (("a", a, "(N, T, D)"), ("b", b, "(M, T, D)")):
        check_ndim(name, x, 3, layout)
        check_dtype(name, x, FLOATS)
    if b.device != a.device:
        raise ValueError(f"b is on {b.device}, a on {a.device}; they must share a device")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            "a and b must have as many frames and features, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if 0 in a.shape[1:]:
        raise ValueError(f"a has no frames or no features: shape {tuple(a.shape)}")
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy={strategy!r} is not one of {', '.join(get_args(Strategy))}")
