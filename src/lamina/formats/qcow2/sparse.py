"""Tables that may lie in holes of the file: what is not stored takes no memory.

A header can name an L1 table of 32 MiB in a file of a few KiB: all of it a hole. Such a table is kept in pages that the
system provides when they are touched, and only what the file stores is read into them.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child

#: From this size on it pays to ask where the holes of a table are, and in pieces of so many bytes.
_SMALLEST = 256 << 10
_STEP = 64 << 10


def stored_bytes(file: Child, offset: int, length: int) -> int:
    """How many of these bytes of the file must be read: those that are not known to be zeros."""
    return sum(stop - start for start, stop in _stored(file, offset, length))


def load(file: Child, offset: int, count: int) -> array[int] | memoryview[int]:
    """`count` entries of 64 bits, big-endian in the file, to be indexed and changed as numbers."""
    if count * 8 < _SMALLEST or stored_bytes(file, offset, count * 8) == count * 8:
        table = array("Q", (0,)) * count
        _read(file, offset, table)
        return table
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

    # Private: a child of this process has its own.
    view = memoryview(mmap(-1, count * 8, flags=MAP_PRIVATE | MAP_ANONYMOUS)).cast("Q")
    for start, stop in _stored(file, offset, count * 8):
        part = array("Q", (0,)) * (stop - start >> 3)
        _read(file, start, part)
        at = start - offset >> 3
        view[at : at + len(part)] = memoryview(part)
    return view


def _read(file: Child, offset: int, table: array[int]) -> None:
    file.read_into(offset, memoryview(table).cast("B"))
    if sys.byteorder == "little":
        table.byteswap()


def _stored(file: Child, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts [start, stop) that are not known to be zeros. Small tables are one part."""
    if length < _SMALLEST:
        yield offset, offset + length
        return
    for start in range(offset, offset + length, _STEP):
        stop = min(start + _STEP, offset + length)
        if not file.reads_zero(start, stop - start):
            yield start, stop
