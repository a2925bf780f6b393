"""Measure requests to an image: their rate, and how long each takes. Used by the command `bench`.

A number of requests of one size is made, with a bounded number in flight. Storage that pipelines has them in flight itself;
for other storage a thread makes each. With a depth of 1 the caller's thread makes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from ..descriptors import opening
from ..errors import LimitExceeded, OptionError
from ..image import Image
from ..job_results import BenchResult
from ..limits import MAX_SIZE, MIB
from ..node import FUA
from .progress import Monitor
from .requests import Requests

if TYPE_CHECKING:
    from ..pending import Pending

#: The most requests in flight, since each may have a thread.
MOST = 1024
_LARGEST = (1 << 31) - 1
#: The most bytes of the buffers of all requests in flight.
_MAX_BUFFERS = 1024 * MIB
#: The percentiles that a result contains.
_PERCENTILES = (50, 90, 95, 99, 99.9)
#: Bits of a duration that its class in `Latencies` keeps: percentiles are at most 1.6 % too large.
_BITS = 6


@dataclass(frozen=True)
class Load:
    """What is measured: `count` requests of `size` bytes, at most `depth` of them in flight. The first is at `offset`, each
    other one `step` bytes behind the one before it (None: `size`); one past the end of the disk starts again at its
    beginning. They are reads, or with `write` writes of the byte `pattern`; with `stable` each write is on stable storage
    when it ends. A flush follows every `flush_interval` requests (0: never), and with `drain` waits for those before it."""

    count: int
    depth: int = 64
    size: int = 4096
    offset: int = 0
    step: int | None = None
    write: bool = False
    pattern: int = 0
    stable: bool = False
    flush_interval: int = 0
    drain: bool = True

    def __post_init__(self) -> None:
        """Raises OptionError for a load that makes no sense, LimitExceeded for more than 1 GiB of buffers."""
        if not 1 <= self.depth <= MOST:
            raise OptionError(f"{self.depth} requests cannot be in flight at once", hint=f"choose 1 to {MOST}")
        if max(self.count, self.size, self.flush_interval) > _LARGEST or self.offset > MAX_SIZE:
            raise OptionError(f"a count, size or interval is above {_LARGEST}, or the offset above {MAX_SIZE}")
        if min(self.count, self.size - 1, self.offset, self.step or 0) < 0 or not 0 <= self.pattern <= 255:
            raise OptionError("a count, size, offset, step or pattern is out of range")
        if self.flush_interval and not self.write:
            raise OptionError("a flush interval is for writes", hint="omit it, or measure writes")
        if 0 < self.flush_interval < self.depth:
            raise OptionError(
                f"with a flush every {self.flush_interval} requests, {self.depth} are never in flight",
                hint="choose a longer interval, or a smaller depth",
            )
        if self.size * (1 if self.write else self.in_flight) > _MAX_BUFFERS:
            raise LimitExceeded(
                f"{self.in_flight} requests of {self.size} bytes need more than {_MAX_BUFFERS} bytes of memory",
                hint="choose a smaller depth or size",
            )

    @property
    def in_flight(self) -> int:
        """The most requests in flight: the depth, or all."""
        return min(self.depth, max(self.count, 1))


class Latencies:
    """Durations in nanoseconds, counted in classes, so that their memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = self.total = self.highest = 0
        self.lowest: int | None = None
        self._classes: dict[tuple[int, int], int] = {}

    def add(self, duration: int) -> None:
        self.count += 1
        self.total += duration
        self.highest = max(self.highest, duration)
        self.lowest = duration if self.lowest is None else min(self.lowest, duration)
        shift = max(duration.bit_length() - _BITS - 1, 0)
        key = (shift, duration >> shift)
        self._classes[key] = self._classes.get(key, 0) + 1

    def percentile(self, percent: float) -> int:
        """A duration that `percent` of all do not exceed: the end of its class, or the longest of all. 0 if there is none."""
        wanted = self.count * percent / 100
        seen = 0
        for shift, part in sorted(self._classes):
            seen += self._classes[shift, part]
            if seen >= wanted:
                return min((part + 1 << shift) - 1, self.highest)
        return self.highest


class Measured(NamedTuple):
    """The outcome: the time of the whole run in nanoseconds, flushes included, and those of its requests."""

    nanoseconds: int
    latencies: Latencies
    flushes: int

    def result(self, image: str, load: Load) -> BenchResult:
        """The same for users: of the requests of `load` to the file `image`."""
        found = self.latencies
        return BenchResult(
            image,
            "write" if load.write else "read",
            load.count,
            load.depth,
            load.size,
            load.offset,
            load.step or load.size,
            self.flushes,
            self.nanoseconds,
            found.lowest or 0,
            found.total // max(found.count, 1),
            found.highest,
            {percent: found.percentile(percent) for percent in _PERCENTILES},
        )


def bench(image: Image, load: Load, monitor: Monitor | None = None) -> Measured:
    """Make the requests of `load` to `image`, which other users may use meanwhile. The content of a disk that is written is
    lost. Raises the first error of a request (OutOfRange for one across the end of the disk), and Cancelled; no request is in
    flight then."""
    watch = monitor or Monitor()
    with opening(image.share) as own:
        run = _Run(own, load)
        try:
            try:
                return run.run(watch)
            finally:
                run.close()
        finally:
            run.close()  # an interrupt that struck the first time finds the second


class _Request:
    """A request under way."""

    __slots__ = ("begun", "buffer", "ended", "pending")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.ended = 0
        self.begun = perf_counter_ns()
        self.pending: Pending | None = None

    def call(self, work: Callable[..., None], *arguments: Any) -> None:
        """Make it at once, in whatever thread."""
        work(*arguments)
        self.ended = perf_counter_ns()


class _Run(Requests):
    def __init__(self, image: Image, load: Load) -> None:
        super().__init__(image, load.in_flight, "lamina-bench", eager=True)
        self._load = load
        self._image = image
        self._under_way: deque[_Request] = deque()
        self._free: list[memoryview] = []
        self._pattern = memoryview(bytes([load.pattern]) * load.size) if load.write else None
        self._latencies = Latencies()

    def run(self, watch: Monitor) -> Measured:
        load, size = self._load, self._image.size
        step = load.step or load.size
        offset, flushes = load.offset, 0
        begun = perf_counter_ns()
        for number in range(load.count):
            if load.flush_interval and number and number % load.flush_interval == 0:
                while load.drain and self._under_way:
                    self._finish()
                self._image.flush()
                flushes += 1
            if len(self._under_way) >= self.count:
                self._finish()
                watch.update(self._latencies.count, load.count)
            self._begin(offset)
            offset += step
            if offset >= size > 0:
                offset %= size
        while self._under_way:
            self._finish()
        took = perf_counter_ns() - begun
        watch.update(load.count, load.count)
        return Measured(took, self._latencies, flushes)

    def close(self) -> None:
        for request in self._under_way:
            if request.pending is not None:
                request.pending.leave()
        super().close()

    def _begin(self, offset: int) -> None:
        edge = self._edge
        flags = FUA if self._load.stable else 0
        buffer = self._pattern or (self._free.pop() if self._free else memoryview(bytearray(self._load.size)))
        request = _Request(buffer)
        self._under_way.append(request)
        if self._load.write:
            request.pending = self._start(edge.start_write, partial(request.call, edge.write), offset, buffer, flags)
        else:
            request.pending = self._start(edge.start_read, partial(request.call, edge.read_into), offset, buffer)

    def _finish(self) -> None:
        """Wait for the request that was started first."""
        request = self._under_way[0]
        assert request.pending is not None
        request.pending.wait()
        self._under_way.popleft()
        self._latencies.add((request.ended or perf_counter_ns()) - request.begun)
        if not self._load.write:
            self._free.append(request.buffer)
