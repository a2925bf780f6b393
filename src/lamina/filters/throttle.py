"""The filter `throttle`: limits operations and bytes per second, to share a disk or to simulate a slower one.

A limit is a leaky bucket: each request adds its cost to the level of the bucket, which decreases at the rate of the limit,
and the next request waits until the level is below the capacity. A large request therefore passes without being split, and
later requests wait for it. A burst (`max` for `max-length` seconds) increases the capacity, and a second bucket with a small
capacity limits the rate of the burst to `max`. In every interval of T seconds, requests of a total cost of at most `rate * T
+ capacity`, plus the cost of one request, pass.

Requests wait in the order of arrival, reads and writes separately. Rates are bytes or operations per second.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from .. import clock as system_clock
from ..errors import NotSupported, OptionError
from ..node import NO_FALLBACK, FilterNode
from ..pending import Pending
from ..ranges import RangeLock
from ..request import Child
from ..schema import Option

_LIMITS = {
    "bps-total": "bytes per second, read and written",
    "bps-read": "bytes read per second",
    "bps-write": "bytes written per second",
    "iops-total": "requests per second",
    "iops-read": "reads per second",
    "iops-write": "writes, zero requests and discards per second",
}
READ, WRITE = "read", "write"

#: The capacity of a bucket without a burst, in seconds of its rate: enough to compensate a sleep that was too long.
SLACK = 0.1
#: The shortest wait in seconds: shorter ones are rounding errors.
_INSTANT = 1e-6
#: The longest sleep in seconds: a longer one could overflow in the system call.
_LONGEST = 86400.0


def _options() -> list[Option]:
    options = []
    for name, what in _LIMITS.items():
        kind = "size" if name.startswith("bps") else "int"
        options += [
            Option(name, kind, f"{what}; 0: no limit", default=0, minimum=0),
            Option(f"{name}-max", kind, f"the rate of a burst: {what}; 0: no bursts", default=0, minimum=0),
            Option(f"{name}-max-length", "int", "the maximum length of a burst in seconds", default=1, minimum=1),
        ]
    return options


class _Bucket:
    """A leaky bucket: the level decreases by `rate` units per second. A request may pass while the level is below `capacity`,
    which its cost may exceed. Not thread-safe."""

    __slots__ = ("_capacity", "_empty", "_rate")

    def __init__(self, rate: float, capacity: float) -> None:
        self._rate = rate
        self._capacity = capacity / rate
        self._empty = 0.0  # the time at which the level will be 0

    def pause(self, now: float) -> float:
        """Seconds until the next request may pass; 0 or less if it may pass now."""
        return self._empty - self._capacity - now

    def add(self, now: float, cost: int) -> None:
        self._empty = max(self._empty, now) + cost / self._rate


class ThrottleGroup:
    """The limits that one or more nodes share: `limits` by the names of the options. Thread-safe. Raises OptionError for
    contradictory limits. `clock` has `monotonic()` and `sleep(seconds)`."""

    def __init__(self, limits: dict[str, int], clock: Any = system_clock) -> None:
        self.limits = limits
        self.clock = clock
        self._mutex = threading.Lock()
        self._queue = RangeLock()  # used as two queues: reads lock the range [0, 1), writes [1, 2)
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
            raise OptionError(f"{name}-max is {most}, and {name} is {rate}", hint="the rate of a burst must be higher")
        # With requests at the rate `most` the level grows by `most - rate` per second and is full at the end of the burst.
        seconds = self.limits.get(f"{name}-max-length", 1)
        return [_Bucket(rate, max((most - rate) * seconds, rate * SLACK)), _Bucket(most, most * SLACK)]

    def wait(self, direction: str, *, requests: int, length: int) -> None:
        """Wait until a request of this cost may pass. Requests pass in the order of arrival."""
        costs = [(bucket, requests) for bucket in self._requests[direction]] if requests else []
        if length:
            costs += [(bucket, length) for bucket in self._bytes[direction]]
        if not costs:
            return
        queue = (0, 1) if direction == READ else (1, 2)
        self._queue.exclusive(*queue, self._wait_for_buckets, costs)

    def _wait_for_buckets(self, costs: list[tuple[_Bucket, int]]) -> None:
        while True:
            with self._mutex:
                now = self.clock.monotonic()
                pause = max(bucket.pause(now) for bucket, _ in costs)
                if pause < _INSTANT:
                    for bucket, cost in costs:
                        bucket.add(now, cost)
                    return
            self.clock.sleep(min(pause, _LONGEST))


_groups: WeakValueDictionary[str, ThrottleGroup] = WeakValueDictionary()
_groups_mutex = threading.Lock()


def _group(name: str, limits: dict[str, int], clock: Any) -> ThrottleGroup:
    """The group of that name, which exists from the creation of its first node to the deletion of its last."""
    with _groups_mutex:
        found = _groups.get(name)
        if found is None:
            found = _groups[name] = ThrottleGroup(limits, clock)
        elif limits and limits != found.limits:
            raise OptionError(
                f"the throttle group {name} exists with other limits", hint="give the limits once, or equal ones"
            )
        return found


class Throttle(FilterNode):
    """Delays the reads, writes, zero requests and discards of `image` to keep `limits` (keywords are the names of the options
    with `_`). Nodes of this process with the same `group` share their limits; a node without limits joins the group.

    A discard costs one operation and no bytes, and so does a zero request that the child supports. A zero request for which
    zeros are written also costs its bytes. Flushes, truncates and queries of extents are not delayed.
    """

    driver = "throttle"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = (
        *_options(),
        Option("group", "str", "a name; nodes of this process with the same name share the limits"),
    )

    def __init__(
        self,
        image: Child,
        *,
        group: str | None = None,
        clock: Any = system_clock,
        name: str | None = None,
        read_only: bool = False,
        **limits: int,
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        given = _given(limits)
        self.group: ThrottleGroup = ThrottleGroup(given, clock) if group is None else _group(group, given, clock)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.group.wait(READ, requests=1, length=len(view))
        self.image.read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.group.wait(WRITE, requests=1, length=len(view))
        self.image.write(offset, view, flags)

    # A started request waits for its share before it is sent: requests in flight are not slowed down.

    def start_read(self, offset: int, view: memoryview) -> Pending:
        self.group.wait(READ, requests=1, length=len(view))
        return self.image.start_read(offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        self.group.wait(WRITE, requests=1, length=len(view))
        return self.image.start_write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.group.wait(WRITE, requests=1, length=0)
        try:
            self.image.zero(offset, length, flags | NO_FALLBACK)  # succeeds, or is refused without a change
        except NotSupported:
            if flags & NO_FALLBACK:
                raise
            self.group.wait(WRITE, requests=0, length=length)
            self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.group.wait(WRITE, requests=1, length=0)
        self.image.discard(offset, length)


def _given(limits: dict[str, int]) -> dict[str, int]:
    """The limits that are set, by the names of the options. The length of a burst is ignored without a burst."""
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    unknown = named.keys() - {f"{name}{end}" for name in _LIMITS for end in ("", "-max", "-max-length")}
    if unknown:
        hint = f"the limits are {', '.join(_LIMITS)}"
        raise OptionError(f"throttle has no limit {', '.join(sorted(unknown))}", hint=hint)
    return {
        name: value
        for name, value in named.items()
        if value and (not name.endswith("-length") or named.get(name.removesuffix("-length"), 0))
    }
