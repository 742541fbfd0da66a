"""Memory and kernel launches of one step."""

from collections.abc import Callable

import torch
from torch import Tensor
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


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Peak of the allocations above what was there before the step.

    CUDA: the caching allocator's own maximum. CPU: the running sum of PyTorch's allocator events,
    which leaves out what C++ code takes from malloc directly, such as a GEMM's packing buffers.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def kernel_launches(step: Callable[[], None]) -> int:
    """Kernels that one step runs on the GPU; copies and fills by the driver are not counted."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type() == torch.autograd.DeviceType.CUDA
        and not event.name().startswith(NOT_KERNELS)
        for event in profiler.profiler.kineto_results.events()
    )
