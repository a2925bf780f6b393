"""Locks on byte ranges: who may touch which bytes of a node at the same time.

The request path (`request.py`) holds one of these per node. A shared hold excludes exclusive holds of any overlapping
range; an exclusive hold excludes all. Requests are served in the order of arrival among those that overlap, so nobody
starves, and a request holds one range of a node at a time, so nobody deadlocks.
"""

from __future__ import annotations

import threading


class Hold:
    """A range that is held, or waited for; give it back with `RangeLock.release`."""

    __slots__ = ("end", "exclusive", "start")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive


class RangeLock:
    """Shared and exclusive holds on half-open ranges `[start, end)`. Safe for any number of threads."""

    __slots__ = ("_freed", "_line", "_mutex")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._freed = threading.Condition(self._mutex)
        self._line: list[Hold] = []  # holds and waiters, in the order of arrival

    def acquire(self, start: int, end: int, exclusive: bool) -> Hold:
        """Wait until no earlier hold or waiter conflicts, then hold the range."""
        hold = Hold(start, end, exclusive)
        with self._mutex:
            line = self._line
            if line and self._blocked(hold):
                line.append(hold)
                try:
                    while self._blocked(hold):
                        self._freed.wait()
                except BaseException:  # a signal while waiting: leave the line, or all behind wait for ever
                    line.remove(hold)
                    self._freed.notify_all()
                    raise
            else:
                line.append(hold)
        return hold

    def release(self, hold: Hold) -> None:
        with self._mutex:
            line = self._line
            line.remove(hold)
            if line:
                self._freed.notify_all()

    def _blocked(self, hold: Hold) -> bool:
        for other in self._line:
            if other is hold:
                return False
            if other.start < hold.end and hold.start < other.end and (other.exclusive or hold.exclusive):
                return True
        return False
