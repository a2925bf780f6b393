"""The rate limit of a job, by the buckets of the filter `throttle`. Used by `convert` and `copy`."""

from __future__ import annotations

from .. import clock
from ..errors import OptionError
from ..filters.throttle import READ, WRITE, ThrottleGroup
from .progress import Monitor

#: A job looks so often, in seconds, whether it was told to stop.
_LOOK = 0.1


class RateLimit:
    """At most `rate` bytes per second are read, and as many are written: each request waits until its bytes may pass. A wait
    ends with Cancelled when `monitor` is cancelled. Thread-safe. Raises OptionError if `rate` is not above 0."""

    def __init__(self, rate: int, monitor: Monitor) -> None:
        if rate <= 0:
            raise OptionError(f"the rate limit is {rate} bytes per second", hint="give a number above 0")
        self.rate = rate
        self._group = ThrottleGroup({"bps-read": rate, "bps-write": rate}, _Clock(monitor))

    def before_read(self, length: int) -> None:
        """Wait until `length` bytes may be read."""
        self._group.wait(READ, requests=0, length=length)

    def before_write(self, length: int) -> None:
        """Wait until `length` bytes may be written."""
        self._group.wait(WRITE, requests=0, length=length)


class _Clock:
    """The clock of a job, whose sleep ends when the job is told to stop."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def monotonic(self) -> float:
        return clock.monotonic()

    def sleep(self, seconds: float) -> None:
        end = clock.monotonic() + seconds
        while seconds > 0:
            self._monitor.check()
            clock.sleep(min(seconds, _LOOK))
            seconds = end - clock.monotonic()
