"""Walking over the status of a whole image in windows, so that the columns of no answer need much memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..limits import MIB, align_up
from ..numeric import np

if TYPE_CHECKING:
    from ..extents import Extents
    from ..image import Image
    from ..numeric import NDArray

#: The first window; even at one extent per 512 bytes its columns are small.
_FIRST = 64 * MIB
#: Windows grow and shrink towards this many rows (about 40 bytes each).
_ROWS = 1 << 17


def windows(image: Image, begin: int, end: int, *, grid: int = 1) -> Iterator[Extents]:
    """The exact extents from `begin` to `end`, one piece after the other. Pieces meet at multiples of `grid`, a power
    of two, and are as long as gives about a hundred thousand rows each; the first is short."""
    length = max(_FIRST, grid)
    while begin < end:
        stop = min(align_up(begin + length, max(grid, MIB)), end)
        found = image.extents(begin, stop - begin)
        yield found
        rows = len(found)
        if rows < _ROWS // 4:
            length *= 4
        elif rows > _ROWS * 2:
            length = max(length * _ROWS // rows, MIB)
        begin = stop


def stretches(
    kind: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64]
) -> Iterator[tuple[int, int, int]]:
    """(kind, start, length) of rows that do not overlap, in order, with neighbours of one kind that touch made one,
    wherever their bytes lie: what is worth one request."""
    order = np.argsort(start, kind="stable")
    kind, start = kind[order], start[order]
    end = start + length[order]
    if not len(start):
        return iter(())
    first = np.flatnonzero(np.concatenate(([True], (kind[1:] != kind[:-1]) | (start[1:] != end[:-1]))))
    last = np.append(first[1:], len(start)) - 1
    return zip(kind[first].tolist(), start[first].tolist(), (end[last] - start[first]).tolist(), strict=True)
