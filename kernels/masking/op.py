"""`complementary_masks`: checks, the choice of implementation, registration."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import check_dtype, check_ndim, check_number, check_shape, register_op, resolve
from . import reference
from .plan import MaskPlan, len_keep
from .reference import MAX_TOKENS, MODES, Draw

register_op("complementary_masks", impls=("cpp", "triton", "torch"))

_AXES = {"time": (2,), "freq": (2,), "tf": (2,), "tube": (3,), "block": (2, 3)}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# `step_tensor` (0-d int64) is added to `step`: a captured CUDA graph then draws anew each replay.
_PLAN_SCHEMA = (
    "(Tensor sample_ids, Tensor? step_tensor, SymInt seed, SymInt step, int stream, int mode,"
    " int[] grid, int[] sizes) -> (Tensor, Tensor)"
)
_NOISE_SCHEMA = "(Tensor noise) -> (Tensor, Tensor)"
_SUFFIXES = {"torch": "", "cpp": "_cpp", "triton": "_triton"}


def complementary_masks(
    sample_ids: Tensor,
    grid: Sequence[int],
    mask_ratio: float,
    *,
    num_views: int = 2,
    mode: str = "unstructured",
    seed: int = 0,
    step: int | Tensor = 0,
    stream: int = 0,
    noise: Tensor | None = None,
    impl: str = "auto",
) -> MaskPlan:
    """Draw K disjoint masks per sample (KDC-MAE, arXiv 2411.12270) as one `MaskPlan`.

    sample_ids: (B,) int64, the samples' indices in their dataset (the low 48 bits count). The plan
        of a sample depends on it, `seed`, `step`, `stream`, `mode` and the grid; not on the batch,
        the device, the rank, the world size or `impl`.
    grid: patches per axis, such as (8, 64) audio (freq, time), (14, 14) image, (8, 14, 14) video;
        at most 32767 tokens.
    mask_ratio: share of tokens a view lacks; it keeps floor(L * (1 - mask_ratio)). 1 keeps none.
    num_views: K; K * keep must fit into L.
    mode: `unstructured`; `time`, `freq`, `tf` (2 axes): each view owns its columns, rows or
        sub-grid; `tube` (3 axes): one spatial mask for all times; `block` (2 or 3 axes): tokens
        inside four random rectangles are kept last.
    seed: 0 <= seed < 2^63. step: 0 <= step < 2^32, or a 0-d int64 tensor on the device.
    stream: 0..255, one number per modality.
    noise: (B, L) floats that replace the random keys: ranks are their stable ascending order
        (NaN last), and seed, step, stream are not used. Only with mode "unstructured".

    Errors: ValueError naming the argument and its value.
    """
    grid, num_tokens = _check_grid(grid, mode)
    keep = _check_views(num_tokens, mask_ratio, num_views)
    check_ndim("sample_ids", sample_ids, 1, "(B,)")
    check_dtype("sample_ids", sample_ids, (torch.int64,))
    impl = resolve("complementary_masks", impl, sample_ids.device.type)
    if noise is not None:
        if mode != "unstructured":
            raise ValueError(f"mode={mode!r} does not go with noise=, which fixes the whole order")
        check_dtype("noise", noise, _FLOATS)
        check_shape("noise", noise, (sample_ids.shape[0], num_tokens), "(B, L)")
        if noise.device != sample_ids.device:
            raise ValueError(f"noise is on {noise.device}, sample_ids on {sample_ids.device}")
        order, ranks = _RANK_NOISE[impl](noise)
        return MaskPlan(order, ranks, keep, num_views, num_tokens)
    step_tensor, step = _check_draw(seed, step, stream, sample_ids.device)
    sizes = reference.mode_sizes(mode, grid, mask_ratio)
    order, ranks = _MASK_PLAN[impl](
        sample_ids, step_tensor, seed, step, stream, MODES.index(mode), grid, sizes
    )
    return MaskPlan(order, ranks, keep, num_views, num_tokens)


def _check_grid(grid: Sequence[int], mode: str) -> tuple[tuple[int, ...], int]:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if not isinstance(grid, (tuple, list)) or not all(
        isinstance(axis, int) and axis > 0 for axis in grid
    ):
        raise ValueError(f"grid must be a tuple of positive ints, got {grid!r}")
    grid = tuple(grid)
    axes = _AXES.get(mode, (1, 2, 3, 4))
    if len(grid) not in axes:
        wanted = " or ".join(str(count) for count in axes)
        raise ValueError(f"grid={grid} has {len(grid)} axes, mode {mode!r} needs {wanted}")
    num_tokens = math.prod(grid)
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid={grid} has {num_tokens} tokens, at most {MAX_TOKENS} are possible")
    return grid, num_tokens


def _check_views(num_tokens: int, mask_ratio: float, num_views: int) -> int:
    check_number("mask_ratio", mask_ratio)
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"mask_ratio={mask_ratio} is not in 0..1")
    _check_int("num_views", num_views)
    if num_views < 1:
        raise ValueError(f"num_views={num_views} is not at least 1")
    keep = len_keep(num_tokens, mask_ratio)
    if keep == 0 and mask_ratio < 1.0:
        raise ValueError(f"mask_ratio={mask_ratio} keeps none of {num_tokens} tokens; lower it")
    if num_views * keep > num_tokens:
        raise ValueError(
            f"num_views={num_views} disjoint views of {keep} visible tokens do not fit into"
            f" {num_tokens} tokens; raise mask_ratio={mask_ratio} or lower num_views"
        )
    return keep


def _check_draw(
    seed: int, step: int | Tensor, stream: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """(step as a tensor or None, step as an int or 0)."""
    _check_int("seed", seed)
    _check_int("stream", stream)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is not in 0..2^63-1")
    if not 0 <= stream < 256:
        raise ValueError(f"stream={stream} is not in 0..255")
    if isinstance(step, Tensor):
        if step.dim() != 0 or step.dtype != torch.int64 or step.device != device:
            raise ValueError(
                f"step must be an int or a 0-d int64 tensor on {device}, got"
                f" {tuple(step.shape)} {step.dtype} on {step.device}"
            )
        return step, 0
    _check_int("step", step)
    if not 0 <= step < 2**32:
        raise ValueError(f"step={step} is not in 0..2^32-1")
    return None, step


def _check_int(name: str, value: Any) -> None:
    if not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise ValueError(f"{name}={value!r} is not an int")


def _plan_torch(
    sample_ids: Tensor,
    step_tensor: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    mode: int,
    grid: list[int],
    sizes: list[int],
) -> tuple[Tensor, Tensor]:
    draw = Draw(seed, step if step_tensor is None else step + step_tensor, stream, mode)
    return reference.mask_plan(sample_ids, draw, tuple(grid), sizes)


def _plan_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from .kernel import mask_plan

    return mask_plan(*args)


def _rank_noise_triton(noise: Tensor) -> tuple[Tensor, Tensor]:
    from .kernel import rank_noise

    return rank_noise(noise)


def _plan_fake(sample_ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    plan = sample_ids.new_empty(sample_ids.shape[0], math.prod(args[-2]), dtype=torch.int16)
    return plan, torch.empty_like(plan)


def _rank_noise_fake(noise: Tensor) -> tuple[Tensor, Tensor]:
    plan = noise.new_empty(noise.shape, dtype=torch.int16)
    return plan, torch.empty_like(plan)


def _register(name: str, schema: str, torch_impl: Any, triton_impl: Any, fake: Any) -> dict:
    """Define one op per implementation (csrc/cpu/masking.cpp fills in `_cpp`); impl -> op."""
    for suffix in _SUFFIXES.values():
        torch.library.define(f"kdcmae_fast::{name}{suffix}", schema)
        torch.library.register_fake(f"kdcmae_fast::{name}{suffix}", fake)
    torch.library.impl(f"kdcmae_fast::{name}", "CompositeExplicitAutograd", torch_impl)
    torch.library.impl(f"kdcmae_fast::{name}_triton", ("cuda", "cpu"), triton_impl)
    namespace = torch.ops.kdcmae_fast
    return {impl: getattr(namespace, name + suffix).default for impl, suffix in _SUFFIXES.items()}


_MASK_PLAN = _register("mask_plan", _PLAN_SCHEMA, _plan_torch, _plan_triton, _plan_fake)
_RANK_NOISE = _register(
    "rank_noise", _NOISE_SCHEMA, reference.rank_noise, _rank_noise_triton, _rank_noise_fake
)
