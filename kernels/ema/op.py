"""The public EMA update: argument checks, dispatch, registration. Nothing here has a gradient."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import register_op, resolve
from . import reference

TEACHERS = (torch.float32, torch.float64)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHADOWS = (torch.bfloat16, torch.float16)

register_op("ema_update_", impls=("cpp", "triton", "torch"))


@torch.no_grad()
def ema_update_(
    teacher_params: Iterable[Tensor],
    student_params: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    shadow_params: Iterable[Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, in place, for every pair of tensors.

    teacher_params: float32 or float64 tensors, each once, on one device. bfloat16 and float16 are
        refused: at momentum 0.9995 a bfloat16 value would move only if the student's were several
        times larger. Give a 16-bit copy as `shadow_params` instead.
    student_params: as many, of the same shapes and device; float64, float32, bfloat16 or float16.
        A student that is its teacher leaves it as it is.
    momentum: in [0, 1]; 0 copies the student, 1 changes nothing. Or a 0-d tensor, on the teachers'
        device (its value is not looked at; no host synchronisation) or the CPU. As float64, if it
        is close to 1: 1 - momentum is what counts.
    shadow_params: bfloat16 or float16 tensors that receive the new teacher, rounded.
    impl: "auto", "torch", "cpp" or "triton" (no float64).

    Any strides; empty lists and empty tensors are fine. Tensors that require a gradient are updated
    without one. Every call adds one to the written tensors' versions. Deterministic. Errors are
    ValueErrors that name the argument and the index, raised before anything is written; a teacher
    whose elements share memory (expanded) is a RuntimeError.
    """
    teacher, student = list(teacher_params), list(student_params)
    shadow = [] if shadow_params is None else list(shadow_params)
    _check_lists(teacher, student, None if shadow_params is None else shadow)
    _check_momentum(momentum, teacher)
    if not teacher:
        return
    impl = _resolve(teacher, impl)
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu" != teacher[0].device.type:
        momentum = momentum.item()
    if impl == "torch":
        weight = 1 - (momentum.double() if isinstance(momentum, Tensor) else momentum)
        reference.update_(teacher, student, weight, shadow)
        return
    on_device = momentum if isinstance(momentum, Tensor) else None
    value = 0.0 if isinstance(momentum, Tensor) else float(momentum)
    _UPDATE[impl](teacher, student, shadow, value, on_device)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*teacher, *shadow])


def _resolve(teacher: list[Tensor], impl: str) -> str:
    found = resolve("ema_update_", impl, teacher[0].device.type)
    if found != "triton" or all(t.dtype == torch.float32 for t in teacher):
        return found
    if impl == "triton":
        raise ValueError("impl='triton' of ema_update_ takes no float64; use 'auto' or 'torch'")
    return "torch"


def _check_lists(teacher: list[Tensor], student: list[Tensor], shadow: list[Tensor] | None) -> None:
    if not torch.compiler.is_compiling() and _plainly_right(teacher, student, shadow):
        return
    _check_tensors("teacher_params", teacher, TEACHERS, teacher)
    _check_tensors("student_params", student, FLOATS, teacher)
    if shadow is not None:
        _check_tensors("shadow_params", shadow, SHADOWS, teacher)
    if not torch.compiler.is_compiling() and len({id(t) for t in teacher}) != len(teacher):
        raise ValueError(
            "teacher_params holds a tensor twice; update shared parameters once, "
            "or call again for them"
        )


def _plainly_right(
    teacher: list[Tensor], student: list[Tensor], shadow: list[Tensor] | None
) -> bool:
    """Whether nothing is wrong, at a third of the cost of finding out what is.

    Models have hundreds of small parameters, which take no longer to update than to check.
    """
    try:
        shapes = [t.shape for t in teacher]
        copies = shadow or []
        return (
            len(set(map(id, teacher))) == len(teacher)
            and shapes == [s.shape for s in student]
            and (shadow is None or shapes == [c.shape for c in copies])
            and {t.dtype for t in teacher}.issubset(TEACHERS)
            and {s.dtype for s in student}.issubset(FLOATS)
            and {c.dtype for c in copies}.issubset(SHADOWS)
            and len({t.device for t in [*teacher, *student, *copies]}) <= 1
        )
    except AttributeError:
        return False


def _check_tensors(
    name: str, tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...], teacher: list[Tensor]
) -> None:
    if len(tensors) != len(teacher):
        raise ValueError(f"{name} has {len(tensors)} tensors, teacher_params {len(teacher)}")
    for index, (tensor, like) in enumerate(zip(tensors, teacher, strict=True)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}[{index}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name}[{index}] must be {allowed}, got {tensor.dtype}")
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(tensor.shape)}, its teacher {tuple(like.shape)}"
            )
        if tensor.device != teacher[0].device:
            raise ValueError(
                f"{name}[{index}] is on {tensor.device}, teacher_params[0] on {teacher[0].device}"
            )


def _check_momentum(momentum: float | Tensor, teacher: list[Tensor]) -> None:
    if not isinstance(momentum, Tensor):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        return
    if momentum.dim() != 0 or momentum.dtype not in FLOATS:
        raise ValueError(
            "momentum must be a float or a 0-d floating-point tensor, got "
            f"{momentum.dtype} of shape {tuple(momentum.shape)}"
        )
    if teacher and momentum.device.type != "cpu" and momentum.device != teacher[0].device:
        raise ValueError(
            f"momentum is on {momentum.device}, teacher_params[0] on {teacher[0].device}"
        )


def _update_triton(*args: Any) -> None:
    from .kernel import update_

    update_(*args)


def _register() -> dict[str, Any]:
    """Define one op per fused implementation (csrc/cpu/ema.cpp fills in `_cpp`)."""
    schema = (
        "(Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] shadow, float momentum,"
        " Tensor? momentum_tensor) -> ()"
    )
    for suffix in ("cpp", "triton"):
        torch.library.define(f"kdcmae_fast::ema_update_{suffix}", schema)
        torch.library.register_fake(f"kdcmae_fast::ema_update_{suffix}", lambda *args: None)
    torch.library.impl("kdcmae_fast::ema_update_triton", ("cuda", "cpu"), _update_triton)
    namespace = torch.ops.kdcmae_fast
    return {impl: getattr(namespace, f"ema_update_{impl}").default for impl in ("cpp", "triton")}


_UPDATE = _register()
