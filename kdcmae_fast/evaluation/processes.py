"""Evaluations on several processes: who takes which clips, and everybody's rows on the first.

Only tensors in the CPU's memory travel (gloo), so any launcher will do that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT: torchrun, `deepspeed --no_local_rank`, Slurm with those set.
"""

import functools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from kdcmae_fast.data import BadClip, BadClips
from kdcmae_fast.messages import ToldElsewhere

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)  # processes wait for each other while one of them does long work


class Processes(NamedTuple):
    """This process among all: rank 0 ... size - 1, and the group they talk in (None: alone)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def batches(self, num_clips: int, batch_size: int) -> list[range]:
        """This process's batches of clip numbers, a stretch of all batches of the list.

        A batch is the same clips whatever the number of processes, so that every feature is too.
        """
        starts = range(0, num_clips, batch_size)
        first, last = (len(starts) * rank // self.size for rank in (self.rank, self.rank + 1))
        return [range(s, min(s + batch_size, num_clips)) for s in starts[first:last]]

    def gather_lists(self, items: Sequence[Any]) -> list[Any]:
        """The items of all processes in rank order, on every process."""
        if self.group is None:
            return list(items)
        parts: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(items), group=self.group)
        return [item for part in parts for item in part]

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """The rows of all processes in rank order, on the first one; None on the others.

        rows: (n, ...) on the CPU, n may differ, 0 included. The first process holds the result and
        its own part at once, nothing more.
        """
        if self.group is None:
            return rows
        about = (len(rows), tuple(rows.shape[1:]), rows.dtype)
        described = self.gather_lists([about if len(rows) else None])
        _, shape, dtype = next((found for found in described if found), about)
        if not self.is_main:
            if len(rows):
                dist.send(rows.contiguous(), group=self.group, group_dst=0)
            return None
        counts = [found[0] if found else 0 for found in described]
        everything = torch.empty((sum(counts), *shape), dtype=dtype)
        for rank, part in enumerate(everything.split(counts)):
            if not len(part):
                continue
            if rank == 0:
                part.copy_(rows)
            else:
                dist.recv(part, group=self.group, group_src=rank)
        return everything

    def share(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the first process, on every process; the others wait for it.

        An error of it is raised on the first one, and `ToldElsewhere` on the others.
        """
        if self.group is None:
            return work()
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except Exception as found:
                error = found
        value, failed = self.share((value, error is not None))
        if error is not None:
            raise error
        if failed:
            raise ToldElsewhere
        result: Result = value
        return result


ALONE = Processes()


class SharedBadClips:
    """The bad clips of an evaluation, and the verdict on them that one process would come to.

    dataset_clips: size of the dataset. wanted: clips to evaluate. max_share: as of `BadClips`.
    """

    def __init__(
        self, dataset_clips: int, wanted: int, max_share: float, processes: Processes = ALONE
    ) -> None:
        self.wanted, self.processes = wanted, processes
        self._limits = dataset_clips, max_share
        self._own = BadClips(*self._limits)
        self._batches: list[tuple[int, list[BadClip]]] = []

    def add(self, batch: range, clips: list[BadClip]) -> None:
        """The bad ones of a batch, which is read; TooManyBadClips when it is useless to go on.

        Of several processes nobody knows how far the others are, so that each goes on while all
        other clips may be good.
        """
        self._batches.append((batch.stop, clips))
        self._own.add(clips)
        alone = self.processes.size == 1
        self._own.check((batch.stop if alone else self.wanted) - len(self._own))

    def gathered(self) -> list[BadClip]:
        """Those of all processes in the order of the clips, on every process.

        Raises TooManyBadClips where one process would have stopped, however few are bad later on.
        """
        found = BadClips(*self._limits)
        for stop, clips in self.processes.gather_lists(self._batches):
            found.add(clips)
            found.check(stop - len(found))
        return found.rows()


def launched_processes() -> Processes:
    """The processes that a launcher started, or `ALONE`.

    Joins them at the first call, for as long as this process lives; in a process group that is
    there already (a training run) its processes are taken.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    return _joined()


@functools.cache
def _joined() -> Processes:
    # Once: processes that leave a meeting point and come back to it miss each other.
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return Processes(dist.get_rank(), dist.get_world_size(), group)
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"no meeting point of the processes at {where} ({error}); another run may have it: "
            "give the launcher another --master_port"
        ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
