"""SIGTERM and SIGINT as a request that the training loop honours at a step's end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM and the first SIGINT only set `requested`; a second SIGINT interrupts.

    (Launchers pass SIGTERM on, so that it comes more than once.) Outside of the main thread, where
    Python cannot handle signals, it never is requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes started inside never see these signals.

    Launchers and Slurm send them to the whole process tree, and the loader's workers must deliver
    until the last step is done; they end with the process that reads from them.
    """
    # Up to Python 3.12, starting the tracker unblocks these signals: it must be running before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
