"""The filter `throttle`: rates and bursts hold in every stretch of time, on a clock that only sleepers move."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import NotSupported, OptionError
from lamina.filters.throttle import SLACK, Throttle
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

MIB = 1 << 20


class Clock:
    """Time passes for one thread, which sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Recording(MemoryStorage):
    """Remembers when each request arrived."""

    def __init__(self, clock: Clock, *, zeroes: bool = True) -> None:
        super().__init__(64 * MIB)
        self.clock, self.zeroes = clock, zeroes
        self.arrived: list[tuple[float, str, int]] = []

    def read_into(self, offset: int, view: memoryview) -> None:
        self.arrived.append((self.clock.now, "read", len(view)))

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.arrived.append((self.clock.now, "write", len(view)))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if not self.zeroes:
            raise NotSupported("not here")
        self.arrived.append((self.clock.now, "zero", length))

    def discard(self, offset: int, length: int) -> None:
        self.arrived.append((self.clock.now, "discard", length))


def over(**limits: Any) -> tuple[Clock, Recording, Image]:
    clock = Clock()
    storage = Recording(clock)
    return clock, storage, Image(Throttle(Child(storage, "image"), clock=clock, **limits))


def test_without_limits_nobody_waits() -> None:
    clock, _, image = over()
    for _ in range(1000):
        image.read(0, 4096)
    assert clock.now == 1000.0


@pytest.mark.parametrize("name", ["iops_total", "iops_read"])
def test_operations_a_second(name: str) -> None:
    clock, _, image = over(**{name: 50})
    for _ in range(501):
        image.read(0, 4096)
    assert clock.now - 1000.0 == pytest.approx(10 - SLACK, abs=0.03)


@pytest.mark.parametrize("name", ["bps_total", "bps_write"])
def test_bytes_a_second(name: str) -> None:
    clock, _, image = over(**{name: MIB})
    for _ in range(161):
        image.write(0, b"x" * 65536)
    assert clock.now - 1000.0 == pytest.approx(10 - SLACK, abs=0.07)


def test_each_direction_has_its_own() -> None:
    clock, _, image = over(iops_read=10, bps_write=MIB)
    for _ in range(100):
        image.write(0, b"x")
    assert clock.now == 1000.0
    for _ in range(11):
        image.read(0, MIB)
    assert clock.now - 1000.0 == pytest.approx(1 - SLACK, abs=0.11)
    clock.now = before = 5000.0
    image.write(0, b"x" * 4 * MIB)
    assert clock.now == before, "what is large passes at once"
    image.read(0, 1)
    assert clock.now == before
    image.write(0, b"x")
    assert clock.now - before == pytest.approx(4 - SLACK)


def test_a_burst_lasts_its_time_and_is_earned_again() -> None:
    clock, storage, image = over(iops_total=10, iops_total_max=100, iops_total_max_length=5)
    for _ in range(2):
        storage.arrived.clear()
        start = clock.now
        while clock.now < start + 20:
            image.read(0, 1)
        times = [at - start for at, _, _ in storage.arrived]
        during = sum(at < 5 for at in times)
        after = sum(6 <= at < 16 for at in times)
        assert during == pytest.approx(500, abs=15)
        assert after == pytest.approx(100, abs=2)
        clock.now += 45.5  # (100 - 10) * 5 / 10 seconds to leak


@given(
    st.integers(1, 1000),
    st.integers(0, 5000),
    st.integers(1, 10),
    st.lists(st.tuples(st.sampled_from(["read", "write"]), st.integers(1, 5000), st.floats(0, 3)), max_size=60),
)
def test_no_stretch_of_time_has_more_than_it_may(
    rate: int, more: int, seconds: int, requests: list[tuple[str, int, float]]
) -> None:
    """At most rate * T, the brim, and one request that was poured over it; so too for the rate of the burst."""
    most = rate + more if more else 0
    clock, storage, image = over(bps_total=rate, bps_total_max=most, bps_total_max_length=seconds)
    for name, length, idle in requests:
        clock.now += idle
        if name == "read":
            image.read(0, length)
        else:
            image.write(0, b"x" * length)
    assert [(name, length) for _, name, length in storage.arrived] == [request[:2] for request in requests]
    bounds = [(rate, max(more * seconds, rate * SLACK) if most else rate * SLACK)]
    if most:
        bounds.append((most, most * SLACK))
    for first in range(len(storage.arrived)):
        total = 0
        for at, _, length in storage.arrived[first:]:
            for speed, brim in bounds:
                # Before the last request passed, all that came since `first` was below the brim again.
                assert total <= speed * (at - storage.arrived[first][0]) + brim + speed * 1e-5
            total += length


@given(st.integers(1, 100), st.lists(st.integers(1, 5000), min_size=2, max_size=30))
def test_nobody_waits_longer_than_needed(rate: int, lengths: list[int]) -> None:
    clock, storage, image = over(bps_total=rate)
    for length in lengths:
        image.read(0, length)
    for (before, _, _), (at, _, _) in pairwise(storage.arrived):
        assert at >= before
    assert clock.now - 1000.0 <= sum(lengths[:-1]) / rate + 1e-3


def test_zeroes_and_discards() -> None:
    clock, storage, image = over(bps_write=MIB, iops_write=1000)
    image.zero(0, 32 * MIB)
    image.discard(0, 32 * MIB)
    image.write(0, b"x")
    assert clock.now == 1000.0, "they send no bytes"
    storage.zeroes = False
    with pytest.raises(NotSupported):
        image.zero(0, MIB, fast=True)
    assert clock.now == 1000.0
    image.zero(0, 2 * MIB)  # written by the edge below
    image.write(0, b"x")
    assert clock.now - 1000.0 == pytest.approx(2 - SLACK, abs=0.01)
    assert [name for _, name, _ in storage.arrived] == ["zero", "discard", "write", "write", "write", "write"]


def test_flushes_and_questions_pass_at_once() -> None:
    clock, _, image = over(iops_total=1)
    image.read(0, 1)
    for _ in range(10):
        image.flush()
        image.extents()
        image.truncate(64 * MIB)
    assert clock.now == 1000.0


def test_groups_share_and_are_forgotten() -> None:
    clock = Clock()
    storage = Recording(clock)

    def node(**options: Any) -> Throttle:
        return Throttle(Child(storage, "image"), group="guest", clock=clock, **options)

    first, second = node(iops_total=10), node()
    assert first.group is second.group is node(iops_total=10).group
    for _ in range(10):
        Image(first).read(0, 1)
        Image(second).write(0, b"x")
    assert clock.now - 1000.0 == pytest.approx(2 - SLACK, abs=0.11)
    for other in ({"iops_total": 11}, {"iops_total": 10, "bps_read": 1}, {"iops_read": 10}):
        with pytest.raises(OptionError):
            node(**other)
    del first, second
    assert node(iops_total=11).group.limits == {"iops-total": 11}


def test_who_waits_waits_in_the_order_of_arrival() -> None:
    """Reads come through in the order in which they were asked; a write does not wait behind them."""
    gate = threading.Semaphore(0)

    class Stepping(Clock):
        def sleep(self, seconds: float) -> None:
            assert gate.acquire(timeout=10)
            self.now += seconds

    clock = Stepping()
    storage = Recording(clock)
    node = Throttle(Child(storage, "image"), clock=clock, iops_read=1, iops_write=1)
    image = Image(node)
    image.read(0, 1000)
    threads = []
    for number in range(5):
        thread = threading.Thread(target=image.read, args=(0, number + 1))
        thread.start()
        threads.append(thread)
        while len(node.group._queue._queue) <= number:
            thread.join(0.001)
    writer = threading.Thread(target=image.write, args=(0, b"x" * 77), daemon=True)
    writer.start()
    writer.join(timeout=10)
    assert not writer.is_alive(), "a write waits behind reads"
    assert [length for _, _, length in storage.arrived] == [1000, 77]
    for _ in threads:
        gate.release()
    for thread in threads:
        thread.join()
    assert [length for _, _, length in storage.arrived] == [1000, 77, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "options",
    [
        {"iops-total-max": 10},
        {"bps-read": "1M", "bps-read-max": "512k"},
        {"iops-total": -1},
        {"iops-total": 1, "iops-total-max": 2, "iops-total-max-length": 0},
        {"iops": 5},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Opener(read_only=False).open({"driver": "throttle", "image": {"driver": "memory"}, **options})


def test_a_limit_that_is_unknown_is_refused() -> None:
    with pytest.raises(OptionError, match="bps-both"):
        over(bps_both=5)
