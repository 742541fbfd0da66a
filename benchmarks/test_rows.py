"""DINO loss and pooled LayerNorm beside the published op sequences they replace."""

import published_rows as published
import pytest
import torch

from kdcmae_fast import kernels
from kdcmae_fast.kernels.common import implementations, unavailable


def providers(op: str) -> pytest.MarkDecorator:
    """The published op sequence and every implementation that `op` has."""
    return pytest.mark.parametrize("impl", ("published", *implementations(op)))


def skip_unavailable(op: str, impl: str, device: str) -> None:
    problem = impl != "published" and unavailable(op, impl, device)
    if problem:
        pytest.skip(problem)


@providers("dino_loss")
@pytest.mark.parametrize(
    "teachers, students, width, exclude_matched",
    [(1, 2, 8192, False), (1, 4, 8192, False), (2, 10, 65536, True)],
    ids=["xkd", "xkd-mas", "dino"],
)
def test_dino_loss(impl, teachers, students, width, exclude_matched, full, device, measure):
    skip_unavailable("dino_loss", impl, device)
    batch = 32 if full else 2
    width = width if full else width // 16
    teacher = torch.randn(teachers, batch, width, device=device)
    student = torch.randn(students, batch, width, device=device, requires_grad=True)
    center = torch.zeros(width, device=device)

    def published_way():
        return published.dino_loss(teacher, student, center, 0.07, 0.1, exclude_matched)

    def ours():
        return kernels.dino_loss(
            teacher, student, center, teacher_temperature=0.07, student_temperature=0.1,
            exclude_matched=exclude_matched, impl=impl,
        )  # fmt: skip

    forward = published_way if impl == "published" else ours
    group = f"dino_loss T={teachers} S={students} B={batch} D={width}"
    measure(group, impl, forward, (student,), expected=published_way())


@providers("update_center")
def test_update_center(impl, full, device, measure):
    skip_unavailable("update_center", impl, device)
    batch, width = (64, 8192) if full else (4, 512)
    teacher, center = torch.randn(1, batch, width, device=device), torch.zeros(width, device=device)

    def published_way():
        return published.update_center(center, teacher, 0.9)

    def ours():
        return kernels.update_center(center, teacher, impl=impl)

    forward = published_way if impl == "published" else ours
    group = f"update_center B={batch} D={width}"
    measure(group, impl, forward, expected=published_way())


@providers("pooled_layer_norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [177, 128, 49])
def test_pooled_layer_norm(impl, length, dtype, full, device, measure):
    skip_unavailable("pooled_layer_norm", impl, device)
    batch, width = (64, 768) if full else (4, 192)
    x = torch.randn(batch, length, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(width, device=device, dtype=dtype, requires_grad=True)

    def published_way():
        return published.pooled_layer_norm(x, weight, bias).float()

    def ours():
        return kernels.pooled_layer_norm(x, weight, bias, impl=impl)

    forward = published_way if impl == "published" else ours
    name = str(dtype).removeprefix("torch.")
    group = f"pooled_layer_norm B={batch} L={length} D={width} {name}"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    measure(group, impl, forward, (x, weight, bias), published_way(), tolerance)
