"""In which dtype an op computes: from its operands, never from an enclosing autocast."""

import contextlib

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: for statistics, softmax and losses."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off for this device: inside it a float32 product is a float32 product."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
