"""Detection of tables in holes of the image file, where a write can fail on a full disk.

Before a request succeeds, the driver fills every hole that the next flush will write to. A flush therefore writes only to
storage that the file system has already allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...request import Child

#: The smallest block size of file systems. Holes are no smaller.
_BLOCK = 1024
_EMPTY = bytes(_BLOCK)
#: The number of tables from which on one query for all holes of the file pays off.
_MANY = 1024
#: The size of a table from which on a query for a hole pays off before a read.
_LARGE = 64 << 10
#: Tables that are compared with the holes at once.
_BATCH = 1 << 18


def has_hole(file: Child, offset: int, content: bytes | bytearray) -> bool:
    """Whether a part of the table at `offset` of `file`, which has this content, is known to lie in a hole."""
    for at in range(0, len(content), _BLOCK):
        part = content[at : at + _BLOCK]
        if _EMPTY.startswith(part) and file.reads_zero(offset + at, len(part)):
            return True
    return False


def stored_tables(file: Child, offsets: Any, size: int) -> Any:
    """Which of the tables of `size` bytes at these sorted offsets do not lie in holes of the file, as a column."""
    from ...numeric import np

    if len(offsets) < _MANY:
        if size < _LARGE:
            return np.ones(len(offsets), np.bool_)
        return np.array([not file.reads_zero(at, size) for at in offsets.tolist()], np.bool_)
    keep = np.zeros(len(offsets), np.bool_)
    begin, end = int(offsets[0]), min(int(offsets[-1]) + size, file.node.size)
    for piece in file.windows(begin, end - begin):
        data = piece.where(zero=False)
        if not len(data):
            continue
        edges = np.array((max(piece.begin - size + 1, 0), piece.end), np.uint64)
        low, high = np.searchsorted(offsets.astype(np.uint64, copy=False), edges).tolist()
        for at in range(low, high, _BATCH):
            starts = offsets[at : min(at + _BATCH, high)].astype(np.int64)
            row = np.searchsorted(data.start + data.length, starts, "right")
            first = data.start[np.minimum(row, len(data) - 1)]
            keep[at : at + len(starts)] |= (row < len(data)) & (first < starts + size)
    return keep
