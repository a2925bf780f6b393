"""Range locks, which order overlapping requests to one node.

The request path (`request.py`) has one `RangeLock` per node. A shared lock excludes exclusive locks of overlapping ranges; an
exclusive lock excludes all locks of overlapping ranges. Overlapping requests get their locks in the order of arrival, so no
request starves; a request locks one range of a node at a time, so requests do not deadlock.

While no thread holds or requests an exclusive lock, shared locks are only counted, without their ranges. A request for an
exclusive lock waits until the counter is 0. Started requests (`pending.py`) are counted too; a request for an exclusive lock
finishes them.

An exception such as KeyboardInterrupt may be raised between any two steps, and a lock that stayed behind would block later
requests for ever. Therefore the caller passes its work to the lock (`shared`, `exclusive`), every step of acquiring and
releasing may be repeated, and a lock is released by an assignment, which no exception interrupts. (A call would not be safe
even in a second attempt: two signals that arrive together raise one exception directly after the other.) The remaining steps,
removing the entry from the queue and waking waiters, are done by any thread that finds a released entry. There is no mutex,
which an exception could leave locked: each step is one atomic operation of a list or a set.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .pending import Holding

#: The interval, in seconds, at which an exclusive request checks the counter of shared locks.
_POLL_INTERVAL = 0.00005
#: The longest sleep of a waiter, in seconds: an exception may have kept another thread from waking it.
_MAX_SLEEP = 0.1

_Result = TypeVar("_Result")


class _Entry:
    """A range that a thread has locked or waits for."""

    __slots__ = ("end", "exclusive", "released", "start", "wake")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.released = False  # may still be in the queue
        self.wake = threading.Lock()  # the thread waits by acquiring it; a thread that leaves the queue releases it
        self.wake.acquire()


class RangeLock:
    """Shared and exclusive locks on half-open ranges `[start, end)`. Thread-safe."""

    __slots__ = ("_count", "_counted", "_exclusive", "_queue", "_started", "_uncount", "finish")

    def __init__(self) -> None:
        self._queue: list[_Entry] = []  # holders and waiters, in the order of arrival
        self._exclusive: set[_Entry] = set()  # the exclusive entries of the queue
        self._counted: set[object] = set()  # one token for each shared lock that is only counted
        self._count = self._counted.add
        self._uncount = self._counted.discard
        self._started: set[Holding] = set()  # started requests that are not finished
        #: Release the lock of a started request. (One call of C code, which no exception interrupts.)
        self.finish: Callable[[Holding], None] = self._started.discard

    def shared(self, start: int, end: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call `work(*arguments)` under a shared lock of the range, and return its result."""
        token = object()
        try:
            try:
                self._count(token)
                if (
                    self._exclusive
                ):  # checked after counting: an exclusive request that arrives now waits for this token
                    self._uncount(token)
                    return self._queued(_Entry(start, end, False), work, arguments)
                return work(*arguments)
            finally:
                self._uncount(token)
        finally:
            self._uncount(token)

    def exclusive(self, start: int, end: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call `work(*arguments)` under an exclusive lock of the range, and return its result."""
        return self._queued(_Entry(start, end, True), work, arguments)

    def start(self, request: Holding) -> bool:
        """Count `request`, which is about to be started, as a shared lock until `finish(request)` is called. False where some
        thread holds or requests an exclusive lock: `request` is not counted, and the caller does its work at once, with
        `shared`."""
        self._started.add(request)
        if self._exclusive:  # checked after counting, as in `shared`
            self.finish(request)
            return False
        return True

    def _queued(self, entry: _Entry, work: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
        try:
            try:
                self._acquire(entry)
                return work(*arguments)
            finally:
                entry.released = True
                self._release(entry)
        finally:
            entry.released = True
            self._release(entry)

    def _acquire(self, entry: _Entry) -> None:
        self._queue.append(entry)
        if entry.exclusive:
            self._exclusive.add(entry)
        # Every thread that releases an entry wakes all entries of the queue, so this one misses no release.
        while self._blocked(entry):
            entry.wake.acquire(timeout=_MAX_SLEEP)
        if entry.exclusive:
            for request in tuple(self._started):
                while not request.settle() and request in self._started:
                    time.sleep(_POLL_INTERVAL)
            while self._counted:
                time.sleep(_POLL_INTERVAL)

    def _release(self, entry: _Entry) -> None:
        self._exclusive.discard(entry)
        for other in tuple(self._queue):
            if other.released:
                self._remove(other)
                continue
            try:
                other.wake.release()
            except RuntimeError:  # already awake
                continue

    def _remove(self, entry: _Entry) -> None:
        """Remove a released entry: of this thread, or of a thread that an exception kept from removing it."""
        self._exclusive.discard(entry)
        try:
            self._queue.remove(entry)
        except ValueError:  # another thread removed it
            return

    def _blocked(self, entry: _Entry) -> bool:
        """Whether an earlier entry of the queue conflicts with `entry`."""
        for other in tuple(self._queue):
            if other is entry:
                return False
            if other.released:
                continue
            if other.start < entry.end and entry.start < other.end and (other.exclusive or entry.exclusive):
                return True
        return False
