"""Dirty bitmaps: which bytes of a disk were written since some moment. Ground floor: pure, no I/O.

A node offers its bitmaps by name (`Node.bitmaps`); backup tools read them through NBD. A bitmap may say too much and never
too little: whatever was written is dirty.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

from .limits import is_power_of_two


class DirtyBitmap(Protocol):
    """What a bitmap answers. Safe for any number of threads."""

    @property
    def granularity(self) -> int:
        """Bytes that one bit stands for, a power of two."""

    def dirty(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the dirty stretches between `begin` and `end`, cut there, in order, none touching the next."""


class MemoryBitmap:
    """A bitmap in memory, gone with the process. Its memory grows with the number of dirty granules."""

    def __init__(self, granularity: int = 1 << 16) -> None:
        if not is_power_of_two(granularity):
            raise ValueError(f"a granularity of {granularity} is not a power of two")
        self.granularity = granularity
        self._granules: set[int] = set()
        self._mutex = threading.Lock()

    def mark(self, offset: int, length: int) -> None:
        """These bytes were written."""
        if not length:
            return
        granules = range(offset // self.granularity, -(-(offset + length) // self.granularity))
        with self._mutex:
            self._granules.update(granules)

    def clear(self) -> None:
        """Nothing is dirty any more."""
        with self._mutex:
            self._granules.clear()

    def dirty(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
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
