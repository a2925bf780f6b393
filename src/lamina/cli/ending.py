"""Shutdown of `lamina serve` by signals: an orderly end with a time limit, and an immediate end after a second signal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from . import signals

#: The maximum number of seconds from the first signal to the end of the process.
BOUND: Final = 60.0
_SIGNALS: Final = signals.ENDING


class Ending:
    """From `start` to the end of the context, the first SIGTERM, SIGINT or SIGHUP sets the event `stop`. A second signal, or
    the end of `bound` seconds, ends the process immediately, after a call of the functions in `at_once`, which remove files,
    must not block, and run in another thread. A SIGHUP that was ignored at the start of the process (nohup) stays ignored.

    The C signal handler of Python wakes a thread, so this works even while the main thread is blocked in a system call. For
    the main thread.
    """

    def __init__(self, bound: float | None = None) -> None:
        self.stop = threading.Event()
        self.at_once: list[Callable[[], object]] = []
        self._bound = BOUND if bound is None else bound
        self._before: dict[signal.Signals, Any] = {}
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._wakeup = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Install the handlers and start the thread."""
        # A pair of sockets: on Windows neither the signals nor `select` take pipes.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="serve-signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number.name != "SIGHUP" or before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, _ignore)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is None or self._reader is None or self._writer is None:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: a handler that C code installed
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        deadline: float | None = None
        assert self._reader is not None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self._reader], [], [], left)[0]:
                self._end(1, f"not ended within {self._bound:g} s: requests or images are blocked")
            received = self._reader.recv(1)
            if not received:
                return
            if received[0] not in self._before:
                continue
            if deadline is not None:
                self._end(128 + received[0], "ended immediately by a second signal")
            deadline = time.monotonic() + self._bound
            self.stop.set()

    def _end(self, status: int, why: str) -> None:
        for remove in self.at_once:
            with contextlib.suppress(Exception):
                remove()
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"lamina serve: {why}\n".encode())
        os._exit(status)


def _ignore(number: int, frame: object) -> None:
    """Does nothing: the thread reads the signal from the socket."""
