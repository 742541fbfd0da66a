"""Moving averages of lists of tensors in Triton: one launch for all tensors of the same dtypes.

The kernel finds its tensors through a table of addresses in device memory, a row per chunk.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384  # elements of a program
BLOCK = 4096


@triton.jit
def _update_block(
    teacher, student, shadow, at, weight, count,
    SHADOW: tl.constexpr, HAS_SHADOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Elements `at` of one chunk; WHOLE: all of them exist."""
    if WHOLE:
        t, s = tl.load(teacher + at), tl.load(student + at).to(tl.float32)
    else:
        t = tl.load(teacher + at, mask=at < count, other=0)
        s = tl.load(student + at, mask=at < count, other=0).to(tl.float32)
    # Exact at weight 0 and at weight 1.
    t = tl.where(weight < 0.5, t + weight * (s - t), s - (s - t) * (1.0 - weight))
    if WHOLE:
        tl.store(teacher + at, t)
        if HAS_SHADOW:
            tl.store(shadow + at, t.to(SHADOW))
    else:
        tl.store(teacher + at, t, mask=at < count)
        if HAS_SHADOW:
            tl.store(shadow + at, t.to(SHADOW), mask=at < count)


@triton.jit
def ema_update_kernel(
    table_ptr, momentum_ptr, weight,
    STUDENT: tl.constexpr, SHADOW: tl.constexpr, HAS_SHADOW: tl.constexpr,
    HAS_TENSOR: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """teacher += weight * (student - teacher) of one chunk. Grid: rows of the table.

    table_ptr: (chunks, 4) int64: addresses of the teacher, the student, the shadow; elements.
    HAS_TENSOR: the weight is 1 - *momentum_ptr.
    """
    row = table_ptr + tl.program_id(0).to(tl.int64) * 4
    teacher = tl.load(row).to(tl.pointer_type(tl.float32))
    student = tl.load(row + 1).to(tl.pointer_type(STUDENT))
    shadow = tl.load(row + 2).to(tl.pointer_type(SHADOW))
    if ALIGNED:
        teacher, student = tl.multiple_of(teacher, 16), tl.multiple_of(student, 16)
        shadow = tl.multiple_of(shadow, 16)
    if HAS_TENSOR:
        weight = (1.0 - tl.load(momentum_ptr).to(tl.float64)).to(tl.float32)
    count = tl.load(row + 3)
    # Masks that end anywhere would leave the accesses 4 bytes wide: only the last chunk has them.
    if count == CHUNK:
        for start in range(0, CHUNK, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _update_block(teacher, student, shadow, at, weight, count, SHADOW, HAS_SHADOW, True)
    else:
        for start in range(0, CHUNK, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _update_block(teacher, student, shadow, at, weight, count, SHADOW, HAS_SHADOW, False)


_TYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}  # fmt: skip


class Entry(NamedTuple):
    """A teacher, its student and its shadow, as far as the kernel is concerned."""

    addresses: tuple[int, int, int]
    numel: int
    student: torch.dtype
    shadow: torch.dtype | None

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype | None, bool]:
        """Entries of one kind share a launch."""
        return self.student, self.shadow, all(address % 16 == 0 for address in self.addresses)


class _Launch(NamedTuple):
    student: torch.dtype
    shadow: torch.dtype | None
    aligned: bool
    table: Tensor  # (chunks, 4) int64 on the device


def update_(
    teacher: list[Tensor],
    student: list[Tensor],
    shadow: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    """In place; float32 teachers."""
    entries = []
    for index, (t, s) in enumerate(zip(teacher, student, strict=True)):
        copy = shadow[index] if shadow else None
        if not (_same_layout(t, s) and (copy is None or _same_layout(t, copy))):
            _update_strided_(t, s, copy, momentum, momentum_tensor)
        elif t.numel() > 0:
            addresses = t.data_ptr(), s.data_ptr(), 0 if copy is None else copy.data_ptr()
            kind = None if copy is None else copy.dtype
            entries.append(Entry(addresses, t.numel(), s.dtype, kind))
    if entries:
        with torch.cuda.device_of(teacher[0]):
            launch(tuple(entries), teacher[0].device, momentum, momentum_tensor)


def launch(
    entries: tuple[Entry, ...],
    device: torch.device,
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    """One kernel per kind of entry."""
    for task in _launches(entries, device):
        ema_update_kernel[(task.table.shape[0],)](
            task.table, momentum_tensor, 1 - momentum,
            STUDENT=_TYPES[task.student], SHADOW=_TYPES[task.shadow or task.student],
            HAS_SHADOW=task.shadow is not None, HAS_TENSOR=momentum_tensor is not None,
            ALIGNED=task.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


# Keyed by the addresses themselves: a table stays valid however tensors come and go.
@functools.lru_cache(maxsize=8)
def _launches(entries: tuple[Entry, ...], device: torch.device) -> list[_Launch]:
    """Tables of all chunks, by dtypes and alignment."""
    groups: dict[tuple[torch.dtype, torch.dtype | None, bool], list[Tensor]] = {}
    for entry in entries:
        groups.setdefault(entry.kind, []).append(_rows(entry))
    return [_Launch(*kind, torch.cat(rows).to(device)) for kind, rows in groups.items()]


def _rows(entry: Entry) -> Tensor:
    """(chunks, 4) of one tensor."""
    first = torch.arange(0, entry.numel, CHUNK, dtype=torch.int64)
    bytes_of = (4, entry.student.itemsize, entry.shadow.itemsize if entry.shadow else 0)
    columns = [a + first * size for a, size in zip(entry.addresses, bytes_of, strict=True)]
    return torch.stack([*columns, (entry.numel - first).clamp_max(CHUNK)], dim=1)


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether element k of the memory of both is the same element of the tensor, for every k."""
    if x.is_contiguous() and y.is_contiguous():
        return True
    return x.stride() == y.stride() and torch.ops.aten.is_non_overlapping_and_dense(x)


def _update_strided_(
    teacher: Tensor,
    student: Tensor,
    shadow: Tensor | None,
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    if momentum_tensor is None:
        teacher.lerp_(student.to(teacher.dtype), 1 - momentum)
    else:
        weight = (1 - momentum_tensor.double()).to(teacher.dtype)
        teacher.lerp_(student.to(teacher.dtype), weight)
    if shadow is not None:
        shadow.copy_(teacher)
