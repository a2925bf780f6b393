"""Copy offloading: the operating system copies ranges of the source's file to the target's file, or lets both files share
blocks (reflink). Used by `convert`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..errors import NotSupported
from ..extents import DATA, ZERO
from ..limits import KIB, MIB
from ..node import NO_FALLBACK
from ..numeric import np

if TYPE_CHECKING:
    from ..extents import Extents, HostFile
    from ..image import Image
    from ..numeric import NDArray
    from .rate import RateLimit

#: The usual block size of file systems, which share whole blocks only.
_BLOCK = 4 * KIB
#: The job reads and writes shorter ranges. At 64 KiB, sharing still takes less time (256 MiB: 0.21 s instead of 0.50 on
#: btrfs, 0.23 instead of 0.24 on xfs); for shorter ranges the system calls dominate.
_LEAST = 64 * KIB
#: The longest copy of one system call; the job reports progress between two of them.
_STEP = 64 * MIB


class FileRange(NamedTuple):
    """The file range of `length` bytes at `start` of a disk: `file` has the same bytes at `offset`."""

    start: int
    length: int
    file: HostFile
    offset: int


class Offloader:
    """Copies ranges of `source` to the same offsets of `target` without reading them; with `only_share` only by sharing
    blocks. What may be copied, and not only shared, waits for its share of the `rate`. `done`: the bytes copied so far. For
    use by one thread."""

    def __init__(self, source: Image, target: Image, *, only_share: bool, rate: RateLimit | None = None) -> None:
        self.done = 0
        self._source = source
        self._target = target
        self._flags = NO_FALLBACK if only_share else 0
        limits = target.node.limits
        # Only whole clusters: a format merges parts of a cluster in memory.
        self._unit = math.lcm(limits.zero_alignment, limits.request_alignment, target.node.serialise or 1, _BLOCK)
        self._rate = None if only_share else rate
        self._step = (
            _STEP if self._rate is None else max(min(self._rate.rate // self._unit * self._unit, _STEP), self._unit)
        )
        self._works: dict[HostFile, bool] = {}  # whether the first attempt succeeded

    def file_ranges(self, found: Extents, wanted: NDArray[np.bool_]) -> list[FileRange]:
        """The file ranges of these extents of the source that may be offloaded, in order, in whole units of the target.
        `wanted`: the extents to consider."""
        # If another thread may write to the source, its bytes may be moved before the copy.
        if not self._source.read_only or not self._source.node.copyable:
            return []
        if not any(self._works.get(file, True) for file in found.files):
            return []
        start, unit = found.start, self._unit
        first = -(-start // unit) * unit
        length = (start + found.length) // unit * unit - first
        offset = found.offset + (first - start)
        worth = wanted & (found.flags & (DATA | ZERO) == DATA) & (found.file >= 0) & (length >= _LEAST)
        if self._flags:
            worth &= offset % _BLOCK == 0
        rows = np.flatnonzero(worth)
        columns = (first[rows], length[rows], found.file[rows], offset[rows])
        return [
            FileRange(at, n, found.files[file], o)
            for at, n, file, o in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def copy(self, file_range: FileRange) -> Iterator[int]:
        """Copy `file_range` step by step, and yield the offset up to which it is copied. The copy may end early, or copy
        nothing: the caller reads and writes the rest. Raises the errors of a write."""
        at, end = file_range.start, file_range.start + file_range.length
        if not self._works.get(file_range.file, True):
            return
        while at < end:
            # The first attempt is short: if it is refused, the target allocated clusters in vain.
            count = min(self._step, end - at) if file_range.file in self._works else self._unit
            works = self._try(at, file_range.file, file_range.offset + at - file_range.start, count)
            self._works.setdefault(file_range.file, works)
            if not works:
                return
            at += count
            self.done += count
            yield at

    def _try(self, at: int, file: HostFile, offset: int, length: int) -> bool:
        if self._rate is not None:
            self._rate.before_write(length)
        try:
            self._target.root.copy_from(at, file, offset, length, self._flags)
        except NotSupported:
            return False
        return True


def without(
    file_ranges: list[FileRange], start: NDArray[np.int64], length: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """These rows, in order, without `file_ranges`, each of which is inside one row."""
    if not file_ranges:
        return start, length
    low = np.array([file_range.start for file_range in file_ranges], np.int64)
    high = low + np.array([file_range.length for file_range in file_ranges], np.int64)
    begin = np.sort(np.concatenate((start, high)))
    end = np.sort(np.concatenate((start + length, low)))
    kept = end > begin
    return begin[kept], (end - begin)[kept]
