"""Do two images hold the same? Only what is not zero in both is read; a longer image may be longer by zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..extents import DATA, PRESENT, ZERO
from ..limits import KIB
from ..numeric import np
from .progress import Monitor
from .windows import stretches, windows

if TYPE_CHECKING:
    from ..extents import Extents
    from ..image import Image

#: Read from both at a time: small enough that the cache still holds the first when the second is compared with it. (A
#: second thread that reads the other image was measured, and costs more than it saves.)
_PIECE = 512 * KIB
_ZEROS = bytes(_PIECE)

_STATUS = DATA | ZERO | PRESENT

# Which of the two images must be read, because it is not known to be zero there.
_BOTH, _FIRST, _SECOND = 0, 1, 2


class Difference(NamedTuple):
    """The first thing in which two images differ: their size, the status of a byte (strict only), or a byte."""

    kind: Literal["size", "status", "content"]
    offset: int


def compare(first: Image, second: Image, *, strict: bool = False, monitor: Monitor | None = None) -> Difference | None:
    """The first difference between two disks, or None.

    What one has beyond the end of the other must read as zero. With `strict` the sizes must be equal too, and so must
    be, for each byte, whether it is stored, is zero, and is owned by any layer. Raises what reading raises, and
    Cancelled.
    """
    watch = monitor or Monitor()
    shared = min(first.size, second.size)
    total = max(first.size, second.size)
    if strict and first.size != second.size:
        return Difference("size", shared)
    reader = _Reader(first, second)
    for mine in windows(first, 0, shared):
        theirs = second.extents(mine.begin, mine.end - mine.begin)
        end = mine.end
        status = _first_status(mine, theirs) if strict else None
        if status is not None:
            end = status
        for which, begin, length in _unequal(mine.clip(mine.begin, end), theirs.clip(mine.begin, end)):
            found = reader.compare(which, begin, length, watch, total)
            if found is not None:
                return Difference("content", found)
        if status is not None:
            return Difference("status", status)
        watch.update(mine.end, total)
    longer, which = (first, _FIRST) if first.size > second.size else (second, _SECOND)
    for rest in windows(longer, shared, total):
        stored = rest.where(zero=False)
        for begin, length in zip(stored.start.tolist(), stored.length.tolist(), strict=True):
            found = reader.compare(which, begin, length, watch, total)
            if found is not None:
                return Difference("content", found)
        watch.update(rest.end, total)
    return None


def _unequal(mine: Extents, theirs: Extents) -> Iterator[tuple[int, int, int]]:
    """(which, start, length) of what must be read, in order: all but what is zero in both."""
    stored, other = mine.where(zero=False), theirs.where(zero=False)
    parts = (
        stored.intersect(other),
        stored.intersect(theirs.where(zero=True)),
        other.intersect(mine.where(zero=True)),
    )
    which = np.repeat((_BOTH, _FIRST, _SECOND), [len(part) for part in parts])
    start = np.concatenate([part.start for part in parts])
    length = np.concatenate([part.length for part in parts])
    return stretches(which, start, length)


def _first_status(mine: Extents, theirs: Extents) -> int | None:
    """Where the flags of the two first differ (not where the bytes lie, nor in which layer)."""
    edges = np.union1d(mine.start, theirs.start)
    flags = [one.flags[np.searchsorted(one.start, edges, "right") - 1] for one in (mine, theirs)]
    differs = np.flatnonzero((flags[0] ^ flags[1]) & _STATUS)
    return int(edges[differs[0]]) if len(differs) else None


class _Reader:
    """Reads the same stretch of both images into buffers that are used again."""

    def __init__(self, first: Image, second: Image) -> None:
        self._images = (first, second)
        self._buffers = (bytearray(_PIECE), bytearray(_PIECE))
        self._views = (memoryview(self._buffers[0]), memoryview(self._buffers[1]))

    def compare(self, which: int, begin: int, length: int, watch: Monitor, total: int) -> int | None:
        """The offset of the first byte that differs, or that is not zero where only one image is read."""
        for at in range(begin, begin + length, _PIECE):
            count = min(_PIECE, begin + length - at)
            found = self._both(at, count) if which == _BOTH else self._zero(which - 1, at, count)
            if found is not None:
                return at + found
            watch.update(at + count, total)
        return None

    def _both(self, at: int, count: int) -> int | None:
        mine, theirs = self._views[0][:count], self._views[1][:count]
        self._images[0].read_into(at, mine)
        self._images[1].read_into(at, theirs)
        # Comparing views goes item by item; this is one memcmp, and copies nothing.
        if self._buffers[0].startswith(theirs):
            return None
        return int(np.flatnonzero(np.frombuffer(mine, np.uint8) != np.frombuffer(theirs, np.uint8))[0])

    def _zero(self, image: int, at: int, count: int) -> int | None:
        view = self._views[image][:count]
        self._images[image].read_into(at, view)
        return None if _ZEROS.startswith(view) else int(np.flatnonzero(np.frombuffer(view, np.uint8))[0])
