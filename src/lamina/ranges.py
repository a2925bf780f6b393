"""Locks on byte ranges: who may touch which bytes of a node at the same time.

The request path (`request.py`) holds one of these per node. A shared hold excludes exclusive holds of any overlapping
range; an exclusive hold excludes all. Requests are served in the order of arrival among those that overlap, so nobody
starves, and a request holds one range of a node at a time, so nobody deadlocks.

While nobody holds or wants a range exclusively, a shared hold is only counted, without a lock or a range: two counters that
rise say how many there are. Whoever comes for an exclusive hold waits until those have left.
"""

from __future__ import annotations

import itertools
import threading
import time

#: How often it is looked whether the counted holds have left, in seconds.
_LOOK_AGAIN = 0.00005


class Hold:
    """A range that is held, or waited for; give it back with `RangeLock.release`."""

    __slots__ = ("end", "exclusive", "start")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive


#: Stands for every shared hold that is only counted.
COUNTED = Hold(0, 0, False)


class RangeLock:
    """Shared and exclusive holds on half-open ranges `[start, end)`. Safe for any number of threads."""

    __slots__ = ("_enter", "_exclusive", "_freed", "_leave", "_line", "_mutex")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._freed = threading.Condition(self._mutex)
        self._line: list[Hold] = []  # holds and waiters, in the order of arrival
        self._exclusive = 0  # how many of them are exclusive
        # Taking a number is one step of the interpreter, so the counters need no lock.
        self._enter = itertools.count().__next__
        self._leave = itertools.count().__next__

    def acquire(self, start: int, end: int, exclusive: bool) -> Hold:
        """Wait until no earlier hold or waiter conflicts, then hold the range."""
        if not exclusive:
            self._enter()
            if not self._exclusive:  # asked after it is counted: an exclusive one that comes now waits for this one
                return COUNTED
            self._leave()
        hold = Hold(start, end, exclusive)
        with self._mutex:
            if exclusive:
                self._exclusive += 1
            line = self._line
            line.append(hold)
            try:
                while self._blocked(hold):
                    self._freed.wait()
                if exclusive:
                    # Who left is asked first, or one that came, saw and left in between would stand for one that is here.
                    while self._leave() != self._enter():
                        time.sleep(_LOOK_AGAIN)
            except BaseException:  # a signal while waiting: leave the line, or all behind wait for ever
                self._remove(hold)
                raise
        return hold

    def release(self, hold: Hold) -> None:
        if hold is COUNTED:
            self._leave()
            return
        with self._mutex:
            self._remove(hold)

    def _remove(self, hold: Hold) -> None:
        self._line.remove(hold)
        if hold.exclusive:
            self._exclusive -= 1
        if self._line:
            self._freed.notify_all()

    def _blocked(self, hold: Hold) -> bool:
        for other in self._line:
            if other is hold:
                return False
            if other.start < hold.end and hold.start < other.end and (other.exclusive or hold.exclusive):
                return True
        return False
