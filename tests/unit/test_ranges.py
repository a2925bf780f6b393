"""Locks on byte ranges: who excludes whom, and that an exception at any opcode leaves no hold behind."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from lamina import ranges
from lamina.ranges import RangeLock

PATIENCE = 20


def nothing() -> str:
    return "done"


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def is_free(lock: RangeLock) -> bool:
    """Whether another thread gets the whole range for itself."""
    found: list[str] = []
    in_thread(lambda: found.append(lock.exclusive(0, 1 << 40, nothing))).join(PATIENCE)
    return found == ["done"]


class Holder:
    """A thread that holds a range until it is told to let go."""

    def __init__(self, lock: RangeLock, start: int, end: int, *, exclusive: bool) -> None:
        self.inside, self._go = threading.Event(), threading.Event()
        hold = lock.exclusive if exclusive else lock.shared
        self._thread = in_thread(lambda: hold(start, end, self._stay))

    def _stay(self) -> None:
        self.inside.set()
        assert self._go.wait(PATIENCE)

    def leave(self) -> None:
        self._go.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def enters(lock: RangeLock, start: int, end: int, *, exclusive: bool) -> bool:
    """Whether a thread gets in within a moment; it leaves at once."""
    holder = Holder(lock, start, end, exclusive=exclusive)
    found = holder.inside.wait(0.1)
    holder._go.set()
    return found


@pytest.mark.parametrize(("first", "second", "together"), [(0, 0, True), (0, 1, False), (1, 0, False), (1, 1, False)])
def test_who_excludes_whom(first: int, second: int, together: bool) -> None:
    lock = RangeLock()
    holder = Holder(lock, 0, 10, exclusive=bool(first))
    assert holder.inside.wait(PATIENCE)
    # (While shared holds are only counted, an exclusive one waits for them wherever they lie.)
    if first:
        assert enters(lock, 10, 20, exclusive=bool(second))
    assert enters(lock, 9, 20, exclusive=bool(second)) is together
    holder.leave()
    assert is_free(lock)


def test_a_shared_hold_that_came_later_does_not_overtake() -> None:
    lock = RangeLock()
    reader = Holder(lock, 0, 10, exclusive=False)
    assert reader.inside.wait(PATIENCE)
    writer = Holder(lock, 0, 10, exclusive=True)
    while not lock._exclusive:
        time.sleep(0.001)
    late = Holder(lock, 0, 10, exclusive=False)
    assert not late.inside.wait(0.05)
    assert not writer.inside.is_set()
    reader.leave()
    assert writer.inside.wait(PATIENCE)
    assert not late.inside.is_set()
    writer.leave()
    late.leave()


def test_an_error_of_the_work_gives_the_range_back() -> None:
    lock = RangeLock()
    for hold in (lock.shared, lock.exclusive):
        with pytest.raises(ZeroDivisionError):
            hold(0, 10, lambda: 1 // 0)
        assert is_free(lock)


class AtOpcode:
    """Raises KeyboardInterrupt before the opcode number `number` (from 0) that runs in `ranges.py` in this thread."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.raised = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != ranges.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.raised:
            if not self.left:
                self.raised = True
                raise KeyboardInterrupt
            self.left -= 1
        return self

    def run(self, work: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            assert self.raised
        finally:
            sys.settrace(before)


def letting_go(holder: Holder, waiting: Callable[[], bool]) -> threading.Thread:
    """A thread that ends the hold of `holder` as soon as `waiting` says so, or after a moment."""

    def wait() -> None:
        end = time.monotonic() + 0.003
        while not waiting() and time.monotonic() < end:
            time.sleep(0.0002)
        holder.leave()

    return in_thread(wait)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("other", ["nobody", "shared", "exclusive", "waits"])
def test_an_interrupt_at_every_opcode_leaves_no_hold(exclusive: bool, other: str) -> None:
    number = 0
    while True:
        lock = RangeLock()
        hold = lock.exclusive if exclusive else lock.shared
        tracer = AtOpcode(number)
        if other in ("shared", "exclusive"):
            holder = Holder(lock, 0, 10, exclusive=other == "exclusive")
            assert holder.inside.wait(PATIENCE)
            going = letting_go(holder, lambda lock=lock: len(lock._queue) > 1)  # type: ignore[misc]
            tracer.run(lambda hold=hold: hold(5, 15, nothing))  # type: ignore[misc]
            going.join(PATIENCE)
        elif other == "waits":  # somebody waits for the range while it is given back
            waiters: list[Holder] = []

            def work(lock: RangeLock = lock, waiters: list[Holder] = waiters) -> None:
                waiters.append(Holder(lock, 0, 10, exclusive=True))
                while not lock._exclusive or (exclusive and len(lock._queue) < 2):
                    time.sleep(0.0002)

            tracer.run(lambda hold=hold, work=work: hold(5, 15, work))  # type: ignore[misc]
            for waiter in waiters:
                assert waiter.inside.wait(PATIENCE)
                waiter.leave()
        else:
            tracer.run(lambda hold=hold: hold(5, 15, nothing))  # type: ignore[misc]
        assert is_free(lock), f"opcode {number}"
        assert not lock._queue
        assert not lock._exclusive
        assert not lock._counted
        if not tracer.raised:
            break
        number += 1
    assert number > 20
