"""Attention of csrc/cpu/attention.cpp as ops of the torch library, and its autograd.

It runs on CPUs with products of bfloat16: AVX-512's, or AMX tiles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import assume_constant_result

_QKV = "Tensor q, Tensor k, Tensor v"


def attention_cpp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for bfloat16 q (B, H, L, d), k and v (B, H, S, d)."""
    return Attention.apply(q, k, v, units() == "amx")


@assume_constant_result
def units() -> str | None:
    """The CPU's units for products of bfloat16, "amx" or "avx512_bf16"; None without them.

    The extension has to be there.
    """
    return (None, "avx512_bf16", "amx")[torch.ops.kdcmae_fast.attention_units_cpp()]


class Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: bool) -> Tensor:
        out, lse = torch.ops.kdcmae_fast.attention_cpp(q, k, v, tiles)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.kdcmae_fast.attention_backward_cpp
        return *backward(grad, *ctx.saved_tensors, ctx.tiles), None


def _by_token(x: Tensor) -> Tensor:
    """An empty (B, H, L, d) that lies as (B, L, H, d)."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, tiles: bool) -> tuple[Tensor, Tensor]:
    return _by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(q), _by_token(k), _by_token(v)


torch.library.define("kdcmae_fast::attention_units_cpp", "() -> int")
torch.library.define("kdcmae_fast::attention_cpp", f"({_QKV}, bool tiles) -> (Tensor, Tensor)")
torch.library.define(
    "kdcmae_fast::attention_backward_cpp",
    f"(Tensor grad, {_QKV}, Tensor out, Tensor lse, bool tiles) -> (Tensor, Tensor, Tensor)",
)
torch.library.register_fake("kdcmae_fast::attention_cpp", _fake)
torch.library.register_fake("kdcmae_fast::attention_backward_cpp", _fake_backward)
