"""SDPA on the CPU with a backward pass of its own: scores made again, some heads at a time.

PyTorch's FlashAttention for CPUs is fast forward, but its backward pass in 16 bit takes longer than
matrix products and exponentials over scores that fit into the cache. B batch, H heads, L queries,
S keys, d width.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import compute_dtype, without_autocast

MAX_SCORES = 2**19  # of one block: 2 MiB in float32, of which there are two


def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, H, L, d) and k, v (B, H, S, d) -> (B, H, L, d)."""
    with without_autocast(q.device):
        return BlockedAttention.apply(_unit_stride(q), _unit_stride(k), _unit_stride(v))


def _unit_stride(x: Tensor) -> Tensor:
    """x itself if its last axis lies together, as PyTorch's kernel wants it."""
    return x if x.stride(-1) == 1 else x.contiguous()


class BlockedAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.kdcmae_fast.attention_blocked(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.kdcmae_fast.attention_blocked_backward(grad, *ctx.saved_tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, d) and lse (B, H, L), the logarithm of each query's sum of exponentials."""
    if q.numel() == 0:  # the kernel does not take it
        return _empty_forward(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With P = exp(s q k^T - lse) and s = 1 / sqrt(d): dv = P^T g, dq = dS k, dk = dS^T q,
    dS = P * (s g v^T - s rowsum(g * out)). What is subtracted rides in the products, as one more
    column.
    """
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    wide, scale = compute_dtype(q), width**-0.5
    # bfloat16 probabilities meet bfloat16 values; float16 products would be emulated on most CPUs.
    low = q.dtype if q.dtype == torch.bfloat16 else wide
    dq, dk, dv = (torch.empty(x.shape, dtype=low) for x in (q, k, v))
    step = max(1, min(MAX_SCORES // max(1, queries * keys), heads))
    # Buffers for one block: operands with one more column, what is made of them, and in `low`.
    q_lse, grad_delta = (torch.empty(step, queries, width + 1, dtype=wide) for _ in range(2))
    k_one, v_one = (torch.ones(step, keys, width + 1, dtype=wide) for _ in range(2))
    probabilities, scores = (torch.empty(step, queries, keys, dtype=wide) for _ in range(2))
    rounded = torch.empty(step, queries, keys, dtype=low)
    low_q, low_grad = (torch.empty(step, queries, width, dtype=low) for _ in range(2))
    low_k = torch.empty(step, keys, width, dtype=low)
    for sample, start in itertools.product(range(batch), range(0, heads, step)):
        some = sample, slice(start, min(start + step, heads))
        n = some[1].stop - start
        q_lse[:n, :, :width].copy_(q[some]).mul_(scale)
        q_lse[:n, :, width].copy_(lse[some]).neg_()
        k_one[:n, :, :width].copy_(k[some])
        v_one[:n, :, :width].copy_(v[some])
        scaled = grad_delta[:n, :, :width].copy_(grad[some]).mul_(scale)
        grad_delta[:n, :, width].copy_((scaled * out[some]).sum(dim=-1)).neg_()
        p = torch.bmm(q_lse[:n], k_one[:n].mT, out=probabilities[:n]).exp_()
        low_p = p if low == wide else rounded[:n].copy_(p)
        torch.bmm(low_p.mT, low_grad[:n].copy_(grad[some]), out=dv[some])
        ds = torch.bmm(grad_delta[:n], v_one[:n].mT, out=scores[:n]).mul_(p)
        low_ds = ds if low == wide else rounded[:n].copy_(ds)
        torch.bmm(low_ds, low_k[:n].copy_(k[some]), out=dq[some])
        torch.bmm(low_ds.mT, low_q[:n].copy_(q[some]), out=dk[some])
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _empty_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs as the kernel lays them out: like q, and by query before head."""
    batch, heads, queries, _ = q.shape
    lse = q.new_empty(batch, queries, heads, dtype=compute_dtype(q)).transpose(1, 2)
    return torch.empty_like(q), lse


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(f"kdcmae_fast::{name}", schema)
    torch.library.impl(f"kdcmae_fast::{name}", "CPU", run)
    torch.library.register_fake(f"kdcmae_fast::{name}", fake)


_register(
    "attention_blocked",
    "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    _forward,
    _empty_forward,
)
_register(
    "attention_blocked_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
