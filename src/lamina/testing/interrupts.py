"""Exceptions at every point where a signal could strike: the harness for "an interrupt may come anywhere".

CPython handles signals when a function is entered and when a call of C code returns (and at the end of each iteration of a
loop, whose body contains many such points). `Interrupt` raises KeyboardInterrupt at the N-th point inside the package, like
Ctrl-C. A test increments N from 0 until its operation completes, and each time checks the state that is left.
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
    """Raises KeyboardInterrupt at point number `number`, from 0, in the function that `run` calls in this thread. Only code
    of the package counts, except `lamina.testing`."""

    def __init__(self, number: int) -> None:
        self.left: int = number
        #: The location of the exception: file, line, function, event; None before it was raised.
        self.struck: str | None = None
        #: The exception that arrived at `run`. Its traceback keeps the frames that it passed, and what they refer to: as long
        #: as a test keeps it, their finalizers do not run.
        self.error: KeyboardInterrupt | None = None

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
        """Call `work`. Returns False if it completed before the point. Raises AssertionError if it completed although the
        interrupt was raised: the interrupt was swallowed."""
        collecting = gc.isenabled()
        gc.disable()  # the finalizers of other objects would run at different points in each run
        sys.setprofile(self._look)
        try:
            work()
        except KeyboardInterrupt as error:
            assert self.struck is not None
            self.error = error
            return True
        finally:
            sys.setprofile(None)
            if collecting:
                gc.enable()
        assert self.struck is None, f"the interrupt at {self.struck} was swallowed"
        return False


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether this code runs because an object is deleted: errors there are lost, whatever raises them. (A generator that is
    deleted runs once more.)"""
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


#: Decides whether a function, given by its code object, counts. (Those of this module never do.)
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
        code = frame.f_code
        if event in ("call", "c_return") and code.co_filename != __file__ and counts(code) and not _in_finalizer(frame):
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
        if (
            frame.f_code.co_filename == __file__
            or not counts(frame.f_code)
            or (event == "call" and _in_finalizer(frame))
        ):
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
    """Call `work` in another thread, and raise its error. Raises AssertionError if it has not completed after `patience`
    seconds; that thread continues to wait, and ends with the program."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by the calling thread
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name="test")
    thread.start()
    thread.join(patience)
    assert not thread.is_alive(), "the call does not end"
    if errors:
        raise errors[0]
