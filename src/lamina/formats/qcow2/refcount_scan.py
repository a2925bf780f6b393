"""The scan of all references to clusters, before clusters of the file become free again.

An image from another program, or after a fault of its storage, may count too few references to a cluster. A write that took
such a cluster for free would destroy guest data, and so would a discard of a cluster to which something else still refers.
Therefore none of the clusters that the file had when it was opened is allocated, discarded, counted as free or cut off until
one scan of the L2 tables, those of snapshots included, has shown that no cluster has more references than its count says.
From then on the counts are right, since all changes keep them so.

Opening an image reads no L2 table, and neither does a write to new clusters: the scan runs when it is needed. Allocation can
put it off, and takes clusters past the old end of the file until these are many more bytes than the scan reads.

The scan changes nothing. Its memory does not depend on the size of the image: references to a window of clusters are counted,
and an image with more clusters is scanned once for each window.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import ref

from ...errors import CorruptImage, LimitExceeded
from ...limits import MIB
from .holes import stored_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .refcounts import Refcounts
    from .tables import Tables

#: An image with no more bytes of L2 tables is scanned at once: 50 ms. (A TiB in clusters of 64 KiB, with 128 MiB: 0.6 s.)
_SMALL = 8 * MIB
#: Of a larger image so many times the bytes of its L2 tables are allocated past the end of its file before the scan.
_TIMES = 16
#: The memory for the counts of a window, and the least where the budget has not so much left.
_WINDOW, _LEAST = 64 * MIB, 1 * MIB
#: Batches of L2 tables that the columns made from one take, or fewer where the tables are few.
_COLUMNS = 6
#: Clusters of a run that are looked at in one go.
_STEP = 1 << 18


class RefcountScan:
    """The scan of the image of `tables`, whose lock is held."""

    def __init__(self, tables: Tables, book: Callable[[int], None]) -> None:
        """`book` is called with the bytes of memory that the scan takes, before they are allocated, and with their negative
        when it ends."""
        # Weak, so that nothing keeps tables, and the edge to their file, that are no longer used.
        self._owner, self._book = ref(tables), book
        #: The clusters that the file had when the image was opened are those below this index; 0 after the scan.
        self.below = -(-tables.file.node.size >> tables.cluster_bits)
        #: Allocation past the end of the file failed.
        self.urgent = False
        self._cost = -1

    @property
    def _tables(self) -> Tables:
        tables = self._owner()
        assert tables is not None, "only its tables call the scan"
        return tables

    def due(self, appended: int) -> bool:
        """Whether the next allocation is to reuse clusters of the file, after `appended` new bytes."""
        if self._cost < 0:
            self._cost = len(self._l2_tables()[0]) << self._tables.cluster_bits
        growable = self._tables.file.node.growable
        return self.urgent or not growable or self._cost <= _SMALL or appended >= _TIMES * self._cost

    def run(self, counts: Refcounts) -> None:
        """Compare `counts`, those of the image, with its references, unless that was done. CorruptImage if a cluster has more
        references than its count says, or a structure of the image is counted as free."""
        if not self.below:
            return
        from .l2_batches import BATCH

        tables = self._tables
        offsets, times = self._l2_tables()
        end = -(-tables.file.node.size >> tables.cluster_bits)
        bits = tables.header.refcount_bits
        width = 1 if bits <= 8 else 2 if bits == 16 else 4
        window, batch = min(max(end, 1), _WINDOW // width), min(len(offsets) << tables.cluster_bits, BATCH)
        while True:
            booked = window * width + batch * _COLUMNS + 16 * len(offsets)
            try:
                self._book(booked)
                break
            except LimitExceeded:
                if window * width <= _LEAST:
                    raise
            window, batch = -(-window // 2), max(-(-batch // 2), tables.cluster_size)
        try:
            for low in range(0, end, window):
                _Window(tables, counts, low, min(low + window, end), end, width).compare(offsets, times, batch)
        finally:
            self._book(-booked)
        self.below = 0

    def _l2_tables(self) -> tuple[Any, Any]:
        """The clusters of all L2 tables (int64), in order, and how many entries of L1 tables point to each."""
        from ...numeric import np

        found = np.fromiter(chain.from_iterable(self._tables.l2_clusters()), np.int64)
        return np.unique(found, return_counts=True)


class _Window:
    """The references to the clusters of a window, against their counts."""

    def __init__(self, tables: Tables, counts: Refcounts, low: int, high: int, end: int, width: int) -> None:
        self._tables, self._counts = tables, counts
        self._bits, self._layout = tables.cluster_bits, tables.mappings.layout
        self._low, self._high, self._end = low, high, end
        self._left = self._load(width)

    def _load(self, width: int) -> Any:
        """The counts of the window. Those that need more than `width` bytes are more than an image has references."""
        from ...numeric import np

        low, high, per_block = self._low, self._high, self._counts.per_block
        left: Any = np.zeros(high - low, f"u{width}")
        most = (1 << 8 * width) - 1
        for which in range(low // per_block, -(-high // per_block)):
            found = self._counts.column(which)
            if found is not None:
                begin, stop = max(which * per_block, low), min((which + 1) * per_block, high)
                part = found[begin - which * per_block : stop - which * per_block]
                left[begin - low : stop - low] = np.minimum(part, most)
        return left

    def compare(self, l2_tables: Any, times: Any, batch: int) -> None:
        """Raise CorruptImage if a cluster has more references than its count says. Of L2 tables `batch` bytes are read at a
        time, or one table."""
        from ...numeric import np

        structures = [self._inside(np.array(array, np.int64)) for array in self._counts.metadata.arrays()]
        for clusters in structures:
            wrong = np.flatnonzero(self._left[clusters - self._low] == 0)
            if len(wrong):
                self._refuse(int(clusters[wrong[0]]))
        self._take(l2_tables, times)
        for (
            offset,
            clusters,
        ) in self._tables.freeing.runs():  # no table refers to them any more, their counts say so later
            first = offset >> self._bits
            for at in range(first, first + clusters, _STEP):
                self._take(np.arange(at, min(at + _STEP, first + clusters), dtype=np.int64), 1)
        for clusters in structures:
            self._left[clusters - self._low] = 0  # no L2 entry points to a structure
        for one in np.unique(times).tolist():
            for words in self._contents(l2_tables[times == one] << self._bits, batch):
                self._take_entries(words, one)

    def _contents(self, offsets: Any, batch: int) -> Iterator[Any]:
        """The entries of the tables at these sorted offsets, as columns: as they are in memory, if they are changed there."""
        from ...numeric import np
        from .l2_batches import read_tables

        file = self._tables.file
        changed = self._tables.mappings.changed_tables()
        known = np.isin(offsets, np.array(list(changed), np.int64))
        for offset in offsets[known].tolist():
            yield changed[offset]
        rest = offsets[~known & (offsets < file.node.size)]
        rest = rest[stored_tables(file, rest, 1 << self._bits)]
        for _, words in read_tables(file, rest, self._bits, batch):
            yield words

    def _take_entries(self, words: Any, weight: int) -> None:
        from .l2_batches import host_clusters

        for clusters in host_clusters(words, self._layout, self._tables.file.node.filename):
            self._take(clusters, weight)

    def _take(self, clusters: Any, weight: Any) -> None:
        """Each of these clusters has `weight` references more, for each time that it is there."""
        from ...numeric import np

        if not len(clusters):
            return
        if int(clusters.max()) >= self._high or self._low:
            if not self._low:
                self._require_counted_behind(clusters[clusters >= self._end])
            inside = (clusters >= self._low) & (clusters < self._high)
            clusters = clusters[inside]
            weight = weight[inside] if isinstance(weight, np.ndarray) else weight
        if len(clusters) > 1 and not (clusters[1:] > clusters[:-1]).all():
            clusters, times = np.unique(clusters, return_counts=True)
            weight = times * weight
        at = clusters - self._low
        left = self._left[at]
        wrong = np.flatnonzero(left < weight)
        if len(wrong):
            self._refuse(int(clusters[wrong[0]]))
        self._left[at] = left - weight

    def _inside(self, clusters: Any) -> Any:
        return clusters[(clusters >= self._low) & (clusters < self._high)]

    def _require_counted_behind(self, clusters: Any) -> None:
        """The same for clusters past the end of the file, which allocation must not take either."""
        from ...numeric import np

        blocks = clusters // self._counts.per_block
        for which in np.unique(blocks).tolist():
            chosen = clusters[blocks == which]
            found = self._counts.column(which)
            wrong = chosen if found is None else chosen[found[chosen % self._counts.per_block] == 0]
            if len(wrong):
                self._refuse(int(wrong[0]))

    def _refuse(self, cluster: int) -> None:
        free = not self._counts.get(cluster)
        raise CorruptImage(
            "a cluster in use is counted as free" if free else "a cluster has more references than its count says",
            path=self._tables.file.node.filename,
            offset=cluster << self._bits,
            hint="check the image; no cluster was overwritten",
        )
