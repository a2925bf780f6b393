"""Every request fails once and for good while clusters are packed, written over, and given up; nothing is lost.

As `test_fail_the_nth`, through the filter `compress`.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from lamina.filters.compress import Compress
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.limits import Budget
from lamina.node import COMPRESS
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.failing import FailingStorage, Session, fail_nth
from tests import evidence

KIB = 1024
BELOW = random.Random(8).randbytes(50 * KIB + 77)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "512 bytes, 64 bits": {"cluster_size": 512, "refcount_bits": 64},
    "512 bytes, 2 bits": {"cluster_size": 512, "refcount_bits": 2},
    "1 KiB, version 2": {"cluster_size": 1024, "compat": "0.10"},
    "4 KiB, zstd": {"cluster_size": 4096, "compression_type": "zstd"},
    "4 KiB over a file": {"cluster_size": 4096, "refcount_bits": 64, "backing": True},
    "512 bytes, no cache": {"cluster_size": 512, "refcount_bits": 64, "cache": 2 * KIB},
}
SIZE = 66 * KIB + 300


def text(length: int, value: int) -> bytes:
    """What shrinks, but for a stretch in the middle."""
    calm = bytes([value, value + 1, value + 2]) * (length // 3 + 1)
    noise = random.Random(value).randbytes(length // 4)
    return calm[: length // 2] + noise + calm[: length - length // 2 - len(noise)]


class Case:
    """One geometry: how an image of it is opened, and what it holds at first."""

    def __init__(self, name: str) -> None:
        self.options = dict(GEOMETRIES[name])
        self.backing = self.options.pop("backing", False)
        self.budget = Budget(cache_bytes=self.options.pop("cache", 1 << 20))
        storage = FailingStorage()
        values = Qcow2.create_schema.parse({**self.options, "size": SIZE})
        Qcow2.create(Child(storage, "file", grows=True), SIZE, values)
        below = BELOW.ljust(SIZE, b"\0") if self.backing else bytes(SIZE)
        session = Session(self.open, storage, below)
        session.write(0, text(12 * KIB, 3))
        session.flush()
        session.write(20 * KIB, text(9 * KIB, 5))
        session.write(SIZE - 700, text(700, 7))
        session.close()
        self.content = bytes(storage.content)
        with self.open(Child(FailingStorage(self.content), "file", grows=True), True) as image:
            assert any(row.compressed for row in image.extents())

    def open(self, storage: Child, read_only: bool) -> Image:
        options: dict[str, Any] = {"file": storage}
        if self.backing:
            below = MemoryStorage()
            below.write(0, memoryview(BELOW))
            below.read_only = True
            options["backing"] = Child(below, "backing")
        node = Qcow2.open(Qcow2.schema.parse(options), Opener(read_only=read_only, budget=self.budget))
        return Image(Compress(Child(node, "image"), read_only=read_only))


def no_corruption(image: Image) -> None:
    node: Any = image.node.children["image"].node
    report = node.check()
    assert not report.corruptions, report.findings[:5]
    assert not report.check_errors, report.findings[:5]


def packing(session: Session) -> None:
    session.write(32 * KIB, text(10 * KIB, 11))
    session.flush()
    session.write(42 * KIB, text(5 * KIB, 13))
    session.flush()


def packing_over(session: Session) -> None:
    """Old places are given up while new ones are taken beside them."""
    session.write(2 * KIB, text(8 * KIB, 17))
    session.flush()
    session.write(KIB + 100, text(4 * KIB, 19))
    session.flush()
    session.flush()


def plain_over(session: Session) -> None:
    """Copy on write from packed clusters: not through the filter."""
    image = session.image
    root, image._root = image._root, image.node.children["image"]
    try:
        session.write(5 * KIB + 77, text(700, 23))
        session.write(21 * KIB, text(5 * KIB, 29))
        session.flush()
    finally:
        if session.is_open:
            image._root = root


def giving_up(session: Session) -> None:
    session.zero(KIB, 3 * KIB)
    session.zero(5 * KIB, 2 * KIB, unmap=True)
    session.discard(0, 30 * KIB)
    session.flush()
    session.flush()
    session.write(33 * KIB, text(12 * KIB, 31))
    session.flush()


def reading(session: Session) -> None:
    session.read(100, 2 * KIB)
    session.read(0, SIZE)


def resizing(session: Session) -> None:
    session.truncate(21 * KIB)
    session.truncate(40 * KIB)
    session.flush()


def closing(session: Session) -> None:
    session.write(40 * KIB, text(9 * KIB, 37))
    session.discard(0, 4 * KIB)
    session.close()
    session.read(0, 50 * KIB)


OPERATIONS = [packing, packing_over, plain_over, giving_up, reading, resizing, closing]


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=[operation.__name__ for operation in OPERATIONS])
def test_each_request_fails(operation: Any, name: str) -> None:
    case = Case(name)
    points = fail_nth(case.open, operation, no_corruption, content=case.content)
    assert points
    evidence.count("points (operation, request that fails, fault)", points)


def test_what_could_not_be_written_leaves_the_room_to_others() -> None:
    """A write of packed data fails; the next one is packed, and nothing is found wrong."""
    case = Case("512 bytes, 64 bits")
    storage = FailingStorage(case.content)
    image = case.open(Child(storage, "file", grows=True), False)
    before = image.read(0, SIZE)
    storage.arm(1, 28, kinds=["write"])
    with pytest.raises(OSError, match="selected to fail"):
        image.root.write(30 * KIB, memoryview(b"calm" * KIB), COMPRESS)
    storage.disarm()
    assert image.read(0, 30 * KIB) == before[: 30 * KIB]
    image.write(40 * KIB, b"next" * KIB)
    image.flush()
    assert image.read(40 * KIB, 4 * KIB) == b"next" * KIB
    no_corruption(image)
