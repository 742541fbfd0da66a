"""The teacher update of a ViT's parameters beside the published loop and PyTorch's own lerp."""

import published_ema as published
import pytest
import torch
from torch import Tensor

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable

MOMENTUM = 0.997
PROVIDERS = ("published", "foreach_lerp", *implementations("ema_update_"))


def parameters(width: int, depth: int, device: str) -> list[Tensor]:
    """Shapes of `depth` transformer blocks."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width),
             (4 * width,), (width, 4 * width), *[(width,)] * 5]  # fmt: skip
    return [torch.randn(shape, device=device) for shape in block * depth]


@pytest.mark.parametrize("impl", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ema_update(impl, dtype, full, device, measure):
    ours = impl not in ("published", "foreach_lerp")
    problem = ours and unavailable("ema_update_", impl, device)
    if problem:
        pytest.skip(problem)
    if impl == "foreach_lerp" and dtype != torch.float32:
        pytest.skip("_foreach_lerp_ takes equal dtypes only")
    width, depth = (768, 12) if full else (64, 12)
    teacher = parameters(width, depth, device)
    student = [s.to(dtype) for s in parameters(width, depth, device)]
    # The value of the first call, which `measure` checks, is that of one update.
    expected = MOMENTUM * teacher[0][:2] + (1 - MOMENTUM) * student[0][:2]

    def forward() -> Tensor:
        if impl == "published":
            published.ema_update_(teacher, student, MOMENTUM)
        elif impl == "foreach_lerp":
            torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)
        else:
            kernels.ema_update_(teacher, student, MOMENTUM, impl=impl)
        return teacher[0][:2]

    millions = sum(t.numel() for t in teacher) / 1e6
    group = f"ema_update_ {millions:.1f}M from {str(dtype).removeprefix('torch.')}"
    measure(group, impl, forward, expected=expected)
