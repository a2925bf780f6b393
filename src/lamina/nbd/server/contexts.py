"""Metadata contexts: which numbers BLOCK_STATUS answers for the extents of an image.

One table for each context says what it answers, for columns of extents and for the few of a small question alike. What
extents
are, and how they are clipped, rounded and joined, is the business of `extents`. Section of the specification: "Metadata
querying".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from ...status import COMPRESSED, DATA, PRESENT, ZERO, Status
from .. import wire

if TYPE_CHECKING:
    from ...bitmap import DirtyBitmap
    from ...extents import Extents
    from ...numeric import NDArray

_FLAGS = range(16)


class Context:
    """What one context answers for an extent: `status(flags)`, and where `layered(flags)` is not 0, so much more for each
    layer above the one that decides."""

    def __init__(self, status: Callable[[int], int], layered: Callable[[int], int] = lambda flags: 0) -> None:
        self._status = [status(flags) for flags in _FLAGS]
        self._layered = [layered(flags) for flags in _FLAGS]
        answers = list(zip(self._status, self._layered, strict=True))
        #: For each set of flags the first one that the context answers in the same way.
        self._alike = [answers.index(answer) for answer in answers]

    # -- columns

    def reduce(self, extents: Extents) -> Extents:
        """The same bytes, without what the context does not tell: extents that it answers in the same way are one."""
        from ...extents import Extents
        from ...numeric import np

        flags = np.array(self._alike, np.uint8)[extents.flags]
        depth = np.where(np.array(self._layered)[flags] != 0, extents.depth, np.int32(0))
        count = len(extents)
        nowhere = np.full(count, -1, np.int32), np.full(count, -1, np.int64)
        return Extents(extents.begin, extents.start, extents.length, flags, depth, *nowhere).coalesce()

    def answers(self, extents: Extents) -> NDArray[Any]:
        """The number for each extent."""
        from ...numeric import np

        return np.array(self._status)[extents.flags] + np.array(self._layered)[extents.flags] * extents.depth

    # -- a few

    def status(self, flags: int, depth: int) -> int:
        """The number for one extent."""
        return self._status[flags] + self._layered[flags] * depth

    def few(self, rows: Sequence[Status], length: int, mask: int, *, one: bool) -> list[int] | None:
        """The same for `rows`, the first of `length` bytes: lengths and numbers by turns; of the first extent alone if `one`.
        None where they do not tell: the rows end too soon, or in a block (of `mask + 1` bytes) that must be rounded."""
        status, layered = self._status, self._layered
        found: list[int] = []
        at, last = 0, -1
        for flags, size, depth, _, _ in rows:
            number = status[flags] + layered[flags] * depth
            if number == last:
                found[-2] += size
            elif at & mask:
                return None
            elif found and one:
                return found
            else:
                found += (size, number)
                last = number
            at += size
        return found if at == length else None


def _hole_and_zero(hole: int, zero: int) -> Callable[[int], int]:
    return lambda flags: (0 if flags & DATA else hole) | (zero if flags & ZERO else 0)


def _exact(flags: int) -> int:
    status = _hole_and_zero(wire.EXACT_HOLE, wire.EXACT_ZERO)(flags)
    status |= wire.EXACT_PRESENT if flags & PRESENT else 0
    return status | (wire.EXACT_COMPRESSED if flags & COMPRESSED else 0)


def _present(flags: int) -> int:
    return 1 if flags & PRESENT else 0


#: Those that every export may have.
CONTEXTS: Final = {
    wire.BASE_ALLOCATION: Context(_hole_and_zero(wire.STATE_HOLE, wire.STATE_ZERO)),
    wire.ALLOCATION_DEPTH: Context(_present, _present),
    wire.EXACT: Context(_exact, lambda flags: 1 << wire.EXACT_DEPTH_SHIFT),
}
#: A dirty bitmap as `dirty_extents` tells it.
DIRTY: Final = Context(lambda flags: wire.STATE_DIRTY if flags & DATA else 0)


def dirty_extents(bitmap: DirtyBitmap, begin: int, end: int) -> Extents:
    """What of [begin, end) is dirty, as DATA: rounding keeps a block dirty if any part of it is."""
    from ...extents import Extents

    edges, flags = [begin], []
    for start, stop in bitmap.dirty(begin, end):
        if start > edges[-1]:
            edges.append(start)
            flags.append(0)
        edges.append(stop)
        flags.append(DATA)
    if edges[-1] < end:
        edges.append(end)
        flags.append(0)
    return Extents.from_columns(edges[:-1], [stop - start for start, stop in pairwise(edges)], flags)


def pack(numbers: Sequence[int], *, wide: bool) -> bytes:
    """Lengths and numbers by turns as `wire.EXTENT`, or as `wire.EXTENT_EXT` if `wide`."""
    return struct.pack(f">{len(numbers)}{'Q' if wide else 'I'}", *numbers)


def pack_columns(lengths: NDArray[Any], numbers: NDArray[Any], *, wide: bool) -> bytes:
    """The same of columns."""
    from ...numeric import np

    packed: bytes = np.column_stack((lengths, numbers)).astype(">u8" if wide else ">u4").tobytes()
    return packed
