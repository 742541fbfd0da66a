"""Argument checks of the public ops: a ValueError that names the argument and its value."""

import numbers
from typing import Any

import torch
from torch import Tensor


def check_ndim(name: str, tensor: Tensor, ndim: int | tuple[int, ...], layout: str) -> None:
    """Raise unless `tensor` has `ndim` axes; `layout` spells them, such as "(B, L, D)"."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if tensor.dim() not in allowed:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """Raise unless `tensor` has exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {layout} = {shape}, got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless the tensor's dtype is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {names}, got {tensor.dtype}")


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a number, also one that torch.compile traces."""
    if not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_mask_plan(name: str, plan: Any, batch: int, tokens: int) -> None:
    """Raise unless `plan` covers `batch` samples of `tokens` tokens."""
    if not hasattr(plan, "token_of_rank"):
        raise ValueError(f"{name} must be a MaskPlan, got {type(plan).__name__}")
    if tuple(plan.token_of_rank.shape) != (batch, tokens):
        raise ValueError(
            f"{name} covers (batch, tokens) = {tuple(plan.token_of_rank.shape)}, "
            f"the tensor needs {(batch, tokens)}"
        )
