"""EMA updates: the formula, dtypes, strides, aliases, versions, compile, errors."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from kdcmae_fast.kernels import ema_update_

OP = "ema_update_"
SHAPES = [(1,), (3, 5), (65, 257), (), (0, 4), (16384,), (16385,), (70_001,)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def wanted(teacher: list[Tensor], student: list[Tensor], momentum: float) -> list[Tensor]:
    pairs = zip(teacher, student, strict=True)
    return [momentum * t.double() + (1 - momentum) * s.double() for t, s in pairs]


def assert_updated(teacher, before, student, momentum) -> None:
    """Within the rounding of a float32 (float64) subtraction, product and sum."""
    for got, old, new, want in zip(
        teacher, before, student, wanted(before, student, momentum), strict=True
    ):
        ulp = torch.finfo(got.dtype).eps
        bound = 2 * ulp * (old.double().abs() + new.double().abs()) + 1e-45
        assert got.dtype == old.dtype and ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.75, 0.996, 0.99995, 1.0])
@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float64])
def test_matches_the_formula(teacher_dtype, student_dtype, momentum, impl):
    teacher, student = tensors(teacher_dtype), tensors(student_dtype)
    before = [t.clone() for t in teacher]
    assert ema_update_(teacher, student, momentum) is None
    assert_updated(teacher, before, student, momentum)
    if momentum == 1:
        assert all(torch.equal(t, old) for t, old in zip(teacher, before, strict=True))
    if momentum == 0 and torch.promote_types(student_dtype, teacher_dtype) == teacher_dtype:
        pairs = zip(teacher, student, strict=True)
        assert all(torch.equal(t, s.to(teacher_dtype)) for t, s in pairs)


def test_stays_within_pytorch_s_own_error(impl, within_budget):
    """The published form, one parameter at a time: m * t + (1 - m) * s."""
    (teacher,), (student,) = tensors(shapes=[(300, 257)]), tensors(shapes=[(300, 257)])
    plain = teacher.clone().mul_(0.997).add_(student, alpha=0.003)
    exact = wanted([teacher], [student], 0.997)[0]
    ema_update_([teacher], [student], 0.997)
    within_budget(teacher, plain, exact, slack=0.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_momentum_as_a_tensor(dtype, impl):
    teacher, student = tensors(), tensors(torch.bfloat16)
    before = [t.clone() for t in teacher]
    momentum = torch.tensor(0.75, dtype=dtype)
    ema_update_(teacher, student, momentum)
    assert_updated(teacher, before, student, 0.75)


def test_mixed_students_in_one_call(impl):
    student = [torch.randn(40, 9).to(dtype) for dtype in FLOATS]
    teacher = [torch.randn(40, 9, dtype=dtype) for dtype in [torch.float32, torch.float64] * 2]
    before = [t.clone() for t in teacher]
    ema_update_(iter(teacher), iter(student), 0.9)
    assert_updated(teacher, before, student, 0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float64])
def test_shadow_is_the_rounded_teacher(teacher_dtype, dtype, impl):
    scale = torch.logspace(-9, 5, 16385, dtype=torch.float64)
    teacher = [(torch.randn(16385) * scale).to(teacher_dtype), torch.randn(3, 4).to(teacher_dtype)]
    teacher[0][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    student = [t.clone() for t in teacher]
    student[0][3:] = torch.randn(16382)
    shadow = [torch.empty_like(t, dtype=dtype) for t in teacher]
    ema_update_(teacher, student, 0.5, shadow_params=shadow)
    for t, copy in zip(teacher, shadow, strict=True):
        rounded = t.float().to(dtype)  # float64 goes through float32 where it is fused
        torch.testing.assert_close(copy, rounded, rtol=0.008, atol=1e-7, equal_nan=True)
        if teacher_dtype == torch.float32:
            assert torch.equal(copy.isnan(), rounded.isnan())
            assert torch.equal(copy.nan_to_num(), rounded.nan_to_num())


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_any_strides(student_dtype, impl):
    def make(dtype: torch.dtype, strided: bool) -> list[Tensor]:
        flat = torch.randn(1 + 6 * 8).to(dtype)
        odd = flat[1:].view(6, 8)
        sliced = torch.randn(6, 16).to(dtype)[:, ::2]
        image = torch.randn(2, 3, 4, 5).to(dtype)
        if strided:
            return [odd.t(), sliced, image.contiguous(memory_format=torch.channels_last)]
        return [odd.t().contiguous(), sliced.contiguous(), image]

    for teacher_strided, student_strided in ((True, True), (True, False), (False, True)):
        teacher = make(torch.float32, teacher_strided)
        student = make(student_dtype, student_strided)
        before = [t.clone() for t in teacher]
        shadow = [torch.empty(t.shape, dtype=torch.bfloat16) for t in teacher]
        ema_update_(teacher, student, 0.9, shadow_params=shadow)
        assert_updated(teacher, before, student, 0.9)
        assert all(torch.equal(c, t.bfloat16()) for c, t in zip(shadow, teacher, strict=True))


def test_neighbours_of_a_slice_are_left_alone(impl):
    whole = torch.zeros(100)
    ema_update_([whole[10:20]], [torch.ones(10)], 0.5)
    assert whole[10:20].eq(0.5).all() and whole.sum() == 5


def test_a_student_that_is_its_teacher_changes_nothing(impl):
    teacher = tensors()
    before = [t.clone() for t in teacher]
    ema_update_(teacher, teacher, 0.3)
    assert all(torch.equal(t, old) for t, old in zip(teacher, before, strict=True))


def test_expanded_teachers_are_refused_expanded_students_are_not(impl):
    with pytest.raises(RuntimeError, match="single memory location"):
        ema_update_([torch.zeros(1).expand(4)], [torch.ones(4)], 0.5)
    teacher = torch.zeros(4, 3)
    ema_update_([teacher], [torch.ones(3).expand(4, 3)], 0.5)
    assert teacher.eq(0.5).all()


def test_nothing_to_do(impl):
    ema_update_([], [], 0.5)
    ema_update_([], [], torch.tensor(0.5), shadow_params=[])
    ema_update_([torch.empty(0)], [torch.empty(0)], 0.5)


def test_modules_and_gradients(impl):
    student = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    teacher = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    before = [p.detach().clone() for p in teacher.parameters()]
    ema_update_(teacher.parameters(), student.parameters(), 0.9)
    assert_updated(
        [p.detach() for p in teacher.parameters()], before,
        [p.detach() for p in student.parameters()], 0.9,
    )  # fmt: skip
    assert all(p.requires_grad and p.grad_fn is None for p in teacher.parameters())
    assert all(p.grad is None for p in student.parameters())


def test_autograd_sees_that_the_teacher_was_written(impl):
    x = torch.randn(3, requires_grad=True)
    teacher = torch.randn(3)
    version = teacher._version
    product = (x * teacher).sum()
    ema_update_([teacher], [torch.randn(3)], 0.5)
    assert teacher._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_16_bit_teacher_would_never_move():
    """Why it is refused: at XKD's last momenta the increments are below half an ulp."""
    teacher = torch.ones(1, dtype=torch.bfloat16)
    moved = teacher.lerp(torch.full((1,), 4.0, dtype=torch.bfloat16), 5e-4)
    assert torch.equal(moved, teacher)
    exact = torch.ones(1)
    ema_update_([exact], [torch.full((1,), 4.0)], 0.9995)
    assert exact.item() == pytest.approx(1.0015)


def test_repeats_to_the_bit_whatever_the_threads(impl):
    student = tensors(torch.bfloat16)
    start, runs, threads = tensors(), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append([t.clone() for t in start])
            ema_update_(runs[-1], student, 0.99)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_not_a_number_shows(impl):
    teacher, student = torch.zeros(3), torch.tensor([0.0, math.nan, 1.0], dtype=torch.float16)
    ema_update_([teacher], [student], 0.5)
    assert teacher.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9)], ids=["float", "tensor"])
def test_compiles_without_breaks(momentum, impl):
    torch._dynamo.reset()

    def step(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        ema_update_(teacher, student, momentum)
        return teacher[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 9):
        teacher = tensors(shapes=[(size,), (size, 3)])
        student = tensors(torch.bfloat16, shapes=[(size,), (size, 3)])
        before = [t.clone() for t in teacher]
        doubled = compiled(teacher, student)
        assert_updated(teacher, before, student, float(momentum))
        assert torch.equal(doubled, teacher[0] * 2)


@pytest.mark.parametrize("with_tensor", [False, True])
def test_opcheck(with_tensor, impl):
    if impl == "torch":
        pytest.skip("impl='torch' is aten ops, no op of ours")
    teacher, student = tensors(shapes=[(4,), (2, 3)]), tensors(torch.bfloat16, [(4,), (2, 3)])
    shadow = [torch.zeros_like(t, dtype=torch.float16) for t in teacher]
    momentum = torch.tensor(0.5) if with_tensor else None
    op = torch.ops.kdcmae_fast.ema_update_cpp.default
    torch.library.opcheck(op, (teacher, student, shadow, 0.9, momentum))


@pytest.mark.large
def test_past_int32(impl):
    """2^31 + 64 elements, 8.6 GB: the teacher is its own student, then one half the other's."""
    whole = torch.zeros(2**31 + 64)
    half = whole[2**30 + 32 :].fill_(1.0)
    ema_update_([whole], [whole], 0.25)
    assert whole[-1] == 1 and whole[0] == 0
    ema_update_([whole[: 2**30 + 32]], [half], 0.5)
    assert whole[0] == 0.5 and whole[2**30 + 31] == 0.5 and whole[2**30 + 32] == 1


T = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([T], [T, T], 0.5), {}, "student_params has 2 tensors, teacher_params 1"),
        (([T], [T.view(3, 4)], 0.5), {}, r"student_params\[0\] has shape \(3, 4\), its teacher"),
        (([T, 3], [T, T], 0.5), {}, r"teacher_params\[1\] must be a tensor, got int"),
        (([T, T.bfloat16()], [T, T], 0.5), {}, r"teacher_params\[1\] must be float32 or float64"),
        (([T.half()], [T], 0.5), {}, r"teacher_params\[0\] must be .*, got torch.float16"),
        (([T.long()], [T], 0.5), {}, r"teacher_params\[0\] must be .*, got torch.int64"),
        (([T], [T.long()], 0.5), {}, r"student_params\[0\] must be float64 or .*, got torch.int64"),
        (([T], [T.to("meta")], 0.5), {}, r"student_params\[0\] is on meta, teacher_params\[0\] on"),
        (([T, T], [T, T], 0.5), {}, "teacher_params holds a tensor twice"),
        (([T], [T], 1.5), {}, r"momentum must be in \[0, 1\], got 1.5"),
        (([T], [T], math.nan), {}, r"momentum must be in \[0, 1\], got nan"),
        (([T], [T], torch.ones(1)), {}, "momentum must be a float or a 0-d floating-point tensor"),
        (([T], [T], torch.tensor(1)), {}, "momentum must be a float or a 0-d floating-point"),
        (([T], [T], torch.tensor(0.5, device="meta")), {}, "momentum is on meta"),
        (([T], [T], 0.5), {"shadow_params": []}, "shadow_params has 0 tensors, teacher_params 1"),
        (([T], [T], 0.5), {"shadow_params": [T]}, r"shadow_params\[0\] must be bfloat16 or float"),
        (([T], [T], 0.5), {"impl": "cuda"}, "impl='cuda' of ema_update_ is not available here"),
    ],
)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        functools.partial(ema_update_, **options)(*arguments)
    assert not T.any()
