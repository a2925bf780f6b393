"""The filter `throttle`: limits operations and bytes a second. One of the filters; to share a disk, or to play a slower one.

A limit is a bucket that leaks at its rate: each request pours its cost in, and the next waits until what is left is below the
brim. A request therefore passes whole and at once, however large it is, and those after it pay. With a burst (`max` for
`max-length` seconds) the brim is higher, and a second bucket, with a low brim, leaks at `max`. In any stretch of T seconds
at most `rate * T + brim` and the cost of one more request pass; so it does not matter where the stretch begins.

Who waits, waits in the order of arrival, reads and writes apart. Rates are bytes or operations a second.
"""

from __future__ import annotations

import threading
import time
from typing import Any
from weakref import WeakValueDictionary

from ..errors import NotSupported, OptionError
from ..node import NO_FALLBACK, FilterNode
from ..pending import Pending
from ..ranges import RangeLock
from ..request import Child
from ..schema import Option

_LIMITS = {
    "bps-total": "bytes a second, read and written",
    "bps-read": "bytes a second, read",
    "bps-write": "bytes a second, written",
    "iops-total": "requests a second",
    "iops-read": "reads a second",
    "iops-write": "writes, zeroes and discards a second",
}
READ, WRITE = "read", "write"

#: Seconds of its rate that a bucket holds without a burst: enough to forgive a sleep that was too long.
SLACK = 0.1
#: No wait is shorter: smaller ones are noise of the arithmetic.
_INSTANT = 1e-6
#: Nor is one longer, in seconds, before it looks again: the system does not sleep for centuries at once.
_LONGEST = 86400.0


def _options() -> list[Option]:
    options = []
    for name, what in _LIMITS.items():
        kind = "size" if name.startswith("bps") else "int"
        options += [
            Option(name, kind, f"{what}; 0: no limit", default=0, minimum=0),
            Option(f"{name}-max", kind, f"the rate of a burst: {what}; 0: no bursts", default=0, minimum=0),
            Option(f"{name}-max-length", "int", "seconds that a burst may last", default=1, minimum=1),
        ]
    return options


class _Bucket:
    """`rate` units leak a second; it is full to the brim at `brim` units, and may be poured over it once. Not thread-safe."""

    __slots__ = ("_brim", "_empty", "_rate")

    def __init__(self, rate: float, brim: float) -> None:
        self._rate = rate
        self._brim = brim / rate
        self._empty = 0.0  # when all will have leaked

    def pause(self, now: float) -> float:
        """Seconds until the next request may pass; none if that is not above 0."""
        return self._empty - self._brim - now

    def pour(self, now: float, cost: int) -> None:
        self._empty = max(self._empty, now) + cost / self._rate


class ThrottleGroup:
    """The limits that one or more nodes share: `limits` by the names of the options. Safe for any number of
    threads. OptionError for limits that contradict each other. `clock`: has `monotonic()` and `sleep(seconds)`."""

    def __init__(self, limits: dict[str, int], clock: Any = time) -> None:
        self.limits = limits
        self.clock = clock
        self._mutex = threading.Lock()
        self._queue = RangeLock()  # reads wait in [0, 1), writes in [1, 2)
        self._bytes: dict[str, list[_Bucket]] = {READ: [], WRITE: []}
        self._requests: dict[str, list[_Bucket]] = {READ: [], WRITE: []}
        for name in _LIMITS:
            unit, _, kind = name.partition("-")
            buckets = self._buckets(name)
            for direction in (READ, WRITE):
                if kind in ("total", direction):
                    (self._bytes if unit == "bps" else self._requests)[direction].extend(buckets)

    def _buckets(self, name: str) -> list[_Bucket]:
        rate, most = self.limits.get(name, 0), self.limits.get(f"{name}-max", 0)
        if not most:
            return [_Bucket(rate, rate * SLACK)] if rate else []
        if not 0 < rate <= most:
            raise OptionError(f"{name}-max is {most}, and {name} is {rate}", hint="a burst is faster than the limit")
        # Poured in at `most` while it leaks at `rate`, it is full when the burst has lasted its time.
        seconds = self.limits.get(f"{name}-max-length", 1)
        return [_Bucket(rate, max((most - rate) * seconds, rate * SLACK)), _Bucket(most, most * SLACK)]

    def wait(self, direction: str, *, requests: int, length: int) -> None:
        """Return when a request that costs this may pass, in the order of arrival."""
        costs = [(bucket, requests) for bucket in self._requests[direction]] if requests else []
        if length:
            costs += [(bucket, length) for bucket in self._bytes[direction]]
        if not costs:
            return
        lane = (0, 1) if direction == READ else (1, 2)
        self._queue.exclusive(*lane, self._pay, costs)

    def _pay(self, costs: list[tuple[_Bucket, int]]) -> None:
        while True:
            with self._mutex:
                now = self.clock.monotonic()
                pause = max(bucket.pause(now) for bucket, _ in costs)
                if pause < _INSTANT:
                    for bucket, cost in costs:
                        bucket.pour(now, cost)
                    return
            self.clock.sleep(min(pause, _LONGEST))


_groups: WeakValueDictionary[str, ThrottleGroup] = WeakValueDictionary()
_groups_mutex = threading.Lock()


def _group(name: str, limits: dict[str, int], clock: Any) -> ThrottleGroup:
    """The group of that name: made by the first of its nodes, and forgotten with the last."""
    with _groups_mutex:
        found = _groups.get(name)
        if found is None:
            found = _groups[name] = ThrottleGroup(limits, clock)
        elif limits and limits != found.limits:
            raise OptionError(
                f"the throttle group {name} has other limits already", hint="give them once, or the same each time"
            )
        return found


class Throttle(FilterNode):
    """`image`, whose reads, writes, zeroes and discards wait until their `limits` let them pass (keywords as the options,
    with `_`). Nodes of this process with the same `group` share one set of limits; those that give none join the group.

    A discard costs one operation and no bytes. So does a zero that the child can do quickly; one that it has to write
    costs its bytes too. Flushes, changes of size and questions of status pass at once.
    """

    driver = "throttle"
    faithful = True
    options = (*_options(), Option("group", "str", "a name: all nodes of this process that have it share the limits"))

    def __init__(
        self,
        image: Child,
        *,
        group: str | None = None,
        clock: Any = time,
        name: str | None = None,
        read_only: bool = False,
        **limits: int,
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        given = _given(limits)
        self.group = ThrottleGroup(given, clock) if group is None else _group(group, given, clock)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.group.wait(READ, requests=1, length=len(view))
        self.image.read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.group.wait(WRITE, requests=1, length=len(view))
        self.image.write(offset, view, flags)

    # A request that is started waits for its turn before it goes out: what is on its way is never slowed down.

    def start_read(self, offset: int, view: memoryview) -> Pending:
        self.group.wait(READ, requests=1, length=len(view))
        return self.image.start_read(offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        self.group.wait(WRITE, requests=1, length=len(view))
        return self.image.start_write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.group.wait(WRITE, requests=1, length=0)
        try:
            self.image.zero(offset, length, flags | NO_FALLBACK)  # refused before a byte is touched, or done
        except NotSupported:
            if flags & NO_FALLBACK:
                raise
            self.group.wait(WRITE, requests=0, length=length)
            self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.group.wait(WRITE, requests=1, length=0)
        self.image.discard(offset, length)


def _given(limits: dict[str, int]) -> dict[str, int]:
    """The limits that were set, by the names of the options; the length of a burst counts only with one."""
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    unknown = named.keys() - {f"{name}{end}" for name in _LIMITS for end in ("", "-max", "-max-length")}
    if unknown:
        raise OptionError(f"throttle has no limit {', '.join(sorted(unknown))}", hint=f"it has {', '.join(_LIMITS)}")
    return {
        name: value
        for name, value in named.items()
        if value and (not name.endswith("-length") or named.get(name.removesuffix("-length"), 0))
    }
