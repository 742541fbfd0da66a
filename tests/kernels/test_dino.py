"""The DINO loss and the update of its centre: formulas, gradients, dtypes, compile, errors."""

import functools
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdcmae_fast.kernels import dino_loss, update_center

OP = "dino_loss"  # of the fixture impl
pytestmark = pytest.mark.usefixtures("impl")

CROPS = [(1, 1, False), (1, 3, False), (2, 2, True), (2, 5, True), (3, 2, True), (2, 4, False)]
EVERY = pytest.mark.parametrize("crops", CROPS, ids=str)
loss_of = functools.partial(dino_loss, teacher_temperature=0.07)


def logits(crops, batch=3, width=17, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """teacher (T, B, D), student (S, B, D), center (D,)."""
    teachers, students, _ = crops
    shapes = (teachers, batch, width), (students, batch, width), (width,)
    teacher, student, center = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return teacher.to(dtype), student.to(dtype), (0.3 * center).to(dtype)


def double_loop(teacher, student, center, exclude, teacher_temperature, student_temperature):
    """Pair by pair, as published; (B,)."""
    total, pairs = torch.zeros(teacher.shape[1], dtype=torch.float64), 0
    for t, logits_t in enumerate(teacher.double()):
        q = ((logits_t - center.double()) / teacher_temperature).exp()
        q = q / q.sum(dim=1, keepdim=True)
        for s, logits_s in enumerate(student.double()):
            if exclude and t == s:
                continue
            p = (logits_s / student_temperature).exp()
            total = total - (q * (p / p.sum(dim=1, keepdim=True)).log()).sum(dim=1)
            pairs += 1
    return total / pairs


@EVERY
@pytest.mark.parametrize("temperatures", [(0.07, 0.1), (1.0, 2.5)], ids=str)
def test_matches_the_published_double_loop(crops, temperatures):
    operands = logits(crops)
    student = operands[1].requires_grad_()
    want = double_loop(*operands, crops[2], *temperatures)
    options = {
        "teacher_temperature": temperatures[0], "student_temperature": temperatures[1],
        "exclude_matched": crops[2],
    }  # fmt: skip
    rows = dino_loss(*operands, reduction="none", **options)
    torch.testing.assert_close(rows, want, rtol=1e-11, atol=1e-12)
    mean = dino_loss(*operands, **options)
    torch.testing.assert_close(mean, want.mean(), rtol=1e-11, atol=1e-12)
    (grad,) = torch.autograd.grad(mean, student)
    torch.testing.assert_close(
        grad, torch.autograd.grad(want.mean(), student)[0], rtol=1e-9, atol=1e-13
    )


def test_two_classes_in_closed_form():
    # q = (3/4, 1/4) against p = (1/2, 1/2) is log 2, against p = q the entropy.
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    flat, center = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    options = {"teacher_temperature": 1.0, "student_temperature": 1.0}
    assert dino_loss(teacher, flat, center, **options).item() == pytest.approx(math.log(2))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert dino_loss(teacher, teacher, center, **options).item() == pytest.approx(entropy)
    # A centre equal to the teacher leaves uniform targets.
    uniform = dino_loss(teacher, teacher, teacher, **options).item()
    assert uniform == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_one_crop_and_a_stored_centre_need_no_crop_axis():
    teacher, student, center = logits((1, 1, False))
    rows = loss_of(teacher, student, center, reduction="none")
    assert torch.equal(loss_of(teacher[0], student[0], center[None], reduction="none"), rows)


@EVERY
def test_gradcheck(crops):
    teacher, student, center = logits(crops, batch=2, width=5)

    def rows(student):
        return dino_loss(
            teacher, student, center, teacher_temperature=0.5, student_temperature=0.7,
            exclude_matched=crops[2], reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(rows, (student.requires_grad_(),))


def test_gradients_go_to_the_student_only():
    operands = [x.requires_grad_() for x in logits((2, 2, True))]
    loss_of(*operands).backward()
    assert operands[0].grad is None and operands[2].grad is None
    assert operands[1].grad.abs().sum() > 0
    teacher, student, center = (x.detach() for x in operands)
    assert not loss_of(teacher.requires_grad_(), student, center).requires_grad


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (3, 96), (65, 17), (2, 8193)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stays_within_pytorch_s_own_error(crops, shape, dtype, three_way):
    teacher, student, center = logits(crops, *shape, dtype)

    def rows(student, impl="auto"):
        wide = student.dtype == torch.float64
        fixed = (x.double() if wide else x for x in (teacher, center))
        return loss_of(
            next(fixed), student, next(fixed), exclude_matched=crops[2], reduction="none", impl=impl
        )

    three_way(rows, functools.partial(rows, impl="torch"), (student,))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_far_and_near_logits(scale):
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-12)):
        operands = [scale * x for x in logits((2, 3, True), 4, 50, dtype)]
        want = loss_of(*(x.double() for x in operands), exclude_matched=True, impl="torch")
        loss = loss_of(*operands, exclude_matched=True)
        torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_mixed_operands_compute_in_float32(dtype):
    teacher, student, center = logits((2, 3, True), 5, 33, dtype)
    wide = student.float().requires_grad_()
    want = loss_of(teacher.float(), wide, center.float(), exclude_matched=True)
    (full,) = torch.autograd.grad(want, wide)
    for mixed in ((teacher, center), (teacher.float(), center), (teacher, center.float())):
        low = student.clone().requires_grad_()
        loss = loss_of(mixed[0], low, mixed[1], exclude_matched=True)
        assert loss.dtype == torch.float32 and torch.equal(loss, want)
        assert torch.equal(torch.autograd.grad(loss, low)[0], full.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(teacher, student, center, exclude_matched=True)
    assert torch.equal(loss, want)
    assert loss_of(teacher.double(), student, center).dtype == torch.float64


def test_empty_batches():
    teacher, student, center = logits((2, 3, True), batch=0, dtype=torch.float32)
    student.requires_grad_()
    for reduction, shape in (("mean", ()), ("none", (0,))):
        loss = loss_of(teacher, student, center, reduction=reduction)
        assert loss.shape == shape and not loss.any()
        assert torch.autograd.grad(loss.sum(), student)[0].shape == student.shape


def test_any_strides():
    teacher, student, center = logits((2, 3, True), 6, 40, torch.float32)
    want = loss_of(teacher, student.requires_grad_(), center, reduction="none")
    (grad,) = torch.autograd.grad(want.sum(), student)

    def strided(x: Tensor) -> Tensor:
        padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
        padded[..., 1::2] = x
        return padded[..., 1::2]

    layouts = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced, odd offset": strided,
    }
    for name, layout in layouts.items():
        other = layout(student.detach()).requires_grad_()
        rows = loss_of(layout(teacher), other, center, reduction="none")
        torch.testing.assert_close(rows, want, msg=name)
        torch.testing.assert_close(torch.autograd.grad(rows.sum(), other)[0], grad, msg=name)
    expanded = loss_of(teacher[:1].expand(2, -1, -1), student[:1].expand(3, -1, -1), center)
    once = loss_of(teacher[0], student[0], center)
    torch.testing.assert_close(expanded, once)


@EVERY
def test_deterministic_whatever_the_number_of_threads(crops):
    teacher, student, center = logits(crops, 40, 600, torch.float32)
    student.requires_grad_()
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            rows = loss_of(teacher, student, center, exclude_matched=crops[2], reduction="none")
            runs.append((rows, *torch.autograd.grad(rows.sum(), student)))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


def test_not_a_number_shows():
    for index in range(2):
        operands = logits((2, 2, False), dtype=torch.float32)
        operands[index][1, 2, 3] = math.nan
        rows = loss_of(*operands, reduction="none")
        assert rows.isnan().tolist() == [False, False, True]


def test_keeps_the_inputs_and_two_numbers_per_row(impl, saved_storages):
    if impl == "torch":
        pytest.skip("autograd keeps what it needs of the plain form")
    teacher, student, center = logits((2, 3, True), 6, 40, torch.bfloat16)
    student.requires_grad_()
    saved = saved_storages(lambda: loss_of(teacher, student, center))
    inputs = {x.data_ptr() for x in (teacher, student, center)}
    assert inputs <= set(saved)
    assert [size for place, size in saved.items() if place not in inputs] == [2 * 5 * 6 * 4]


# Dynamo itself instantiates the autograd.Function it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 6):
        teacher, student, center = logits((2, 3, True), batch, dtype=torch.float32)
        student.requires_grad_()
        loss = loss_of(teacher, student, center, exclude_matched=True)
        again = compiled(teacher, student, center, exclude_matched=True)
        torch.testing.assert_close(again, loss)
        want, grad = (torch.autograd.grad(x, student)[0] for x in (loss, again))
        torch.testing.assert_close(grad, want)


def test_opcheck(impl):
    ops, options = torch.ops.kdcmae_fast, (0.07, 0.1, True)
    operands = logits((2, 3, True), dtype=torch.float32)
    if impl == "torch":
        torch.library.opcheck(ops.dino_loss, (*operands, *options))
        return
    operands = operands[0].bfloat16(), *operands[1:]
    _, statistics = ops.dino_rows_cpp(*operands, *options)
    torch.library.opcheck(ops.dino_rows_cpp.default, (*operands, *options))
    backward = (torch.randn(3), *operands, statistics, *options)
    torch.library.opcheck(ops.dino_rows_grad_cpp.default, backward)


def test_centre_after_one_step_and_its_dtypes():
    teacher, _, center = logits((2, 1, False), 5, 9)
    want = 0.9 * center + 0.1 * teacher.mean(dim=(0, 1))
    torch.testing.assert_close(update_center(center, teacher), want)
    torch.testing.assert_close(update_center(center[None], teacher.flatten(0, 1)), want[None])
    # From 0, as it starts: a tenth of the batch mean.
    zero = torch.zeros(9, dtype=torch.float32)
    new = update_center(zero, teacher.bfloat16().requires_grad_())
    assert new.dtype == torch.float32 and not new.requires_grad and not zero.any()
    torch.testing.assert_close(
        new, 0.1 * teacher.bfloat16().float().mean(dim=(0, 1)), rtol=1e-6, atol=1e-7
    )
    assert torch.equal(update_center(center, teacher[:, :0]), center)
    assert torch.equal(update_center(center, teacher, momentum=1.0), center)


def centre_on_rank(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    teacher, center = torch.randn(7, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    part = teacher[:2] if rank == 0 else teacher[2:]
    new = update_center(center, part, momentum=0.8, group=dist.group.WORLD)
    torch.testing.assert_close(new, 0.8 * center + 0.2 * teacher.mean(dim=0))
    results.put(rank)
    dist.destroy_process_group()


def test_centre_over_processes_with_unequal_batches(impl, tmp_path: Path):
    if impl != "torch":
        pytest.skip("one implementation")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = str(tmp_path / "store"), results
    workers = [context.Process(target=centre_on_rank, args=(rank, *arguments)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    done = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert done == [0, 1]


X, C = torch.zeros(2, 4, 3), torch.zeros(3)


@pytest.mark.parametrize(
    "operands, options, message",
    [
        ((X[0, 0], X, C), {}, r"teacher must be \(crops, B, D\) or \(B, D\), got shape \(3,\)"),
        ((X, X[0, 0], C), {}, r"student must be \(S, B, D\) or \(B, D\), got shape \(3,\)"),
        ((X, X[:, :3], C), {}, r"student must be .* = \(2, 4, 3\), got \(2, 3, 3\)"),
        ((X, X, C[:2]), {}, r"center must be .* = \(3,\), got \(2,\)"),
        ((X, X, X), {}, r"center must be \(D,\) or \(1, D\), got shape \(2, 4, 3\)"),
        ((X.int(), X, C), {}, "teacher must be one of float64"),
        ((X, X.int(), C), {}, "student must be one of float64"),
        ((X, X, C.int()), {}, "center must be one of float64"),
        ((X, X.to("meta"), C), {}, "student is on meta, teacher on cpu"),
        ((X, X, C.to("meta")), {}, "center is on meta, teacher on cpu"),
        ((X[:0], X, C), {}, r"teacher has no crops or no logits: shape \(0, 4, 3\)"),
        ((X, X[:0], C), {}, r"student has no crops: shape \(0, 4, 3\)"),
        ((X[..., :0], X[..., :0], C[:0]), {}, "teacher has no crops or no logits"),
        ((X, X, C), {"teacher_temperature": 0}, "teacher_temperature must be positive .* got 0"),
        ((X, X, C), {"student_temperature": "a"}, "student_temperature must be a number, got 'a'"),
        ((X[0], X[0], C), {"exclude_matched": True}, "leaves no pair of 1 teacher and 1 student"),
        ((X, X, C), {"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
        ((X, X, C), {"impl": "cuda"}, "impl='cuda' of dino_loss is not available here"),
    ],
)
def test_errors_name_the_argument(operands, options, message):
    with pytest.raises(ValueError, match=message):
        dino_loss(*operands, **{"teacher_temperature": 0.07, **options})


@pytest.mark.parametrize(
    "operands, options, message",
    [
        ((C, X[0, 0]), {}, "teacher must be"),
        ((C[:2], X), {}, r"center must be .* = \(3,\), got \(2,\)"),
        ((C, X), {"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
        ((C, X), {"momentum": None}, "momentum must be a number, got None"),
        ((C, X), {"impl": "cpp"}, "update_center has no cpp implementation"),
    ],
)
def test_errors_of_the_centre(operands, options, message):
    with pytest.raises(ValueError, match=message):
        update_center(*operands, **options)


@pytest.mark.large
def test_past_int32(impl):
    """2.2e9 student logits, forward: offsets that wrap show in the last crop; 9 GB."""
    if impl == "torch":
        pytest.skip("its temporaries are as large again")
    width, crops = 2**16, 33000
    student = torch.zeros(crops, 1, width)
    assert student.numel() > 2**31
    student[-1] = torch.randn(width)
    teacher, center = torch.randn(1, 1, width), torch.zeros(width)
    forward, options = torch.ops.kdcmae_fast.dino_rows_cpp, (0.07, 0.1, False)
    _, statistics = forward(teacher, student, center, *options)
    _, alone = forward(teacher, student[-1:], center, *options)
    assert torch.equal(statistics[:, -1], alone[:, -1])
