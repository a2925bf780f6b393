"""How a server of the command line ends when it is told to: in good order, within a bound, and at once when told twice."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

#: Seconds from the first signal to the end, whatever storage and clients do meanwhile.
BOUND: Final = 60.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ending:
    """From `start` until the context ends, the first SIGTERM, SIGINT or SIGHUP sets `stop`. The process ends at once at the
    second one, or `bound` seconds after the first; then `at_once` is called first, whose functions remove names, wait for
    nothing and may come from another thread. A SIGHUP that the process was started to ignore (nohup) stays ignored.

    The system's own handler tells a thread, so that this works while the main thread stands still in a call of the system.
    For the main thread.
    """

    def __init__(self, bound: float | None = None) -> None:
        self.stop = threading.Event()
        self.at_once: list[Callable[[], object]] = []
        self._bound = BOUND if bound is None else bound
        self._before: dict[signal.Signals, Any] = {}
        self._reader = self._writer = -1
        self._wakeup = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Listen for the signals."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._watch, name="serve-signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number != signal.SIGHUP or before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, _told)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is None:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: another language's handler
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # the thread sees the end of the pipe
        self._thread.join()
        os.close(self._reader)

    def _watch(self) -> None:
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self._reader], [], [], left)[0]:
                self._end(1, f"it did not end within {self._bound:g} s: requests or images are stuck")
            told = os.read(self._reader, 1)
            if not told:
                return
            if told[0] not in self._before:
                continue
            if deadline is not None:
                self._end(128 + told[0], "told twice: it ends at once")
            deadline = time.monotonic() + self._bound
            self.stop.set()

    def _end(self, status: int, why: str) -> None:
        for remove in self.at_once:
            with contextlib.suppress(Exception):
                remove()
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"lamina serve: {why}\n".encode())
        os._exit(status)


def _told(number: int, frame: object) -> None:
    """Does nothing: the thread has heard."""
