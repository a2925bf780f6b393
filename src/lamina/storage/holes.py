"""The holes of a file, found with SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

import errno
import os
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING

from ..limits import MAX_ROWS
from ..node import bounded
from ..status import DATA, PRESENT, ZERO

if TYPE_CHECKING:
    from ..extents import Extents, HostFile


def boundaries(fd: int, offset: int, end: int) -> array[int]:
    """The boundaries of holes and data between `offset` and `end`. The first range, at `offset`, is a hole, which may be
    empty. The last boundary is `end`, or an earlier offset if the result has the maximum number of rows. Raises OSError."""
    seek, to_data, to_hole = os.lseek, os.SEEK_DATA, os.SEEK_HOLE
    found = array("q", (offset,))
    add = found.append
    at = offset
    try:
        while (at := seek(fd, at, to_data)) < end:
            add(at)
            if (at := seek(fd, at, to_hole)) >= end:
                break
            add(at)
            if len(found) > MAX_ROWS:
                return found
    except OSError as error:
        if error.errno == errno.EINVAL and len(found) == 1:
            add(offset)  # the file system has no holes: everything is data
        elif error.errno != errno.ENXIO:  # ENXIO: a hole up to the end of the file
            raise
    add(end)
    return found


def extents(edges: array[int], file: HostFile) -> Extents:
    """The ranges between these boundaries of `file` as extents."""
    from ..extents import Extents
    from ..numeric import np

    offsets = np.frombuffer(edges, np.int64)
    flags = np.full(len(offsets) - 1, ZERO | PRESENT, np.uint8)
    flags[1::2] = DATA | PRESENT
    lengths = np.diff(offsets)
    rows = np.flatnonzero(lengths)
    start = offsets[rows]
    # Adjacent extents are equal only if the file changed during the query.
    found = Extents.from_columns(start, lengths[rows], flags[rows], file=0, offset=start.copy(), files=(file,))
    return bounded(found.coalesce())


def zero_runs(edges: array[int]) -> list[tuple[int, bool]]:
    """The same as (length, whether it is a hole); empty ranges are left out."""
    runs = [(end - start, not number & 1) for number, (start, end) in enumerate(pairwise(edges)) if end > start]
    return runs[:MAX_ROWS]


class DataRange:
    """The range of data that was found last in a file. Whoever may have made a hole in the file calls `forget` afterwards. If
    another program makes one, the range is still called data, which is allowed: only a hole must not be claimed without being
    there. Takes no lock: any number of threads may use it."""

    __slots__ = ("_current", "_found")

    def __init__(self) -> None:
        #: Another object after each `forget`.
        self._current = object()
        #: What `_current` was before the range was looked for, and the range.
        self._found = (self._current, 0, 0)

    def forget(self) -> None:
        """Look for it again."""
        self._current = object()

    def find(self, fd: int, offset: int, end: int) -> tuple[int, int]:
        """Begin and end of the first data from `offset` on; the end may be past `end`, and so may the begin, if there is none
        before `end`. Two system calls at most, and none inside the range that was found last. Raises OSError."""
        current, begin, stop = self._found
        if begin <= offset < stop and current is self._current:
            return offset, stop
        current = self._current
        begin = _seek(fd, offset, os.SEEK_DATA, end)
        if begin >= end:
            return end, end
        stop = _seek(fd, begin, os.SEEK_HOLE, end)
        self._found = (current, begin, stop)
        return begin, stop


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """lseek; `end` if there is no such offset. A file system without holes has data only."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        if error.errno == errno.EINVAL:
            return offset if whence == os.SEEK_DATA else end
        raise
