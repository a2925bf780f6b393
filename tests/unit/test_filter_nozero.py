"""The filter `nozero`: zeroes arrive below as writes of zeros."""

from __future__ import annotations

import pytest

from lamina.errors import NotSupported
from lamina.filters.nozero import NoZero
from lamina.image import Image
from lamina.node import FUA
from lamina.request import Child
from lamina.storage.memory import PAGE, MemoryStorage


class Recording(MemoryStorage):
    """Remembers what it was asked to change."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.changes: list[tuple[str, int, int, int]] = []

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.changes.append(("write", offset, len(view), flags))
        super().write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.changes.append(("zero", offset, length, flags))
        super().zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.changes.append(("discard", offset, length, 0))
        super().discard(offset, length)


def test_a_zero_is_written() -> None:
    storage = Recording(1 << 20)
    image = Image(NoZero(Child(storage, "image")))
    image.write(0, b"x" * 4 * PAGE)
    storage.changes.clear()
    image.zero(PAGE, 2 * PAGE, unmap=True, fua=True)
    assert storage.changes == [("write", PAGE, 2 * PAGE, FUA)]
    assert image.read(PAGE - 1, 2 * PAGE + 2) == b"x" + bytes(2 * PAGE) + b"x"
    assert storage.allocated == 4 * PAGE
    assert image.extents(PAGE, PAGE).data.all()


def test_a_zero_that_must_be_fast_is_refused_before_a_byte_is_touched() -> None:
    storage = Recording(1 << 20)
    image = Image(NoZero(Child(storage, "image")))
    with pytest.raises(NotSupported):
        image.zero(0, PAGE, fast=True)
    assert storage.changes == []


def test_discards_and_the_status_pass() -> None:
    storage = Recording(1 << 20)
    image = Image(NoZero(Child(storage, "image")))
    image.discard(0, PAGE)
    assert storage.changes == [("discard", 0, PAGE, 0)]
    assert image.root.reads_zero(0, 1 << 20)
    assert image.extents() == Image(storage).extents()
