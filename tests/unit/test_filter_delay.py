"""The filter `delay`: each kind of operation waits its own time, first, on a clock that only this test moves."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lamina.errors import OptionError
from lamina.filters.delay import KINDS, Delay
from lamina.graph import Opener
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Clock:
    """Stands still but for those who sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def over(storage: MemoryStorage, clock: Clock, **milliseconds: int) -> Image:
    return Image(Delay(Child(storage, "image"), clock=clock, **milliseconds))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_chosen_kind_waits(kind: str) -> None:
    clock = Clock()
    image = over(MemoryStorage(1 << 20), clock, **{f"{kind}_ms": 1500})
    operations: dict[str, Any] = {
        "read": lambda: image.read(0, 10),
        "write": lambda: image.write(0, b"x" * 10),
        "zero": lambda: image.zero(0, 4096),
        "discard": lambda: image.discard(0, 4096),
        "flush": lambda: image.flush(),
        "extents": lambda: image.extents(),
    }
    assert set(operations) == set(KINDS)
    for name, operation in operations.items():
        before = clock.now
        operation()
        assert clock.now - before == (1.5 if name == kind else 0), name
    image.truncate(1 << 21)
    assert clock.now == 1.5


def test_the_wait_comes_before_the_bytes() -> None:
    storage = MemoryStorage(4096)
    seen = []

    class Looking(Clock):
        def sleep(self, seconds: float) -> None:
            found = bytearray(3)
            storage.read_into(0, memoryview(found))
            seen.append(bytes(found))

    image = over(storage, Looking(), write_ms=1, read_ms=1)
    image.write(0, b"new")
    assert image.read(0, 3) == b"new"
    assert seen == [bytes(3), b"new"]


def test_threads_wait_side_by_side() -> None:
    everyone = threading.Barrier(3, timeout=10)  # breaks, and fails the test, unless all three sleep at once

    class Meeting(Clock):
        def sleep(self, seconds: float) -> None:
            everyone.wait()

    image = over(MemoryStorage(4096), Meeting(), read_ms=1)
    failures = []

    def read() -> None:
        try:
            image.read(0, 1)
        except threading.BrokenBarrierError as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_keyword_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError):
        over(MemoryStorage(4096), Clock(), reads_ms=5)


def test_options_are_milliseconds() -> None:
    opener = Opener(read_only=False)
    node = opener.open({"driver": "delay", "image": {"driver": "memory"}, "read-ms": "20", "flush-ms": 3})
    assert isinstance(node, Delay)
    assert {kind: wait for kind, wait in node.seconds.items() if wait} == {"read": 0.02, "flush": 0.003}
    node.close()
    with pytest.raises(OptionError):
        opener.open({"driver": "delay", "image": {"driver": "memory"}, "read-ms": -1})
