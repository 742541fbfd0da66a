"""Pre-norm transformer blocks: private to one stream, or shared by several with own norms.

N rows (views and clips), L tokens, D width, H heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdcmae_fast.kernels import attention


class Segment(NamedTuple):
    """A run of packed rows: `rows` sequences of `length` tokens under one set of norms."""

    norm: str
    rows: int
    length: int


class Attention(nn.Module):
    """Multi-head self-attention, one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, impl: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        return self.proj(self._attend(self.qkv(x)))

    def packed(self, x: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """(R, D) packed rows; one projection for all, attention inside each sequence only."""
        qkv = self.qkv(x).split([s.rows * s.length for s in segments])
        parts = [
            self._attend(part.view(s.rows, s.length, part.shape[1])).flatten(0, 1)
            for part, s in zip(qkv, segments, strict=True)
        ]
        return self.proj(torch.cat(parts))

    def _attend(self, qkv: Tensor) -> Tensor:
        n, length, width = qkv.shape
        head = width // (3 * self.num_heads)  # no -1 in the view: there may be no rows
        q, k, v = qkv.view(n, length, 3, self.num_heads, head).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, impl=self.impl)
        return out.transpose(1, 2).reshape(n, length, width // 3)


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Width inside an MLP, dim * mlp_ratio rounded down.

    A ratio read back from weights, hidden / dim, may give a product just below `hidden`.
    """
    return int(dim * mlp_ratio + 1e-6)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). LayerNorm eps 1e-5."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, impl: str = "auto") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, impl)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_width(dim, mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, L, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class StreamNorm(nn.Module):
    """LayerNorms of equal width, one per stream, applied to packed rows segment by segment."""

    def __init__(self, dim: int, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({stream: nn.LayerNorm(dim) for stream in streams})

    def forward(self, x: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """(R, D) -> (R, D)."""
        if len(segments) == 1:
            return self.norms[segments[0].norm](x)
        parts = x.split([s.rows * s.length for s in segments])
        return torch.cat([self.norms[s.norm](p) for p, s in zip(parts, segments, strict=True)])


class SharedBlock(nn.Module):
    """A block whose attention and MLP serve several streams, each with its own two norms."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, streams: tuple[str, ...], impl: str
    ) -> None:
        super().__init__()
        self.norm1 = StreamNorm(dim, streams)
        self.attn = Attention(dim, num_heads, impl)
        self.norm2 = StreamNorm(dim, streams)
        self.mlp = Mlp(dim, hidden_width(dim, mlp_ratio))

    def forward(self, x: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """(R, D) packed rows -> (R, D)."""
        x = x + self.attn.packed(self.norm1(x, segments), segments)
        return x + self.mlp(self.norm2(x, segments))


def run_block(block: nn.Module, *args: object, recompute: bool) -> Tensor:
    """Call a block; with `recompute` its activations are rebuilt in backward, not kept.

    The blocks draw no random numbers, so no generator state has to be kept for it.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)
