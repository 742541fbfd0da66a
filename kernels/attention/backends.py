"""The attention back-ends: which can run here, which `auto` takes, and their own layouts.

Optional packages are imported when they are first used, never before.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import (
    Backend,
    assume_constant_result,
    extension_problem,
    without_autocast,
)
from .blocked import blocked
from .fused import attention_cpp, units
from .reference import attention_scores_materialised

IMPLS = ("sdpa", "cpp", "blocked", "flash_attn", "xformers", "torch")
PACKAGES = {"flash_attn": "flash-attn", "xformers": "xformers"}  # module -> what to install
HALF = (torch.bfloat16, torch.float16)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with without_autocast(q.device):
        return F.scaled_dot_product_attention(q, k, v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


DENSE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": sdpa,
    "cpp": attention_cpp,
    "blocked": blocked,
    "flash_attn": flash_attn,
    "xformers": xformers,
    "torch": attention_scores_materialised,
}  # (B, H, L, d) x (B, H, S, d) x (B, H, S, d) -> (B, H, L, d)


def flash_attn_packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """(total, H, d) documents that start at bounds (n + 1,) int32, none over `longest` tokens."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest)


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """The same through PyTorch's own variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    # A tuple only when auxiliary outputs are asked for.
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest))


def xformers_packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """(total, H, d) documents of these lengths."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(lengths)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


@functools.cache
def problem(impl: str, device: str) -> str | None:
    """Why this back-end cannot run on tensors of this device type; None when it can."""
    if impl in ("cpp", "blocked") and device != "cpu":
        return f"it takes CPU tensors, not {device}"
    if impl == "cpp":
        return extension_problem() or no_units()
    if impl not in PACKAGES:
        return None
    if importlib.util.find_spec(impl) is None:
        return f"the package {PACKAGES[impl]} is not installed"
    return None if device == "cuda" else f"{PACKAGES[impl]} takes CUDA tensors, not {device}"


def no_units() -> str | None:
    """Why this CPU cannot run the C++ attention; None when it can."""
    return None if units() else "this CPU has no products of bfloat16 (AVX512-BF16 or AMX)"


@assume_constant_result
def requested(impl: str, device: str) -> str:
    """`impl` if it can run, else ValueError; KDCMAE_IMPL=torch makes "auto" mean "torch"."""
    if impl == "auto":
        return "torch" if os.environ.get("KDCMAE_IMPL") == "torch" else "auto"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of auto, {', '.join(IMPLS)}")
    refused = problem(impl, device)
    if refused:
        raise ValueError(f"impl={impl!r} of attention is not available here: {refused}")
    return impl


@assume_constant_result
def automatic(device: str, dtype: torch.dtype) -> str:
    """What `auto` takes, from the measurements in the README."""
    if device != "cpu" or dtype not in HALF:
        return "sdpa"
    return "cpp" if dtype == torch.bfloat16 and problem("cpp", device) is None else "blocked"


def report(device: str) -> Backend:
    """The line of `backends()` about attention."""
    impl = requested("auto", device)
    missing = [f"not {name}: {problem(name, device)}" for name in PACKAGES if problem(name, device)]
    if impl != "auto":
        return Backend(impl, f"KDCMAE_IMPL={impl}")
    if device != "cpu":
        return Backend("sdpa", "; ".join([f"default on {device}", *missing]))
    refused = problem("cpp", device)
    low = (
        f"blocked for bfloat16 (not cpp: {refused})" if refused else f"cpp ({units()}) for bfloat16"
    )
    why = f"measured on CPU; instead {low}, blocked for float16"
    return Backend("sdpa", "; ".join([why, *missing]))
