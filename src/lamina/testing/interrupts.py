"""Exceptions at every point where a signal could strike: the harness for "an interrupt may come anywhere".

CPython handles signals when a function is entered and when a call of C code returns (and at the end of a loop's round, whose
body is full of both). `Interrupt` raises KeyboardInterrupt at the N-th such point inside the package, as Ctrl-C would; a test
counts N up from 0 until its operation runs to the end, and looks each time at what is left.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType
from typing import Any

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TESTING = os.path.dirname(__file__) + os.sep


class Interrupt:
    """Raises KeyboardInterrupt at point number `number`, from 0, of what `run` calls in this thread. Only code of the package
    counts, what is in `lamina.testing` excepted."""

    def __init__(self, number: int) -> None:
        self.left = number
        #: Where the exception was raised: file, line, function, event; None while it was not.
        self.struck: str | None = None

    def _look(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event not in ("call", "c_return") or self.struck is not None:
            return
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE) or code.co_filename.startswith(_TESTING):
            return
        if self.left:
            self.left -= 1
            return
        if _in_finalizer(frame):
            return
        self.struck = f"{code.co_filename[len(_PACKAGE) :]}:{frame.f_lineno} {code.co_qualname} ({event})"
        sys.setprofile(None)
        raise KeyboardInterrupt

    def run(self, work: Callable[[], object]) -> bool:
        """Call `work`; False if it ran to its end before the point was reached. An interrupt that does not come out of `work`
        is an AssertionError: it was swallowed."""
        collecting = gc.isenabled()
        gc.disable()  # it would run finalizers of other objects at points that differ from run to run
        sys.setprofile(self._look)
        try:
            work()
        except KeyboardInterrupt:
            assert self.struck is not None
            return True
        finally:
            sys.setprofile(None)
            if collecting:
                gc.enable()
        assert self.struck is None, f"the interrupt at {self.struck} was swallowed"
        return False


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether this runs because an object is given up: errors in there go nowhere, whoever raises them. (A generator that is
    given up runs once more.)"""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "<genexpr>"):
            return True
        frame = frame.f_back
    return False


def interrupts(start: int = 0, step: int = 1) -> Iterator[Interrupt]:
    """An Interrupt for each point, until one is not reached: `for interrupt in interrupts(): ... interrupt.run(work) ...`."""
    number = start
    while True:
        interrupt = Interrupt(number)
        yield interrupt
        if interrupt.struck is None:
            return
        number += step


#: Whether the code object of a function counts.
Counts = Callable[[CodeType], bool]


@contextmanager
def _installed(
    hook: Any, seen: list[int], get: Callable[[], Any], install: Callable[[Any], None]
) -> Iterator[list[int]]:
    """Install `hook` for this thread, yield the count that it keeps, and put the previous hook back."""
    before = get()
    install(hook)
    try:
        yield seen
    finally:
        install(before)


def interrupted_at_call(number: int, counts: Counts) -> AbstractContextManager[list[int]]:
    """A context manager that raises KeyboardInterrupt in this thread at point `number`, counted from 1. A point is a call of
    a function for which `counts` is true, or a return from C code in one. The context is a list with one item, the number of
    points so far; there is one interrupt at most."""
    seen = [0]

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and counts(frame.f_code) and not _in_finalizer(frame):
            seen[0] += 1
            if seen[0] == number:
                raise KeyboardInterrupt

    return _installed(profile, seen, sys.getprofile, sys.setprofile)


def interrupted_at_opcode(number: int, counts: Counts) -> AbstractContextManager[list[int]]:
    """As `interrupted_at_call`, where each opcode of these functions is a point. That is stricter than signals, which CPython
    handles only at calls and jumps. (CPython 3.11 has no handler around the first opcode of a `try` inside a `try`; code that
    is tested in this way avoids such a `try`.)"""
    seen = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not counts(frame.f_code) or (event == "call" and _in_finalizer(frame)):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            seen[0] += 1
            if seen[0] == number:
                raise KeyboardInterrupt
        return trace

    return _installed(trace, seen, sys.gettrace, sys.settrace)


def in_another_thread(work: Callable[[], object], patience: float = 20.0) -> None:
    """Call `work` there, and raise what it raises. AssertionError if it has not come to its end after `patience` seconds:
    that thread goes on waiting, and ends with the program."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name="test")
    thread.start()
    thread.join(patience)
    assert not thread.is_alive(), "it waits for ever"
    if errors:
        raise errors[0]
