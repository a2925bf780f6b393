"""Moves data and L2 tables from the end of the file into free clusters before them, so that the file can be cut off behind.

A move is an allocation, a copy, and a change of one entry, in the order of `Tables.flush`: the copy and its count are on
stable storage before the entry points to it, and the old cluster is freed after that. After a power cut, or an exception at
any point, the entry points to one of two clusters with the same bytes, and at worst the other one is leaked.

What stays: clusters that snapshots use, compressed data, bitmaps, and the data of a LUKS image, whose encryption depends on
the place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...node import MAY_UNMAP
from ...numeric import np
from ...zeros import stored_parts
from . import layout as q
from .l2_entry import compressed_mask, copied_mask, offsets_of, own_cluster
from .mapping import Table

if TYPE_CHECKING:
    from .tables import Tables

#: The most bytes that one copy, and one step, move.
_COPY = 1 << 20
#: The usual block size of file systems, which make no smaller holes.
_BLOCK = 4096
STEP = 64 << 20


class Packing:
    """The moves in one image. Its tables are locked for each call; all changes are on stable storage when it begins, and no
    other request runs meanwhile."""

    def __init__(self, tables: Tables, *, moves_data: bool) -> None:
        """`moves_data`: the data of the disk lies in clusters of this file, and may lie in any."""
        self._tables, self._moves_data = tables, moves_data
        self._bits = tables.cluster_bits
        tables.refcounts.scan()  # a cluster that is counted as free may be in use all the same
        #: What lies from here on is moved.
        self._end = self._shortest() << self._bits
        #: The L1 indexes from here on were not looked at.
        self._which = 0
        self.done = False

    def _shortest(self) -> int:
        """The clusters that the file must have at least: as many as are in use, and those that are not moved."""
        tables, counts = self._tables, self._tables.refcounts
        clusters = counts.last_used() + 1
        stays = np.zeros(clusters, np.bool_)
        for which in filter(counts.has_block, range(-(-clusters // counts.per_block))):
            begin = which * counts.per_block
            stays[begin : begin + counts.per_block] = counts.column(which)[: clusters - begin] != 0
        used = int(np.count_nonzero(stays))
        if used == clusters or not tables.file.node.growable:
            return clusters
        # `trim` moves refcount blocks and their table.
        blocks = [(entry & q.REFBLOCK_MASK) >> self._bits for entry in counts.table if entry & q.REFBLOCK_MASK]
        first = tables.header.refcount_table_offset >> self._bits
        for found in (blocks, range(first, first + tables.header.refcount_table_clusters)):
            stays[[cluster for cluster in found if cluster < clusters]] = False
        for _, table in self._own_tables(0):
            stays[table.offset >> self._bits] = False
            hosts = self._hosts(table) >> np.uint64(self._bits)
            stays[hosts[hosts < clusters]] = False
        fixed = np.flatnonzero(stays)
        return max(used, int(fixed[-1]) + 1 if len(fixed) else 0)

    def _own_tables(self, first: int) -> Iterator[tuple[int, Table]]:
        """(L1 index, table) of the L2 tables from `first` on that only the disk of now uses."""
        mappings = self._tables.mappings
        for which in range(first, len(mappings.l1)):
            table = mappings.table(which) if mappings.l1.l2_offset(which) else None
            if table is not None and table.own:
                yield which, table

    def _hosts(self, table: Table) -> Any:
        """The offset of the cluster of each entry that may be moved (uint64); 0: none."""
        layout = self._tables.mappings.layout
        words = layout.column(table.entries)[:: 1 << layout.entry_bits - 3]
        if not self._moves_data:
            return np.zeros_like(words)
        return np.where(copied_mask(words) & ~compressed_mask(words), offsets_of(words), np.uint64(0))

    def step(self) -> int:
        """Move up to about `STEP` bytes, and return how many. `done`: there is no more to move."""
        moved = 0
        for which, table in self._own_tables(self._which):
            self._which = which
            moved += self._move_table(which, table)
            hosts = self._hosts(table)
            indexes = np.flatnonzero(hosts >= np.uint64(self._end))
            for index, host, clusters in _runs(indexes.tolist(), hosts[indexes].tolist(), self._bits):
                done = 0
                while done < clusters:
                    done += self._move_data(which, index + done, host + (done << self._bits), clusters - done)
                    if self.done or moved + (done << self._bits) >= STEP:
                        return moved + (done << self._bits)  # the next step looks at the rest of this table
                moved += done << self._bits
        self.done = True
        return moved

    def _move_table(self, which: int, table: Table) -> int:
        tables = self._tables
        if table.offset < self._end:
            return 0
        tables.mappings.l1.ensure_stored(tables.file, which)
        offset = tables.allocate_metadata(tables.cluster_size)
        if offset > table.offset:
            tables.refcounts.lower(offset)
            return 0
        tables.mappings.link_table(which, Table(offset, table.entries[:], new=True))
        tables.freeing.add(table.offset)
        return tables.cluster_size

    def _move_data(self, which: int, index: int, host: int, clusters: int) -> int:
        """Move the data of these entries, which lies in consecutive clusters from `host` on, or of the first of them. The
        number of clusters that were moved."""
        tables, counts = self._tables, self._tables.refcounts
        entries = tables.own_table(which).entries
        place, clusters, _ = counts.allocate(clusters)
        if place > host:
            counts.lower(place, clusters)
            self.done = True  # there is no free cluster before it
            return 0
        try:
            self._copy(host, place, clusters << self._bits)
        except BaseException:
            counts.lower(place, clusters)
            raise
        for at in range(clusters):
            entry = entries[index + at]
            old = host + (at << self._bits)
            assert own_cluster(entry) == old, "no request runs meanwhile"
            tables.replace_entry(which, index + at, entry - old + place + (at << self._bits))
        tables.relieve()
        return clusters

    def _copy(self, source: int, target: int, length: int) -> None:
        file = self._tables.file
        data = memoryview(bytearray(length))
        file.read_into(
            source, data[: max(min(length, file.node.size - source), 0)]
        )  # the file may end inside a cluster
        end = 0
        for start, stop in [*stored_parts(data, target, _BLOCK, _BLOCK), (length, length)]:
            if end < start:
                file.zero(target + end, start - end, MAY_UNMAP)  # a hole stays one
            file.write(target + start, data[start:stop])
            end = stop


def _runs(indexes: list[int], hosts: list[int], bits: int) -> Iterator[tuple[int, int, int]]:
    """(index, host offset, clusters) of the runs in which both are consecutive, of at most `_COPY` bytes."""
    most = max(_COPY >> bits, 1)
    begin = 0
    for at in range(1, len(indexes) + 1):
        count = at - begin
        if (
            at == len(indexes)
            or count == most
            or indexes[at] != indexes[begin] + count
            or hosts[at] != hosts[begin] + (count << bits)
        ):
            yield indexes[begin], hosts[begin], count
            begin = at
