"""The filter `retry`: which errors are tried again, how often, after which waits; and that a flush never is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from lamina.errors import BlockIOError, CorruptImage, LaminaError, Locked, NotSupported
from lamina.extents import Extents
from lamina.filters.retry import Retry
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import FUA
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


class Clock:
    """Remembers who slept how long."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Flaky(MemoryStorage):
    """The next `failures` operations raise what `fails` makes; a write that fails has done half of its work."""

    def __init__(self, failures: int, fails: Callable[[], LaminaError] = lambda: BlockIOError("gone", errno=5)) -> None:
        super().__init__(1 << 20)
        self.failures, self.fails = failures, fails
        self.asked: list[str] = []

    def _ask(self, name: str) -> None:
        self.asked.append(name)
        if self.failures:
            self.failures -= 1
            raise self.fails()

    def read_into(self, offset: int, view: memoryview) -> None:
        view[: len(view) // 2] = b"\xee" * (len(view) // 2)
        self._ask("read")
        super().read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        super().write(offset, view[: len(view) // 2])
        self._ask("write fua" if flags & FUA else "write")
        super().write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._ask("zero")
        super().zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self._ask("discard")
        super().discard(offset, length)

    def truncate(self, size: int) -> None:
        self._ask("truncate")
        super().truncate(size)

    def extents(self, offset: int, length: int) -> Extents:
        self._ask("extents")
        return super().extents(offset, length)

    def flush(self) -> None:
        self._ask("flush")


def over(storage: Flaky, clock: Clock | None = None, **options: Any) -> Image:
    return Image(Retry(Child(storage, "image", grows=True), clock=clock or Clock(), **options))


OPERATIONS: dict[str, Callable[[Image], Any]] = {
    "read": lambda image: image.read(0, 100),
    "write": lambda image: image.write(0, b"new!" * 25),
    "zero": lambda image: image.zero(0, 65536),
    "discard": lambda image: image.discard(0, 65536),
    "truncate": lambda image: image.truncate(1 << 19),
    "extents": lambda image: image.extents(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_tried_again_until_it_succeeds(name: str) -> None:
    storage, clock = Flaky(0), Clock()
    image = over(storage, clock, retries=3, delay=100)
    image.write(0, b"old!" * 25)
    storage.failures, storage.asked = 3, []
    result = OPERATIONS[name](image)
    assert storage.asked == [name] * 4
    assert clock.slept == [0.1, 0.2, 0.4]
    if name == "read":
        assert result == b"old!" * 25
    elif name == "write":
        assert image.read(0, 100) == b"new!" * 25
    elif name == "truncate":
        assert image.size == 1 << 19


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_gives_up_with_the_last_error(name: str) -> None:
    numbers = iter([errno.EAGAIN, errno.ETIMEDOUT, errno.EIO])
    storage, clock = Flaky(99, lambda: BlockIOError("gone", errno=next(numbers))), Clock()
    with pytest.raises(BlockIOError) as caught:
        OPERATIONS[name](over(storage, clock, retries=2, delay=50, exponential=False))
    assert caught.value.errno == errno.EIO
    assert storage.asked == [name] * 3
    assert clock.slept == [0.05, 0.05]


@pytest.mark.parametrize(
    "fails",
    [
        lambda: BlockIOError("full", errno=errno.ENOSPC),
        lambda: BlockIOError("no", errno=errno.EPERM),
        lambda: NotSupported("no"),
        lambda: CorruptImage("no"),  # EIO by number, but no error of storage
        lambda: Locked("no"),
    ],
)
def test_errors_that_stay_are_raised_at_once(fails: Callable[[], LaminaError]) -> None:
    storage, clock = Flaky(1, fails), Clock()
    with pytest.raises(type(fails())):
        over(storage, clock).read(0, 1)
    assert (storage.asked, clock.slept) == (["read"], [])


def test_a_flush_is_not_tried_again() -> None:
    storage, clock = Flaky(1), Clock()
    with pytest.raises(BlockIOError):
        over(storage, clock).flush()
    assert (storage.asked, clock.slept) == (["flush"], [])


def test_the_flush_of_a_fua_write_is_not_tried_again_but_the_write_is() -> None:
    storage, clock = Flaky(2), Clock()
    image = over(storage, clock)
    image.write(0, b"x" * 100, fua=True)
    assert storage.asked == ["write", "write", "write", "flush"]
    storage.asked.clear()

    def flush() -> None:
        raise BlockIOError("the cache is lost")

    storage.flush = flush  # type: ignore[method-assign]
    with pytest.raises(BlockIOError, match="the cache is lost"):
        image.write(0, b"x" * 100, fua=True)
    assert storage.asked == ["write"]


def test_waits() -> None:
    def pauses(**options: Any) -> list[float]:
        node = Opener(read_only=False).open({"driver": "retry", "image": {"driver": "memory"}, **options})
        assert isinstance(node, Retry)
        node.close()
        return node.pauses

    assert pauses() == [0.2, 0.4, 0.8, 1.6, 3.2]
    assert pauses(retries=0) == []
    assert pauses(retries=3, delay=10, exponential="off") == [0.01] * 3
    assert max(pauses(retries=1000)) == 3600
    assert Retry(Child(Flaky(0), "image"), retries=3000).pauses[-1] == 3600
