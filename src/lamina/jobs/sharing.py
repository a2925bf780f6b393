"""What of a source need not be read to be copied: it lies in a file as it reads, and the system can copy it from there,
or let the target's file share its blocks. Used by `convert`."""

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

#: File systems share whole blocks, which are rarely smaller or larger than this.
_BLOCK = 4 * KIB
#: What is shorter is read and written. For pieces of 64 KiB sharing still takes less time (256 MiB of them: 0.21 s instead of
#: 0.50 on btrfs, 0.23 instead of 0.24 on xfs), for shorter ones it is the many calls that cost.
_LEAST = 64 * KIB
#: The most that is copied at once; between two such steps progress is told.
_STEP = 64 * MIB


class Place(NamedTuple):
    """`length` bytes from `start` of a disk lie, as they read, at `offset` of `file`."""

    start: int
    length: int
    file: HostFile
    offset: int


class Sharer:
    """Copies stretches of `source` to the same place of `target` without reading them. With `only_share` only where the
    blocks become shared. `done`: how many bytes it did. Used by one thread."""

    def __init__(self, source: Image, target: Image, *, only_share: bool) -> None:
        self.done = 0
        self._source = source
        self._target = target
        self._flags = NO_FALLBACK if only_share else 0
        limits = target.node.limits
        # Blocks that are merged with others must be in memory: whole clusters only (a format zeroes whole clusters).
        self._unit = math.lcm(limits.zero_alignment, limits.request_alignment, _BLOCK)
        self._works: dict[HostFile, bool] = {}  # whether the first try did

    def places(self, found: Extents, wanted: NDArray[np.bool_]) -> list[Place]:
        """The parts of these extents of the source that are worth a try, in order, in whole units of the target. `wanted`:
        of which extents at all."""
        # Where somebody may write to the source, its bytes may lie elsewhere by the time that they are copied.
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
            Place(at, n, found.files[file], o) for at, n, file, o in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def copy(self, place: Place) -> Iterator[int]:
        """Copy it, step by step; yields up to where it is done. It may end before all is, or anything: the rest must be
        read and written. Raises what writing raises."""
        at, end = place.start, place.start + place.length
        if not self._works.get(place.file, True):
            return
        while at < end:
            # A first try is short: where it is refused, the target has reserved room and given it back.
            count = min(_STEP, end - at) if place.file in self._works else self._unit
            works = self._try(at, place.file, place.offset + at - place.start, count)
            self._works.setdefault(place.file, works)
            if not works:
                return
            at += count
            self.done += count
            yield at

    def _try(self, at: int, file: HostFile, offset: int, length: int) -> bool:
        try:
            self._target.root.copy_from(at, file, offset, length, self._flags)
        except NotSupported:
            return False
        return True


def without(
    places: list[Place], start: NDArray[np.int64], length: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What `places` leave of these rows, which are in order: each place lies inside one of them."""
    if not places:
        return start, length
    low = np.array([place.start for place in places], np.int64)
    high = low + np.array([place.length for place in places], np.int64)
    begin = np.sort(np.concatenate((start, high)))
    end = np.sort(np.concatenate((start + length, low)))
    kept = end > begin
    return begin[kept], (end - begin)[kept]
