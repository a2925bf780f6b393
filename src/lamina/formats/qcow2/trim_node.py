"""The part of the node that gives back storage which is not needed; mixed into the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import ENOSPC
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import BlockIOError, LimitExceeded
from ...format_node import FormatNode, To
from ...limits import MAX_SIZE
from ...node import MAY_UNMAP, require_writable
from . import layout as q
from .l2_entry import own_cluster

if TYPE_CHECKING:
    from .bitmaps import Bitmaps
    from .header import Header
    from .packing import Packing
    from .refcounts import Refcounts
    from .tables import Tables

#: Bytes by which the file must be too long before refcount blocks are moved for it.
_WORTH = 4 << 20


class Trimmable(FormatNode):
    """A format node whose file becomes smaller where clusters are free, or need not be stored."""

    header: Header
    tables: Tables
    keeps_clusters: bool
    _recording: Bitmaps | None

    def free_zeros(self, offset: int, length: int) -> int:
        require_writable(self, "zero")
        recording = self._recording
        # With snapshots, only clusters that no snapshot uses as well: for the others there is nothing to gain.
        shared = self.header.nb_snapshots > 0
        with self.tables.lock:
            self.tables.require_outside_changes()
            ranges = list(self._own_clusters(offset, length)) if shared else [(offset, length)]
        # Without an entry there need not be a table either. (A data file keeps the bytes of a cluster without an entry.)
        entries = self.backed or self.keeps_clusters or self.header.external_data
        try:
            self._recording = None  # the bytes do not change
            for start, size in ranges:
                if entries:
                    self.zero(start, size, MAY_UNMAP)
                else:
                    self.drop(start, size, To.BELOW)
        finally:
            self._recording = recording
        return sum(size for _, size in ranges)

    def _own_clusters(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The clusters of this range that only the disk of now uses, in L2 tables of which that holds too."""
        mappings, bits = self.tables.mappings, self.tables.cluster_bits
        per_table, size = mappings.per_table, 1 << bits
        for at in range(offset, offset + length, size):
            which, index = divmod(at >> bits, per_table)
            table = mappings.table(which)
            if table is not None and table.own and own_cluster(table.entries[index]):
                yield at, min(size, offset + length - at)

    def pack(self) -> Iterator[int]:
        require_writable(self, "trim")
        packing = self.ranges.exclusive(0, MAX_SIZE, self._packing)
        while not packing.done:
            yield self.ranges.exclusive(0, MAX_SIZE, self._pack, packing)

    def _packing(self) -> Packing:
        from .packing import Packing

        self.flush()
        self.tables.settle()
        if not self.header.external_data:
            self.tables.changing(self._unlink_empty)
            self.tables.settle()
        moves_data = not self.header.external_data and self.header.crypt_method != 2
        packing: Packing = self.tables.changing(partial(Packing, moves_data=moves_data), self.tables)
        return packing

    def _pack(self, packing: Packing) -> int:
        moved: int = self.tables.changing(packing.step)
        self.flush()
        self.tables.settle()
        return moved

    def trim(self) -> None:
        require_writable(self, "trim")
        self.ranges.exclusive(0, MAX_SIZE, self._trim)

    def _trim(self) -> None:
        self.flush()
        self.tables.settle()
        if not self.header.external_data:
            self.tables.changing(self._unlink_empty)
        self.shrink_file(thoroughly=True)
        self.tables.changing(self._discard_free)
        self.tables.file.flush()  # before a cluster is used again: a discard that is late would destroy it

    def _unlink_empty(self) -> None:
        """Give up the L2 tables that only the disk of now uses, and that have no entry. All changes are on stable storage."""
        tables = self.tables
        mappings = tables.mappings
        for which in range(min(self.header.l1_entries(self.size), len(mappings.l1))):
            table = mappings.table(which) if mappings.l1.l2_offset(which) else None
            if table is not None and table.own and not any(table.entries):
                tables.unlink([which])

    def _discard_free(self) -> None:
        """Make holes of all clusters whose count is 0. All counts are on stable storage."""
        tables = self.tables
        counts, file, bits = tables.refcounts, tables.file, tables.cluster_bits
        counts.scan()  # a cluster that is counted as free may be in use all the same
        tables.given_back += 1  # before the file gets a hole
        size = file.size
        for first, last in _free_runs(counts, -(-size >> bits)):
            file.discard(first << bits, min(last << bits, size) - (first << bits))

    def shrink_file(self, *, thoroughly: bool = False) -> None:
        """Cut off what lies behind the last cluster in use. Refcount blocks that count little but themselves lie all over the
        file: they are written anew, near its beginning, where that makes it much shorter; `thoroughly`: wherever one of
        them is the last cluster, and could lie further ahead."""
        tables = self.tables
        tables.settle()
        tables.changing(tables.unlink_behind, self.size)
        tables.settle()
        tables.file.flush()
        tables.changing(tables.trim)
        worth = tables.file.size > 2 * self.size + _WORTH or (thoroughly and self._counts_end_the_file())
        if self.header.version >= 3 and tables.file.node.growable and worth:
            from .refcount_width import set_width

            try:
                self._rewritten(set_width, self.header.refcount_bits)
            except LimitExceeded:
                pass  # the counts of all clusters take more memory than the budget has
            except BlockIOError as error:
                if error.errno != ENOSPC:
                    raise
            tables.changing(tables.trim)
        tables.file.flush()

    def _counts_end_the_file(self) -> bool:
        """Whether the last cluster in use is a refcount block, and all of them fit into free space before it."""
        counts, bits = self.tables.refcounts, self.tables.cluster_bits
        blocks = [(entry & q.REFBLOCK_MASK) >> bits for entry in counts.table if entry & q.REFBLOCK_MASK]
        last = counts.last_used()
        needed = len(blocks) + self.header.refcount_table_clusters
        return last in blocks and sum(stop - start for start, stop in _free_runs(counts, last)) > needed

    @property
    def backed(self) -> bool:
        """Whether a cluster without an entry shows a backing file; see `Amendable`."""
        raise NotImplementedError

    def _rewritten(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `Rewrite` says; see the driver."""
        raise NotImplementedError


def _free_runs(counts: Refcounts, clusters: int) -> Iterator[tuple[int, int]]:
    """The runs (first, last + 1) of the first `clusters` clusters whose count is 0."""
    from ...numeric import np

    begin = 0
    for which in filter(counts.has_block, range(min(len(counts.table), -(-clusters // counts.per_block)))):
        used = counts.column(which) != 0
        edges = np.flatnonzero(np.diff(used, prepend=False, append=False)) + which * counts.per_block
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if begin < min(first, clusters):
                yield begin, min(first, clusters)
            begin = last
    if begin < clusters:
        yield begin, clusters
