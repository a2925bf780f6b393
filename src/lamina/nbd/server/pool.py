"""Resources that the clients of a server share: the threads that execute requests to slow storage, and memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Final

#: The average seconds of a request above which storage counts as slow, and the pool executes its requests.
SLOW: Final = 0.001
#: The most threads of the pool of one export.
POOL: Final = 32

_Work = tuple[Callable[..., None], tuple[Any, ...]]


class Speed:
    """A moving average of the duration of requests: `mean`, in seconds. Thread-safe, except that a race may lose one
    request."""

    def __init__(self, mean: float) -> None:
        self.mean = mean

    @property
    def slow(self) -> bool:
        return self.mean > SLOW

    def took(self, seconds: float) -> None:
        """Add the duration of a request."""
        self.mean += (seconds - self.mean) / 8


class StoragePool(Speed):
    """The speed of reads and writes of one export, and the threads that execute its requests while it is slow; all clients of
    the export share it. Before the first request the storage counts as slow. Blocked storage delays no other export.

    The threads are daemons: a request that the storage never completes must not prevent the program from ending. (It waits
    for the threads of `concurrent.futures`.)
    """

    def __init__(self) -> None:
        super().__init__(2 * SLOW)
        self._mutex = threading.Lock()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads = 0
        self._closed = False

    def submit(self, execute: Callable[..., None], *arguments: object) -> None:
        """Call `execute(*arguments)` in one of the threads. RuntimeError, without a call, after `close`, or if no thread can
        be started."""
        with self._mutex:
            if self._closed:
                raise RuntimeError("the server has ended")
            if self._threads < POOL and not self._idle.acquire(blocking=False):
                first: list[_Work] = [(execute, arguments)]  # a thread keeps its arguments while it lives
                try:
                    threading.Thread(target=self._run, args=(first,), name="nbd-request", daemon=True).start()
                    self._threads += 1
                    return
                except RuntimeError:
                    if not self._threads:
                        raise
            self._work.put((execute, arguments))

    def close(self) -> None:
        """End the threads when they have executed all submitted requests. Does not wait."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                for _ in range(self._threads):
                    self._work.put(None)

    def _run(self, first: list[_Work]) -> None:
        item: _Work | None = first.pop()
        while item is not None:
            execute, arguments = item
            execute(*arguments)
            del item, execute, arguments  # an idle thread must not keep the buffers
            try:
                item = self._work.get_nowait()
            except queue.Empty:
                self._idle.release()
                item = self._work.get()


class Memory:
    """The memory limit of all clients of a server together, for requests and replies. `take` never waits: a client that gets
    no more memory continues with what it has, one request after the other, so clients never wait for each other's memory."""

    def __init__(self, limit: int) -> None:
        self._mutex = threading.Lock()
        #: The free bytes.
        self.left = limit

    def take(self, count: int) -> bool:
        """Allocate `count` bytes. False if so many are not free."""
        with self._mutex:
            if count > self.left:
                return False
            self.left -= count
            return True

    def give(self, count: int) -> None:
        """Free `count` bytes."""
        with self._mutex:
            self.left += count
