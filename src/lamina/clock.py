"""The clock of filters and commands: functions of the module `time`, with a `sleep` that a signal ends at any moment."""

from __future__ import annotations

import time as _time
from time import monotonic, perf_counter, perf_counter_ns, time

__all__ = ["monotonic", "perf_counter", "perf_counter_ns", "sleep", "time"]

#: Python runs the handler of a signal between two instructions, or when the signal interrupts a system call. A signal that
#: comes just before the system call does neither, and waits for its end: so none lasts longer than this, in seconds.
_LONGEST = 0.1


def sleep(seconds: float) -> None:
    """Wait for `seconds`. An exception that the handler of a signal raises ends the wait, at most 0.1 seconds late."""
    end = monotonic() + seconds
    while seconds > 0:
        _time.sleep(min(seconds, _LONGEST))
        seconds = end - monotonic()
