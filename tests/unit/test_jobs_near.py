"""Stored bytes that lie near each other are read together: as few requests as can be, and the same bytes."""

from __future__ import annotations

from typing import Any

import pytest

from lamina.extents import Extents
from lamina.image import Image
from lamina.jobs.compare import Difference, compare
from lamina.jobs.convert import convert
from lamina.jobs.copy import Copy, Plan
from lamina.jobs.copy_ends import StorageSource, StorageTarget
from lamina.jobs.requests import NEAR
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


class Sparse(MemoryStorage):
    """Memory that says exactly which bytes it stores: `parts`, of `length` bytes each. Counts its reads."""

    def __init__(self, parts: list[int], length: int) -> None:
        super().__init__(SIZE)
        self.parts, self.each = parts, length
        for number, at in enumerate(parts):
            super().write(at, memoryview(bytes([number % 255 + 1]) * length))
        self.reads = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads += 1
        super().read_into(offset, view)

    def extents(self, offset: int, length: int) -> Extents:
        found = Extents.empty(0)
        at, pieces = 0, []
        for part in self.parts:
            if part > at:
                pieces.append(Extents.single(at, part - at, zero=True, present=True))
            pieces.append(Extents.single(part, self.each, data=True, present=True, file=self, offset=part))
            at = part + self.each
        if at < SIZE:
            pieces.append(Extents.single(at, SIZE - at, zero=True, present=True))
        found = Extents.concat(pieces)
        return found.clip(offset, offset + length)


NEARBY = list(range(0, SIZE, 4 * KIB))
FAR_APART = list(range(0, SIZE, 2 * NEAR))


@pytest.mark.parametrize("before", [b"", b"o" * SIZE])
@pytest.mark.parametrize(("parts", "most"), [(NEARBY, 16), (FAR_APART, SIZE)], ids=["near", "apart"])
def test_tiny_extents_do_not_become_a_request_each(parts: list[int], most: int, before: bytes) -> None:
    source = Sparse(parts, 512)
    with Image(source) as one, Image(MemoryStorage(SIZE)) as other:
        if before:
            other.write(0, before)
        convert(one, other, blank=not before)
        made = source.reads
        assert other.read(0, SIZE) == one.read(0, SIZE)
        target = MemoryStorage(SIZE)
        source.reads = 0
        end = StorageTarget(Child(target, "target"), "there", blank=True, grows=False)
        Copy(StorageSource(one), end, Plan()).run()
        assert target.size == SIZE
        copied = bytearray(SIZE)
        target.read_into(0, memoryview(copied))
        assert copied == other.read(0, SIZE)
        assert max(made, source.reads) <= most
        assert min(made, source.reads) >= (1 if most == 16 else len(parts))


def test_without_a_search_for_zeros_holes_stay() -> None:
    """-S 0: what was read is written, and what was known to be zero is not read."""
    source = Sparse(NEARBY, 512)
    with Image(source) as one, Image(MemoryStorage(SIZE)) as other:
        end = StorageTarget(Child(other.node, "target"), "there", blank=False, grows=False)
        copied = Copy(StorageSource(one), end, Plan(smallest_hole=0)).run()
        assert copied.read == 512 * len(NEARBY)
        assert other.read(0, SIZE) == one.read(0, SIZE)


def test_comparing_reads_near_neighbours_together() -> None:
    one, other = Sparse(NEARBY, 512), Sparse(NEARBY, 512)
    with Image(one) as first, Image(other) as second:
        assert compare(first, second) is None
        assert one.reads + other.reads <= 32
        MemoryStorage.write(other, 3 * MIB + 100, memoryview(b"!"))
        found: Any = compare(first, second)
        assert found == Difference("content", 3 * MIB + 100)
