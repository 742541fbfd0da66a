"""The public attention: argument checks, choice of back-end, packed sequences, registration."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import check_dtype, check_ndim, check_shape, register_report
from .backends import (
    DENSE,
    HALF,
    automatic,
    flash_attn_packed,
    report,
    requested,
    sdpa_packed,
    xformers_packed,
)
from .reference import attention_scores_materialised

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"flash_attn": HALF, "xformers": HALF, "cpp": (torch.bfloat16,)}  # of some back-ends
HALF_ONLY = tuple(DTYPES)

register_report("attention", report)


class _Run(NamedTuple):
    """Consecutive documents of one length, computed as one batch."""

    start: int  # first row
    documents: int
    length: int  # rows of each document


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    max_seqlen: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention without mask or dropout: softmax(q k^T / sqrt(d)) v.

    Dense: q (B, H, L, d), k and v (B, H, S, d) -> (B, H, L, d).

    Packed: with `cu_seqlens`, q, k and v are (total, H, d), documents one after another, each
    attending to itself -> (total, H, d). `cu_seqlens` = (0, n0, n0 + n1, ..., total) as Python
    ints (best: nothing has to be read back, and neighbours of equal length run as one batch) or
    as a 1-D int32 tensor; int64 on CPU too. A CUDA tensor is never read on the host: it goes to
    a variable-length kernel (impl "auto" and "sdpa": torch.nn.attention.varlen; "flash_attn"),
    takes bfloat16 or float16 and needs `max_seqlen`, the longest document.

    dtype: one for all three: float64, float32, bfloat16 or float16 (flash_attn and xformers: the
    16-bit ones; cpp: bfloat16). Scores and softmax are float32 at least; autocast does not change
    the result.
    impl: "sdpa", "cpp" (bfloat16 on CPUs that multiply it), "blocked" (CPU: SDPA with a backward
    pass of its own), "flash_attn", "xformers", "torch" (scores materialised, B*H*L*S of them kept
    for the backward pass); "auto" is "sdpa", but on a CPU in the 16-bit dtypes, where they measured
    faster, "cpp" if it can run and else "blocked". The environment variable KDCMAE_IMPL=torch makes
    "auto" mean "torch".

    Differentiable. Errors are ValueErrors that name the argument; a missing back-end says why.
    """
    _check_dtypes(q, k, v)
    chosen = requested(impl, q.device.type)
    if q.dtype not in DTYPES.get(chosen, FLOATS):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[chosen])
        raise ValueError(f"impl={chosen!r} takes {names}, got q in {q.dtype}")
    if cu_seqlens is None:
        _check_dense(q, k, v, max_seqlen)
        return _dense(q, k, v, chosen)
    _check_packed(q, k, v, max_seqlen)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.is_cuda:
        return _on_device(q, k, v, cu_seqlens, max_seqlen, chosen)
    return _on_host(q, k, v, _host_bounds(cu_seqlens, q.shape[0]), max_seqlen, chosen)


def _dense(q: Tensor, k: Tensor, v: Tensor, chosen: str) -> Tensor:
    if chosen == "auto":
        chosen = automatic(q.device.type, q.dtype)
    return DENSE[chosen](q, k, v)


def _on_host(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], max_seqlen: int | None, chosen: str
) -> Tensor:
    """Packed attention whose bounds are known on the host."""
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    longest = max(lengths, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen={max_seqlen} is below the longest document, {longest}")
    if chosen == "flash_attn":
        table = torch.tensor(bounds, dtype=torch.int32, device=q.device)
        return flash_attn_packed(q, k, v, table, longest)
    if chosen == "xformers":
        return xformers_packed(q, k, v, lengths)
    results = []
    for run in _runs(lengths):
        batch = _dense(_batch(q, run), _batch(k, run), _batch(v, run), chosen)
        results.append(batch.transpose(1, 2).flatten(0, 1))
    return torch.cat(results) if results else q.clone()


def _on_device(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, max_seqlen: int | None, chosen: str
) -> Tensor:
    """Packed attention whose bounds are on the GPU and stay there."""
    check_ndim("cu_seqlens", bounds, 1, "(documents + 1,)")
    check_dtype("cu_seqlens", bounds, (torch.int32,))
    if max_seqlen is None:
        raise ValueError("max_seqlen is needed with cu_seqlens on a GPU; pass the longest document")
    if chosen in ("torch", "cpp", "blocked", "xformers"):
        raise ValueError(
            f"impl={chosen!r} needs cu_seqlens on the host; pass a tuple of ints or a CPU tensor"
        )
    if q.dtype not in HALF:
        raise ValueError(
            f"cu_seqlens on a GPU needs bfloat16 or float16, got q in {q.dtype}; "
            "pass cu_seqlens as a tuple of ints"
        )
    kernel = flash_attn_packed if chosen == "flash_attn" else sdpa_packed
    return kernel(q, k, v, bounds, max_seqlen)


def _host_bounds(cu_seqlens: Tensor | Sequence[int], total: int) -> list[int]:
    """cu_seqlens as checked Python ints."""
    if isinstance(cu_seqlens, Tensor):
        check_ndim("cu_seqlens", cu_seqlens, 1, "(documents + 1,)")
        check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
        bounds = cu_seqlens.tolist()
    else:
        bounds = list(cu_seqlens)
    if not bounds or bounds[0] != 0 or bounds[-1] != total:
        ends = (bounds[0], bounds[-1]) if bounds else ()
        raise ValueError(f"cu_seqlens must run from 0 to {total}, the rows of q, got ends {ends}")
    for index in range(1, len(bounds)):
        if bounds[index] < bounds[index - 1]:
            raise ValueError(
                f"cu_seqlens must not decrease, got {bounds[index - 1]} then {bounds[index]}"
            )
    return bounds


def _runs(lengths: list[int]) -> list[_Run]:
    """Documents grouped into runs of equal length; empty documents have no rows and drop out."""
    runs: list[_Run] = []
    start = 0
    for length in lengths:
        if runs and length == runs[-1].length:
            runs[-1] = runs[-1]._replace(documents=runs[-1].documents + 1)
        elif length:
            runs.append(_Run(start, 1, length))
        start += length
    return runs


def _batch(x: Tensor, run: _Run) -> Tensor:
    """The rows of a run of x (total, H, d) as a batch (documents, H, length, d), a view."""
    rows = x.narrow(0, run.start, run.documents * run.length)
    return rows.unflatten(0, (run.documents, run.length)).transpose(1, 2)


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtype("q", q, FLOATS)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, q {q.dtype}; they must share a dtype")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; they must agree")


def _check_dense(q: Tensor, k: Tensor, v: Tensor, max_seqlen: int | None) -> None:
    check_ndim("q", q, 4, "(B, H, L, d), or (total, H, d) with cu_seqlens")
    check_ndim("k", k, 4, "(B, H, S, d)")
    batch, heads, _, width = q.shape
    check_shape("k", k, (batch, heads, k.shape[2], width), "(B, H, S, d) with q's B, H and d")
    check_shape("v", v, tuple(k.shape), "(B, H, S, d) as k")
    if k.shape[2] == 0 and q.shape[2]:
        raise ValueError(f"k has no tokens to attend to: shape {tuple(k.shape)}")
    if max_seqlen is not None:
        raise ValueError(f"max_seqlen={max_seqlen} belongs to packed inputs; pass cu_seqlens too")


def _check_packed(q: Tensor, k: Tensor, v: Tensor, max_seqlen: int | None) -> None:
    check_ndim("q", q, 3, "(total, H, d) with cu_seqlens")
    check_shape("k", k, tuple(q.shape), "(total, H, d) as q")
    check_shape("v", v, tuple(q.shape), "(total, H, d) as q")
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")


torch.library.define("kdcmae_fast::attention", "(Tensor q, Tensor k, Tensor v) -> Tensor")
torch.library.impl(
    "kdcmae_fast::attention", "CompositeImplicitAutograd", attention_scores_materialised
)
