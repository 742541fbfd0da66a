"""Pre-norm transformer blocks: private to one stream, or shared by several with own norms.

N rows (views and clips), L tokens, D width, H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdcmae_fast.kernels import attention

from .lean import GeluLinear, Linear, Norm, Normed, NormedLinear, NormParameters, normalize
from .rows import Filler, take_tokens


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
        self.qkv = NormedLinear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Normed, wanted: Tensor | None = None, filler: Filler | None = None
    ) -> Tensor:
        """(N, L, D) -> (N, L, D); with `wanted` (N, M) tokens as queries only, (N, M, D).

        filler: x is what `filler.pack` made.
        """
        qkv = self.qkv(x)
        if filler is not None:
            qkv = filler.spread(qkv)
        return self.proj(self._attend(qkv, wanted))

    def packed(self, x: Normed, segments: tuple[Segment, ...]) -> Tensor:
        """(R, D) packed rows; one projection for all, attention inside each sequence only."""
        qkv = self.qkv(x).split([s.rows * s.length for s in segments])
        parts = [
            self._attend(part.view(s.rows, s.length, part.shape[1])).flatten(0, 1)
            for part, s in zip(qkv, segments, strict=True)
        ]
        return self.proj(torch.cat(parts))

    def _attend(self, qkv: Tensor, wanted: Tensor | None = None) -> Tensor:
        n, length, width = qkv.shape
        dim = width // 3
        head = dim // self.num_heads  # no -1 in the views: there may be no rows
        q, k, v = qkv.view(n, length, 3, self.num_heads, head).permute(2, 0, 3, 1, 4)
        if wanted is not None:
            queries = take_tokens(qkv[..., :dim], wanted)
            q = queries.view(*wanted.shape, self.num_heads, head).transpose(1, 2)
        out = attention(q, k, v, impl=self.impl)
        return out.transpose(1, 2).reshape(n, out.shape[2], dim)


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Width inside an MLP, dim * mlp_ratio rounded down.

    A ratio read back from weights, hidden / dim, may give a product just below `hidden`.
    """
    return int(dim * mlp_ratio + 1e-6)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = NormedLinear(dim, hidden)
        self.fc2 = GeluLinear(hidden, dim)

    def forward(self, x: Normed) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). LayerNorm eps 1e-5."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, impl: str = "auto") -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = Attention(dim, num_heads, impl)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, hidden_width(dim, mlp_ratio))

    def forward(
        self, x: Tensor, wanted: Tensor | None = None, filler: Filler | None = None
    ) -> Tensor:
        """(N, L, D) -> (N, L, D).

        wanted: (N, M), the tokens whose results are asked for -> (N, M, D); the others are keys
            and values only. filler: the tokens that are the same in every row.
        """
        normed = self.norm1(x if filler is None else filler.pack(x))
        branch = self.attn(normed, wanted, filler)
        attended = self.norm2(branch, x if wanted is None else take_tokens(x, wanted))
        return attended.stream + self.mlp(attended)


class StreamNorm(nn.Module):
    """LayerNorms of equal width, one per stream, applied to packed rows segment by segment."""

    def __init__(self, dim: int, streams: tuple[str, ...]) -> None:
        super().__init__()
        norms = {stream: NormParameters(dim) for stream in streams}
        self.norms = nn.ModuleDict(norms)
        self.eps = norms[streams[0]].eps

    def forward(
        self, x: Tensor, segments: tuple[Segment, ...], residual: Tensor | None = None
    ) -> Normed:
        """(R, D) each -> LayerNorm(x + residual)."""
        parameters = torch.cat([self.norms[s.norm]() for s in segments], dim=1)
        runs = tuple((index, s.rows * s.length) for index, s in enumerate(segments))
        return normalize(x, residual, parameters, runs, self.eps)


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
        branch = self.attn.packed(self.norm1(x, segments), segments)
        attended = self.norm2(branch, segments, x)
        return attended.stream + self.mlp(attended)


def run_block(block: nn.Module, *args: object, recompute: bool) -> Tensor:
    """Call a block; with `recompute` its activations are rebuilt in backward, not kept.

    The blocks draw no random numbers, so no generator state has to be kept for it.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)
