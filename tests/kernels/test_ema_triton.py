"""kernels/ema in Triton, beside the formula."""

import pytest
import torch
from torch import Tensor

from kdcmae_fast.kernels import ema_update_

pytestmark = pytest.mark.triton

SHAPES = [(1,), (3, 5), (), (0, 4), (4097,), (16384,), (20000,)]
STUDENTS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors(device: str, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).to(device) for shape in shapes]


def assert_updated(teacher, before, student, momentum: float) -> None:
    for got, old, new in zip(teacher, before, student, strict=True):
        want = momentum * old.double() + (1 - momentum) * new.double()
        bound = 2.4e-7 * (old.double().abs() + new.double().abs()) + 1e-45
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.996, 1.0])
@pytest.mark.parametrize("dtype", STUDENTS)
def test_matches_the_formula(dtype, momentum, triton_device):
    teacher, student = tensors(triton_device), tensors(triton_device, dtype)
    before = [t.clone() for t in teacher]
    ema_update_(teacher, student, momentum, impl="triton")
    assert_updated(teacher, before, student, momentum)
    if momentum == 1:
        assert all(torch.equal(t, old) for t, old in zip(teacher, before, strict=True))
    if momentum == 0:
        assert all(torch.equal(t, s.float()) for t, s in zip(teacher, student, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_momentum_as_a_tensor(dtype, triton_device):
    teacher, student = tensors(triton_device), tensors(triton_device, torch.bfloat16)
    for value in (0.75, 0.5):  # the same launch, another value
        before = [t.clone() for t in teacher]
        momentum = torch.tensor(value, dtype=dtype, device=triton_device)
        ema_update_(teacher, student, momentum, impl="triton")
        assert_updated(teacher, before, student, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shadow_is_the_rounded_teacher(dtype, triton_device):
    teacher, student = tensors(triton_device), tensors(triton_device)
    shadow = [torch.full_like(t, 99, dtype=dtype) for t in teacher]
    ema_update_(teacher, student, 0.5, shadow_params=shadow, impl="triton")
    for t, copy in zip(teacher, shadow, strict=True):
        if triton_device == "cuda":
            assert torch.equal(copy, t.to(dtype))
        else:  # the interpreter truncates
            torch.testing.assert_close(copy.float(), t, rtol=0.008, atol=1e-6)


def test_unaligned_mixed_and_strided_tensors_in_one_call(triton_device):
    flat = torch.randn(5001, device=triton_device)
    teacher = [
        flat[1:], torch.randn(9, 6, device=triton_device).t(),
        torch.randn(6, 16, device=triton_device)[:, ::2], torch.randn(50, device=triton_device),
    ]  # fmt: skip
    student = [
        torch.randn(5000, device=triton_device).bfloat16(), torch.randn(6, 9, device=triton_device),
        torch.randn(6, 8, device=triton_device).half(),
        torch.randn(51, device=triton_device).half()[1:],
    ]  # fmt: skip
    shadow = [torch.empty(t.shape, dtype=torch.float16, device=triton_device) for t in teacher]
    first, before = flat[0].item(), [t.clone() for t in teacher]
    ema_update_(teacher, student, 0.9, shadow_params=shadow, impl="triton")
    assert_updated(teacher, before, student, 0.9)
    assert flat[0].item() == first
    for t, copy in zip(teacher, shadow, strict=True):
        torch.testing.assert_close(copy.float(), t, rtol=1e-3, atol=1e-6)


def test_a_table_does_not_outlive_its_tensors(triton_device):
    """The same list with other storage behind it: the addresses are looked at in every call."""
    teacher, student = tensors(triton_device), tensors(triton_device)
    ema_update_(teacher, student, 0.5, impl="triton")
    for t in teacher:
        t.data = t.data.clone()
    before = [t.clone() for t in teacher]
    ema_update_(teacher, student, 0.5, impl="triton")
    assert_updated(teacher, before, student, 0.5)


def test_versions_gradients_and_aliases(triton_device):
    teacher = torch.randn(7, device=triton_device, requires_grad=True)
    before, version = teacher.detach().clone(), teacher._version
    ema_update_([teacher], [teacher], 0.5, impl="triton")
    assert torch.equal(teacher, before) and teacher._version == version + 1
    assert teacher.requires_grad and teacher.grad_fn is None


def test_repeated_runs_and_nothing_to_do(triton_device):
    student, start = tensors(triton_device, torch.float16), tensors(triton_device)
    runs = [[t.clone() for t in start] for _ in range(2)]
    for teacher in runs:
        ema_update_(teacher, student, 0.9, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    empty = torch.empty(0, device=triton_device)
    ema_update_([empty], [empty], 0.9, impl="triton")


def test_float64_teachers_are_refused(triton_device):
    teacher = [torch.zeros(2, dtype=torch.float64, device=triton_device)]
    with pytest.raises(ValueError, match="takes no float64"):
        ema_update_(teacher, teacher, 0.5, impl="triton")


def test_opcheck(triton_device):
    shapes = [(4,), (2, 3)]
    teacher = tensors(triton_device, shapes=shapes)
    student = tensors(triton_device, torch.bfloat16, shapes)
    shadow = [torch.zeros_like(t, dtype=torch.float16) for t in teacher]
    op = torch.ops.kdcmae_fast.ema_update_triton.default
    torch.library.opcheck(op, (teacher, student, shadow, 0.9, None))
