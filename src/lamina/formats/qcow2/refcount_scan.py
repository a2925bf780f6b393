"""The scan of all references to clusters, before clusters of the file become free again.

An image from another program, or after a fault of its storage, may count too few references to a cluster. A write that took
such a cluster for free would destroy guest data, and so would a discard of a cluster to which something else still refers.
Therefore none of the clusters that the file had when it was opened is allocated, discarded, counted as free or cut off until
one scan of the L2 tables, those of snapshots included, has shown that no cluster has more references than its count says.
From then on the counts are right, since all changes keep them so.

Opening an image reads no L2 table, and neither does a write to new clusters: the scan runs when it is needed. Allocation can
put it off, and takes clusters past the old end of the file until these are many more bytes than the scan reads.

The scan changes nothing. Its memory does not depend on the size of the image: references to the clusters of a number of
refcount blocks are counted, and an image with more blocks is scanned again for each window of so many.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import ref

from ...errors import BlockIOError, CorruptImage, LimitExceeded
from ...limits import MIB
from . import layout as q
from .holes import stored_tables
from .structures import l2_clusters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .refcounts import Refcounts
    from .tables import Tables

#: An image with no more bytes of L2 tables is scanned at once: 50 ms. (A TiB in clusters of 64 KiB, with 128 MiB: 0.6 s.)
_SMALL = 8 * MIB
#: Of a larger image so many times the bytes of its L2 tables are allocated past the end of its file before the scan.
_TIMES = 16
#: The memory for the counts of a window, and the least, which is not booked where the budget has nothing left.
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
        #: A table could not be read.
        self._unreadable = False
        self._cost = -1

    @property
    def _tables(self) -> Tables:
        tables = self._owner()
        assert tables is not None, "only its tables call the scan"
        return tables

    def due(self, appended: int) -> bool:
        """Whether the next allocation is to reuse clusters of the file, after `appended` new bytes."""
        if self._unreadable:
            return False
        if self._cost < 0:
            self._cost = len(self._l2_tables()[0]) << self._tables.cluster_bits
        if self.urgent or self._cost <= _SMALL or appended >= _TIMES * self._cost:
            return True
        return not self._tables.file.node.growable

    def attempt(self, counts: Refcounts) -> bool:
        """`run`, for a caller that can go on without: one unreadable table must not make the writes and flushes fail of all
        that others map. False, with a warning the first time, if a table cannot be read: then the clusters that the file had
        when the image was opened are neither reused nor freed until it is opened again."""
        if not self._unreadable:
            try:
                self.run(counts)
            except BlockIOError as error:
                self._unreadable = True
                file = self._tables.file.node
                file.warn(
                    "%s: no cluster is freed or reused, since not all tables can be read: %s", file.filename, error
                )
        return not self._unreadable

    def run(self, counts: Refcounts) -> None:
        """Compare `counts`, those of the image, with its references, unless that was done. CorruptImage if a cluster has more
        references than its count says, or a structure of the image is counted as free."""
        if not self.below:
            return
        from .l2_batches import BATCH

        tables = self._tables
        offsets, times = self._l2_tables()
        stored = _stored_blocks(tables, counts)
        bits = tables.header.refcount_bits
        width = 1 if bits <= 8 else 2 if bits == 16 else 4
        per_block = counts.per_block * width  # bytes of memory
        all_blocks = max(len(stored), 1)
        blocks, batch = min(all_blocks, max(_WINDOW // per_block, 1)), min(len(offsets) << tables.cluster_bits, BATCH)
        booked = 0
        try:
            while not booked:
                wanted = blocks * per_block + batch * _COLUMNS + 16 * len(offsets) + 8 * len(counts.table)
                try:
                    self._book(wanted)
                    booked = wanted
                except LimitExceeded:
                    if blocks * per_block <= max(_LEAST, per_block):
                        break  # as little as a cache takes at least; a flush must not fail for it
                    blocks, batch = -(-blocks // 2), max(-(-batch // 2), tables.cluster_size)
            for at in range(0, all_blocks, blocks):
                own = range(at, min(at + blocks, len(stored)))
                _Window(tables, counts, stored, own, width).compare(offsets, times, batch)
        finally:
            self._book(-booked)
        self.below = 0

    def _l2_tables(self) -> tuple[Any, Any]:
        """The clusters of all L2 tables (int64), in order, and how many entries of L1 tables point to each."""
        from ...numeric import np

        tables = self._tables
        clusters = l2_clusters(tables.file, tables.header, tables.mappings.l1)
        found = np.fromiter(chain.from_iterable(clusters), np.int64)
        return np.unique(found, return_counts=True)


def _stored_blocks(tables: Tables, counts: Refcounts) -> Any:
    """The indexes of the refcount blocks that are not holes of the file."""
    from ...numeric import np

    offsets = np.array(counts.table, np.uint64) & np.uint64(q.REFBLOCK_MASK)
    which = np.flatnonzero(offsets)
    which = which[np.argsort(offsets[which])]
    stored = stored_tables(tables.file, offsets[which], tables.cluster_size)
    return np.union1d(which[stored], np.array(sorted(counts.unwritten), np.int64))


class _Window:
    """The references to clusters that some refcount blocks count, against these counts."""

    def __init__(self, tables: Tables, counts: Refcounts, stored: Any, own: range, width: int) -> None:
        """`stored`: the indexes of all refcount blocks that count something; `own`: which of these are in the window. Counts
        that need more than `width` bytes are more than an image has references."""
        from ...numeric import np

        self._tables, self._counts = tables, counts
        self._bits, self._layout = tables.cluster_bits, tables.mappings.layout
        self._shift = counts.per_block.bit_length() - 1
        self._first, self._whole = own.start == 0, len(own) == len(stored)
        # Where the counts of a block are: -1 none of its clusters is counted, -2 in another window.
        self._slots: Any = np.full(len(counts.table) + 1, -1)
        self._slots[stored] = -2
        self._slots[stored[own.start : own.stop]] = np.arange(len(own))
        # The usual case, which is quick: these are all blocks, in a row from the first on.
        self._plain = self._whole and bool((stored == np.arange(len(stored))).all())
        self._blocks = stored[own.start : own.stop]
        self._left: Any = np.empty((len(own), counts.per_block), f"u{width}")
        for at, which in enumerate(self._blocks.tolist()):
            self._left[at] = np.minimum(counts.column(which), (1 << 8 * width) - 1)
        self._left = self._left.reshape(-1)

    def compare(self, l2_tables: Any, times: Any, batch: int) -> None:
        """Raise CorruptImage if a cluster has more references than its count says. Of L2 tables `batch` bytes are read at a
        time, or one table."""
        from ...numeric import np

        structures = [np.array(array, np.int64) for array in self._counts.metadata.arrays()]
        for clusters in structures:
            at, _ = self._inside(clusters, 1)
            self._require(at, self._left[at] > 0)
        self._take(l2_tables, times)
        # To these no table refers any more, and their counts say so later.
        for offset, count in self._tables.freeing.runs():
            first = offset >> self._bits
            for at in range(first, first + count, _STEP):
                self._take(np.arange(at, min(at + _STEP, first + count), dtype=np.int64), 1)
        for clusters in structures:
            self._left[self._inside(clusters, 1)[0]] = 0  # no L2 entry points to a structure
        if self._tables.external:
            return  # entries refer to another file
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

        at, weight = self._inside(clusters, weight)
        if len(at) > 1 and not (at[1:] > at[:-1]).all():
            at, times = np.unique(at, return_counts=True)
            weight = times * weight
        left = self._left[at]
        self._require(at, left >= weight)
        self._left[at] = left - weight

    def _inside(self, clusters: Any, weight: Any) -> tuple[Any, Any]:
        """Where the counts are of those of the clusters that are in this window, and their weights. CorruptImage if no block
        counts a cluster."""
        from ...numeric import np

        if self._plain and len(clusters) and int(clusters.max()) < len(self._left):
            return clusters, weight
        slots = self._slots[np.minimum(clusters >> self._shift, len(self._slots) - 1)]
        if self._first and (slots == -1).any():
            self._refuse(int(clusters[(slots == -1).argmax()]))
        if not self._whole:
            inside = slots >= 0
            clusters, slots = clusters[inside], slots[inside]
            weight = weight[inside] if isinstance(weight, np.ndarray) else weight
        return slots << self._shift | clusters & (1 << self._shift) - 1, weight

    def _require(self, at: Any, right: Any) -> None:
        """Raise CorruptImage for the first of these places in the window where `right` is false."""
        if not right.all():
            wrong = int(at[right.argmin()])
            within = wrong & (1 << self._shift) - 1
            self._refuse(int(self._blocks[wrong >> self._shift]) << self._shift | within)

    def _refuse(self, cluster: int) -> None:
        free = not self._counts.get(cluster)
        raise CorruptImage(
            "a cluster in use is counted as free" if free else "a cluster has more references than its count says",
            path=self._tables.file.node.filename,
            offset=cluster << self._bits,
            hint="check the image; no cluster was overwritten",
        )
