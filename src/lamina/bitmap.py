"""Dirty bitmaps, which record the bytes of a disk that were written since a point in time. Base layer, without I/O.

A node provides its bitmaps by name (`Node.bitmaps`); backup programs read them over NBD. Every written byte is dirty; other
bytes of the same granule are too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

from .limits import is_power_of_two


class DirtyBitmap(Protocol):
    """The interface of a dirty bitmap. Thread-safe."""

    @property
    def granularity(self) -> int:
        """The number of bytes per bit, a power of two."""

    @property
    def enabled(self) -> bool:
        """Whether it records writes."""

    def dirty(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The dirty ranges (start, stop) between `begin` and `end`, in order, clipped to these bounds and not adjacent."""


class MemoryBitmap:
    """A bitmap that exists only in memory. Its size grows with the number of dirty granules."""

    enabled = True

    def __init__(self, granularity: int = 1 << 16) -> None:
        if not is_power_of_two(granularity):
            raise ValueError(f"a granularity of {granularity} is not a power of two")
        self.granularity = granularity
        self._granules: set[int] = set()
        self._mutex = threading.Lock()

    def mark(self, offset: int, length: int) -> None:
        """Mark the granules of these bytes as dirty."""
        if not length:
            return
        granules = range(offset // self.granularity, -(-(offset + length) // self.granularity))
        with self._mutex:
            self._granules.update(granules)

    def clear(self) -> None:
        """Mark all granules as clean."""
        with self._mutex:
            self._granules.clear()

    def dirty(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """As `DirtyBitmap.dirty`."""
        size = self.granularity
        if begin >= end:
            return
        first, last = begin // size, -(-end // size)
        with self._mutex:
            granules = sorted(number for number in self._granules if first <= number < last)
        start = stop = -1
        for number in granules:
            if number * size != stop:
                if start >= 0:
                    yield max(start, begin), min(stop, end)
                start = number * size
            stop = (number + 1) * size
        if start >= 0:
            yield max(start, begin), min(stop, end)
