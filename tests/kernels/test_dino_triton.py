"""The DINO loss in Triton, beside the reference."""

import math

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import dino_loss

pytestmark = pytest.mark.triton

CROPS = [(1, 1, False), (1, 3, False), (2, 2, True), (2, 4, True), (3, 2, True)]
EVERY = pytest.mark.parametrize("crops", CROPS, ids=str)


def logits(crops, batch=3, width=17, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """teacher (T, B, D), student (S, B, D), center (D,)."""
    teachers, students, _ = crops
    shapes = (teachers, batch, width), (students, batch, width), (width,)
    teacher, student, center = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return teacher.to(dtype), student.to(dtype), (0.3 * center).to(dtype)


def run(operands, device, impl, **options) -> list[Tensor]:
    """(losses, gradient by the student) on the CPU."""
    teacher, student, center = (x.detach().to(device) for x in operands)
    student.requires_grad_()
    options = {"teacher_temperature": 0.07, **options}
    rows = dino_loss(teacher, student, center, reduction="none", impl=impl, **options)
    weight = torch.arange(1, len(rows) + 1, device=device, dtype=rows.dtype)
    return [x.detach().cpu() for x in (rows, *torch.autograd.grad(rows @ weight, student))]


# One block, masked; several of the loss; several of the statistics, the last masked.
@EVERY
@pytest.mark.parametrize("shape", [(3, 1), (2, 17), (2, 2048), (1, 8193)], ids=str)
def test_float64_equals_the_reference(crops, shape, triton_device):
    operands, options = logits(crops, *shape), {"exclude_matched": crops[2]}
    results = run(operands, triton_device, "triton", **options)
    for result, want in zip(results, run(operands, "cpu", "torch", **options), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(crops, dtype, triton_device, within_budget):
    operands, options = logits(crops, 6, 1100, dtype), {"exclude_matched": crops[2]}
    results = run(operands, triton_device, "triton", **options)
    eager = run(operands, "cpu", "torch", **options)
    exact = run([x.double() for x in operands], "cpu", "torch", **options)
    for index, triple in enumerate(zip(results, eager, exact, strict=True)):
        assert triple[0].dtype == triple[1].dtype
        # The interpreter rounds to bfloat16 towards zero.
        truncated = dtype == torch.bfloat16 and triton_device == "cpu"
        if index == 0:  # losses up to 40: slack is one unit in their last place
            within_budget(*triple, slack=4e-6)
        else:
            within_budget(*triple, factor=6.0 if truncated else 3.0)


def test_temperatures_are_not_compiled_in(triton_device):
    operands = logits((2, 3, True), 2, 9)
    for temperatures in ((1.0, 0.5), (0.04, 3.0)):
        options = {
            "teacher_temperature": temperatures[0], "student_temperature": temperatures[1],
            "exclude_matched": True,
        }  # fmt: skip
        results = run(operands, triton_device, "triton", **options)
        for result, want in zip(results, run(operands, "cpu", "torch", **options), strict=True):
            torch.testing.assert_close(result, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_far_and_near_logits(scale, triton_device):
    operands = [scale * x for x in logits((2, 3, True), 2, 50, torch.float32)]
    rows, grad = run(operands, triton_device, "triton", exclude_matched=True)
    exact = [x.double() for x in operands]
    wants = run(exact, "cpu", "torch", exclude_matched=True)
    torch.testing.assert_close(rows.double(), wants[0], rtol=3e-5, atol=0)
    torch.testing.assert_close(grad.double(), wants[1], rtol=3e-3, atol=1e-5)


def test_empty_batches_strides_mixed_dtypes_and_unwritten_memory(triton_device, poison_empty):
    empty = run(logits((2, 3, True), batch=0), triton_device, "triton")
    assert [x.shape for x in empty] == [(0,), (3, 0, 17)]
    teacher, student, center = logits((2, 3, True), 4, 40, torch.float32)
    student = student.half()
    padded = torch.full((3, 4, 81), math.nan, dtype=torch.float16)
    padded[..., 1::2] = student
    other = teacher.transpose(0, 1).contiguous().transpose(0, 1), padded[..., 1::2], center
    results = run(other, triton_device, "triton", exclude_matched=True)
    wants = run((teacher, student, center), "cpu", "torch", exclude_matched=True)
    for result, want in zip(results, wants, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-3, atol=1e-4)
    one = teacher[:1], student[:1].expand(3, -1, -1), center
    wants = run((one[0], one[1].clone(), center), "cpu", "torch")
    for result, want in zip(run(one, triton_device, "triton"), wants, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-3, atol=1e-4)


def test_not_a_number_shows(triton_device):
    for index in range(2):
        operands = logits((2, 2, False), dtype=torch.float32)
        operands[index][1, 2, 3] = math.nan
        rows, _ = run(operands, triton_device, "triton")
        assert rows.isnan().tolist() == [False, False, True]


def test_opcheck(triton_device):
    ops, options = torch.ops.kdcmae_fast, (0.07, 0.1, True)
    operands = [x.to(triton_device) for x in logits((2, 3, True), 2, 5, torch.float32)]
    _, statistics = ops.dino_rows_triton(*operands, *options)
    torch.library.opcheck(ops.dino_rows_triton.default, (*operands, *options))
    backward = (torch.randn(2, device=triton_device), *operands, statistics, *options)
    torch.library.opcheck(ops.dino_rows_grad_triton.default, backward)


def test_deterministic(triton_device):
    operands = logits((2, 4, True), 3, 1100, torch.float32)
    once, again = (run(operands, triton_device, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
