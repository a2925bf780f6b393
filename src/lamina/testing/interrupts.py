"""Exceptions at every point where a signal could strike: the harness for "an interrupt may come anywhere".

CPython handles signals when a function is entered and when a call of C code returns (and at the end of a loop's round, whose
body is full of both). `Interrupt` raises KeyboardInterrupt at the N-th such point inside the package, as Ctrl-C would; a test
counts N up from 0 until its operation runs to the end, and looks each time at what is left.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
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
