"""Locks on byte ranges: who may touch which bytes of a node at the same time.

The request path (`request.py`) holds one of these per node. A shared hold excludes exclusive holds of any overlapping
range; an exclusive hold excludes all. Requests are served in the order of arrival among those that overlap, so nobody
starves, and a request holds one range of a node at a time, so nobody deadlocks.

While nobody holds or wants a range exclusively, a shared hold is only counted, without a range. A request that comes for an
exclusive hold waits until those have left.

An exception may arrive between any two steps (Ctrl-C is one), and a hold that stayed would make later requests wait for ever.
So the work is handed to the lock (`shared`, `exclusive`), every step of taking and giving back can be repeated without harm,
and a hold is given up by a store, which no exception divides: two signals that arrive together raise one exception directly
behind the other, and would find the second attempt of anything that is a call. What is left to do then, taking the hold out
of the line and waking others, any other thread does that looks. There is no mutex either, which an exception could leave
locked: each step is one operation of a list or a set, which no other thread can divide.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

#: How often it is looked whether the counted holds have left, in seconds.
_LOOK_AGAIN = 0.00005
#: How long a waiter sleeps at most, in seconds: exceptions may have kept another thread from waking it.
_ASLEEP = 0.1

_Result = TypeVar("_Result")


class _Hold:
    """A range that is held, or waited for."""

    __slots__ = ("end", "exclusive", "gone", "start", "wake")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.gone = False  # given up, though it may still be in the line
        self.wake = threading.Lock()  # whoever leaves the line releases it; to wait is to acquire it
        self.wake.acquire()


class RangeLock:
    """Shared and exclusive holds on half-open ranges `[start, end)`. Safe for any number of threads."""

    __slots__ = ("_count", "_counted", "_exclusive", "_line", "_uncount")

    def __init__(self) -> None:
        self._line: list[_Hold] = []  # holds and waiters, in the order of arrival
        self._exclusive: set[_Hold] = set()  # those of them that are exclusive
        self._counted: set[object] = set()  # shared holds that are only counted
        self._count = self._counted.add
        self._uncount = self._counted.discard

    def shared(self, start: int, end: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """What `work(*arguments)` returns, called while this thread holds the range with others."""
        token = object()
        try:
            try:
                self._count(token)
                if self._exclusive:  # asked after it is counted: an exclusive one that comes now waits for this one
                    self._uncount(token)
                    return self._in_line(_Hold(start, end, False), work, arguments)
                return work(*arguments)
            finally:
                self._uncount(token)
        finally:
            self._uncount(token)

    def exclusive(self, start: int, end: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """What `work(*arguments)` returns, called while this thread holds the range alone."""
        return self._in_line(_Hold(start, end, True), work, arguments)

    def _in_line(self, hold: _Hold, work: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
        try:
            try:
                self._take(hold)
                return work(*arguments)
            finally:
                hold.gone = True
                self._give_back(hold)
        finally:
            hold.gone = True
            self._give_back(hold)

    def _take(self, hold: _Hold) -> None:
        self._line.append(hold)
        if hold.exclusive:
            self._exclusive.add(hold)
        # A hold that is in the line is woken by each that leaves it afterwards, so no departure is missed.
        while self._blocked(hold):
            hold.wake.acquire(timeout=_ASLEEP)
        if hold.exclusive:
            while self._counted:
                time.sleep(_LOOK_AGAIN)

    def _give_back(self, hold: _Hold) -> None:
        self._exclusive.discard(hold)
        for other in tuple(self._line):
            if other.gone:
                self._forget(other)
                continue
            try:
                other.wake.release()
            except RuntimeError:  # it is awake already
                continue

    def _forget(self, hold: _Hold) -> None:
        """Take out what was given up: this thread's own, or what an exception kept another thread from taking out."""
        self._exclusive.discard(hold)
        try:
            self._line.remove(hold)
        except ValueError:  # somebody else did
            return

    def _blocked(self, hold: _Hold) -> bool:
        """Whether a hold that came earlier conflicts."""
        for other in tuple(self._line):
            if other is hold:
                return False
            if other.gone:
                continue
            if other.start < hold.end and hold.start < other.end and (other.exclusive or hold.exclusive):
                return True
        return False
