"""A set of clusters that takes eight bytes per element: the metadata clusters of an image.

An L1 table of 32 MiB points to four million L2 tables, and a Python `set` takes a hundred bytes per element. `ClusterSet`
keeps the cluster indexes in sorted arrays of moderate length. Every write tests whether its clusters are in the set; a filter
of one byte per hash value rules out most clusters that are not, without a search.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from itertools import islice
from operator import eq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

#: The longest array. An insertion moves half of it on average.
_LONGEST = 1 << 13
#: The number of clusters that are sorted at a time, as Python integers.
_BATCH = 1 << 15
#: The number of added clusters that are kept in a `set` before they are moved to the arrays.
_RECENT = 1 << 10


class ClusterSet:
    """A set of cluster indexes. Not thread-safe. After an exception at any point it still contains all of its clusters, and
    possibly some of those that were being added."""

    __slots__ = ("_arrays", "_lows", "_mask", "_seen", "recent")

    def __init__(self, arrays: Iterable[array[int]] = ()) -> None:
        """`arrays`: sorted arrays that follow one another, as `merge` returns them."""
        self._arrays = list(arrays) or [array("Q")]
        self._lows = [0, *(one[0] for one in self._arrays[1:])]  # lower bounds of the arrays
        #: Clusters that were added recently. Code that must not contain calls adds to it: `clusters.recent |= {index}`.
        self.recent: set[int] = set()
        self._remember(sum(map(len, self._arrays)))

    def __len__(self) -> int:
        self._sort_in()
        return sum(map(len, self._arrays))

    def __contains__(self, cluster: int) -> bool:
        if cluster in self.recent:
            return True
        if not self._seen[cluster & self._mask]:
            return False
        found = self._arrays[bisect_right(self._lows, cluster) - 1]
        at = bisect_left(found, cluster)
        return at < len(found) and found[at] == cluster

    def first_of(self, start: int, stop: int) -> int:
        """The lowest cluster of [start, stop) that is in the set, or -1."""
        recent = -1 if self.recent.isdisjoint(range(start, stop)) else min(self.recent.intersection(range(start, stop)))
        which = bisect_right(self._lows, start) - 1
        while which < len(self._arrays) and self._lows[which] < stop:
            at = bisect_left(self._arrays[which], start)
            if at < len(self._arrays[which]):
                found = self._arrays[which][at]
                if found < stop:
                    return found if recent < 0 else min(found, recent)
                break
            which += 1
        return recent

    def arrays(self) -> Iterator[array[int]]:
        """Arrays of all clusters, which the caller only reads; a cluster may be in two of them."""
        yield from self._arrays
        yield array("Q", self.recent)

    def add(self, first: int, count: int = 1) -> None:
        """Add `count` consecutive clusters from `first` on."""
        self.recent.update(range(first, first + count))
        if len(self.recent) > _RECENT:
            self._sort_in()

    def discard(self, cluster: int) -> None:
        """Remove this cluster if it is in the set."""
        if cluster in self.recent:
            self.recent -= {cluster}
        if self._seen[cluster & self._mask]:
            found = self._arrays[bisect_right(self._lows, cluster) - 1]
            at = bisect_left(found, cluster)
            if at < len(found) and found[at] == cluster:
                del found[at]

    def _sort_in(self) -> None:
        """Move the recent clusters to the arrays. During the move a cluster is in both, which is harmless."""
        for cluster in self.recent:
            which = bisect_right(self._lows, cluster) - 1
            found = self._arrays[which]
            at = bisect_left(found, cluster)
            if at == len(found) or found[at] != cluster:
                found.insert(at, cluster)
            if len(found) > _LONGEST:
                self._divide(which)
        count = sum(map(len, self._arrays))
        if count > len(self._seen):
            self._remember(count)
        seen, mask = self._seen, self._mask
        for cluster in self.recent:
            seen[cluster & mask] = 1
        self.recent = set()

    def _divide(self, which: int) -> None:
        whole = self._arrays[which]
        half = len(whole) // 2
        arrays = [*self._arrays[:which], whole[:half], whole[half:], *self._arrays[which + 1 :]]
        lows = [*self._lows[: which + 1], whole[half], *self._lows[which + 1 :]]
        self._arrays, self._lows = arrays, lows

    def _remember(self, count: int) -> None:
        """Build the filter again, with at least two bytes per cluster. If the byte for the low bits of a cluster is 0, the
        cluster is not in the arrays. (Discarded clusters leave their bytes behind.)"""
        size = 1 << max(2 * count - 1, 1023).bit_length()
        seen, mask = bytearray(size), size - 1
        for found in self._arrays:
            for cluster in found:
                seen[cluster & mask] = 1
        self._seen, self._mask = seen, mask


def sorted_arrays(batches: Iterable[Collection[int]], *, repeated: bool = False) -> list[array[int]]:
    """The clusters of all batches in sorted arrays of moderate length, for `merge`. `repeated`: the batches may contain
    duplicates; each array contains a cluster once."""
    found: list[array[int]] = []
    waiting: list[int] = []
    for batch in batches:
        waiting += batch
        if len(waiting) >= _BATCH:
            found.append(_sorted(waiting, repeated))
            waiting = []
    if waiting:
        found.append(_sorted(waiting, repeated))
    return found


def _sorted(clusters: list[int], repeated: bool) -> array[int]:
    return array("Q", sorted(set(clusters) if repeated else clusters))


def merge(arrays: list[array[int]], *, repeated: bool = False) -> list[array[int]]:
    """The contents of these sorted arrays as sorted arrays that follow one another; the given arrays are emptied. Duplicates
    raise ValueError, or are dropped if `repeated`. The function needs little more memory than its result."""
    merged: list[array[int]] = []
    while arrays := [one for one in arrays if one]:
        # From the end, since removing the end of an array costs nothing: all elements from `bound` on.
        step = max(_LONGEST // len(arrays), 1)
        bound = max(one[max(len(one) - step, 0)] for one in arrays)
        taken: list[int] = []
        for one in arrays:
            at = bisect_left(one, bound)
            taken += one[at:]
            del one[at:]
        taken.sort()
        if any(map(eq, taken, islice(taken, 1, None))):
            if not repeated:
                raise ValueError("a cluster is named twice")
            taken = sorted(set(taken))
        merged.append(array("Q", taken))
    merged.reverse()
    return merged


def join(arrays: list[array[int]]) -> array[int]:
    """The concatenation of these arrays; the list is emptied."""
    whole = array("Q")
    arrays.reverse()
    while arrays:
        whole.extend(arrays.pop())
    return whole
