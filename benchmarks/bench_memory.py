"""Memory and kernel launches of one step."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NOT_KERNELS = ("Memcpy", "Memset")


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes autograd keeps between forward and backward, parameters and inputs included once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def peak_bytes(step: Callable[[], None], device: str | None = None) -> int:
    """Peak of the allocations above what was there before the step.

    CUDA: the caching allocator's own maximum. CPU: the running sum of PyTorch's allocator events,
    which leaves out what C++ code takes from malloc directly, such as a GEMM's packing buffers.
    device: "cuda" or "cpu"; by default "cuda" where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    changes = [event for event in _events(step, profile_memory=True) if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def kernel_launches(step: Callable[[], None]) -> int:
    """Kernels that one step runs on the GPU; copies and fills by the driver are not counted."""
    return sum(
        event.device_type() == DeviceType.CUDA and not event.name().startswith(NOT_KERNELS)
        for event in _events(step, ProfilerActivity.CUDA)
    )


def _events(step: Callable[[], None], *activities: ProfilerActivity, **options: bool) -> list[Any]:
    """The profiler's events of one step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own advice
        with profile(activities=[ProfilerActivity.CPU, *activities], **options) as profiler:
            step()
            if ProfilerActivity.CUDA in activities:
                torch.cuda.synchronize()
    return profiler.profiler.kineto_results.events()
