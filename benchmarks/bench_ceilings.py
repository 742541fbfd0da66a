"""What this machine can do at best, measured in the session that the rows belong to."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

COPIED = {
    "cpu": 2**28,
    "cuda": 2**30,
}  # bytes of the copied tensor: several times any cache's share
GEMM = {"cpu": (1024, 768, 3072), "cuda": (8192, 8192, 8192)}


class Cost(NamedTuple):
    """The least an op must do, counted from its shapes, whatever the implementation."""

    bytes: int  # read and written once
    flops: int = 0  # of matrix products


class Floor(NamedTuple):
    """The time below which no implementation can come, and the two rates it is made of."""

    ms: float
    copy_gb_s: float
    gemm_tflop_s: float


def floor(cost: Cost, device: str, dtype: torch.dtype) -> Floor:
    """The longer of moving `cost.bytes` at the rate of a copy and `cost.flops` at a GEMM's."""
    moved, multiplied = copy_rate(device), gemm_rate(device, dtype)
    seconds = max(cost.bytes / moved, cost.flops / multiplied)
    return Floor(seconds * 1e3, moved / 1e9, multiplied / 1e12)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes per second of a large copy, read and written bytes counted."""
    source = torch.rand(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED[device] / fastest(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of one large matrix product of this dtype."""
    m, k, n = GEMM[device]
    left, right = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, k), (k, n)))
    return 2 * m * k * n / fastest(lambda: left @ right, device)


def fastest(call: Callable[[], object], device: str, rounds: int = 8) -> float:
    """Seconds of the fastest of some calls, the first two not counted."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])
