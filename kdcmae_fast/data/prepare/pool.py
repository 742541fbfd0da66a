"""Processes that may crash or hang: the input they were at is left out, the rest goes on."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import Any, NamedTuple

from kdcmae_fast.messages import one_line

Tell = Callable[[int | None, int], None]  # (number of the input begun or None, skipped so far)
# (what to do, input -> why it must be left out, progress) -> result; a function of a module
Work = Callable[[Any, dict[int, str], Tell], Any]

RETRIES = 2  # of a job whose process ended while it was at none of its inputs


class Job(NamedTuple):
    """Something for one process: `number` tells it apart, `payload` is handed to the function."""

    number: int
    payload: Any


@dataclass
class _Worker:
    """A process and what it is at."""

    process: Any
    pipe: Any
    job: Job | None = None
    item: int | None = None  # the input begun, None while none is being decoded
    since: float = 0.0  # when it was begun
    killed: str = ""  # why, when it was us


@dataclass
class Pool:
    """Runs jobs in `workers` processes; `run` yields results as they come.

    timeout: seconds for one input, 0 for any time. on_progress: called with (job, input, skipped).
    """

    work: Work
    workers: int
    timeout: float = 0.0
    on_progress: Callable[[Job, int, int], None] = lambda job, item, skipped: None
    _lost: dict[int, dict[int, str]] = field(default_factory=dict)  # job -> input -> why
    _deaths: Counter[int] = field(default_factory=Counter)  # job -> times not due to an input

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Results in the order they are ready. RuntimeError when a process fails by itself."""
        waiting = deque(jobs)
        team: list[_Worker] = []
        try:
            while waiting or any(worker.job for worker in team):
                idle = [worker for worker in team if worker.job is None]
                while waiting and (idle or len(team) < self.workers):
                    if not idle:
                        team.append(self._start())
                        idle.append(team[-1])
                    self._give(idle.pop(), waiting.popleft())
                for pipe in connection.wait([worker.pipe for worker in team], timeout=0.5):
                    worker = next(worker for worker in team if worker.pipe is pipe)
                    try:
                        kind, value = worker.pipe.recv()
                    except (EOFError, ConnectionError):
                        waiting.appendleft(self._bury(worker))
                        team.remove(worker)
                        continue
                    if kind == "at":
                        self._at(worker, *value)
                    elif kind == "error":
                        raise RuntimeError(value)
                    else:
                        if worker.job is not None:
                            yield worker.job, value
                        worker.job = worker.item = None
                self._end_late(team)
        finally:
            for worker in team:
                worker.process.kill()
            for worker in team:
                worker.process.join()
                worker.pipe.close()

    def _start(self) -> _Worker:
        # Neither a plain fork, which copies locks that threads hold, nor a new interpreter for
        # each: they start from a process that has imported everything and has no threads.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, self._module()])
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.work))
        process.start()
        theirs.close()
        return _Worker(process, mine)

    def _module(self) -> str:
        return getattr(self.work, "func", self.work).__module__

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.job = job
        # A process that has died meanwhile is found when its pipe is read.
        with contextlib.suppress(ConnectionError):
            worker.pipe.send((job.payload, self._lost.get(job.number, {})))

    def _at(self, worker: _Worker, item: int | None, skipped: int) -> None:
        worker.item, worker.since = item, time.monotonic()
        if worker.job is not None and item is not None:
            self.on_progress(worker.job, item, skipped)

    def _end_late(self, team: list[_Worker]) -> None:
        now = time.monotonic()
        for worker in team:
            late = self.timeout and worker.item is not None and now - worker.since > self.timeout
            if late and not worker.killed:
                worker.killed = f"decoder did not finish within {self.timeout:g} s"
                worker.process.kill()

    def _bury(self, worker: _Worker) -> Job:
        """The job of a process that died, to be done again without the input it died of."""
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        ended = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        if worker.job is None:
            raise RuntimeError(f"an idle worker process ended ({ended})")
        if worker.item is None:
            self._deaths[worker.job.number] += 1
            if self._deaths[worker.job.number] > RETRIES:
                raise RuntimeError(f"worker processes keep ending ({ended}): out of memory?")
            return worker.job
        why = worker.killed or f"decoder crashed ({ended})"
        self._lost.setdefault(worker.job.number, {})[worker.item] = why
        return worker.job


def _serve(pipe: Any, work: Work) -> None:
    """A worker process: does jobs until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)

    def tell(item: int | None, skipped: int) -> None:
        pipe.send(("at", (item, skipped)))

    while True:
        try:
            payload, lost = pipe.recv()
        except EOFError:
            return
        try:
            result = work(payload, lost, tell)
        except Exception as error:
            pipe.send(("error", one_line(error)))
            return
        pipe.send(("done", result))


def _end_with_parent() -> None:
    """A parent that was killed cannot say so, and its heir must not meet us at work."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
