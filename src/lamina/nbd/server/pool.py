"""What the clients of a server share while they wait for storage: threads that execute requests, and memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Final

#: Seconds that a request may take on average before the others do not wait for it any more.
SLOW: Final = 0.001
#: Threads that execute requests of one export's slow storage.
POOL: Final = 32

_Work = tuple[Callable[..., None], tuple[Any, ...]]


class Speed:
    """How long requests took of late: `mean`, in seconds. Any thread may call this; where two race, one request more or less
    counts."""

    def __init__(self, mean: float) -> None:
        self.mean = mean

    @property
    def slow(self) -> bool:
        return self.mean > SLOW

    def took(self, seconds: float) -> None:
        """A request took so long."""
        self.mean += (seconds - self.mean) / 8


class StoragePool(Speed):
    """How fast the storage of an export reads and writes, and the threads that execute its requests while it is slow. For all
    its clients; storage that stands still holds up nobody else's. What nobody has asked yet counts as slow.

    The threads end with the program, whatever they do then: one that storage never answers must not keep a server from
    ending. (Those of `concurrent.futures` are waited for.)
    """

    def __init__(self) -> None:
        super().__init__(2 * SLOW)
        self._mutex = threading.Lock()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads = 0
        self._closed = False

    def submit(self, execute: Callable[..., None], *arguments: object) -> None:
        """Call it in one of the threads. RuntimeError after `close`, or when no thread can be started; then it is not
        called."""
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
        """Let the threads end when they have done what was submitted. Waits for nothing."""
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
            del item, execute, arguments  # a thread that waits keeps nobody's buffers
            try:
                item = self._work.get_nowait()
            except queue.Empty:
                self._idle.release()
                item = self._work.get()


class Memory:
    """The bytes that all clients of a server may have together, for what is received and for replies. `take` never waits: a
    client that gets no more goes on with what it has, one request after the other, so that nobody waits for memory that
    somebody else holds."""

    def __init__(self, limit: int) -> None:
        self._mutex = threading.Lock()
        #: Bytes that nobody has.
        self.left = limit

    def take(self, count: int) -> bool:
        """Whether there were `count` bytes left; they are the caller's now."""
        with self._mutex:
            if count > self.left:
                return False
            self.left -= count
            return True

    def give(self, count: int) -> None:
        """Give `count` bytes back."""
        with self._mutex:
            self.left += count
