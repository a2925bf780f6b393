"""Cluster mapping: the L1 and L2 tables of an image.

Tables are cached and changed in memory. The owner of the tables decides when they are written (see `Tables.flush`):

1. `write_tables`: whole new L2 tables, to which nothing on disk points yet;
2. `write_links`, after a flush: changed entries of older tables, and the L1 entries of the new tables.

Storage for a new table is written before the table is used, and a table in a hole of the file is written once before its
first change. A flush therefore writes only to storage that the file system has already allocated (see `refcounts`).

`map` looks up a small range in plain Python, `map_columns` a large one in numpy; both decode the same entries.
"""

from __future__ import annotations

import sys
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from ...block_runs import BlockRuns
from ...errors import CorruptImage
from ...format_node import Mapping
from ...limits import align_down, align_up
from ...status import DATA
from .holes import has_hole
from .l1_table import L1Table, own_entry
from .l2_entry import InvalidEntry, L2Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...format_node import Columns
    from ...request import Child
    from .header import Header

_SWAP = sys.byteorder == "little"
#: Bytes of L2 tables that `map_columns` reads in one batch. Columns of more fit into no CPU cache.
_BATCH = 1 << 19
#: The table size from which on a query for a hole in the file pays off.
_LARGE = 256 << 10
#: L1 entries that it reads in one batch.
_L1_BATCH = 1 << 16
#: The most batches, and runs of missing tables, in one result: half a second of work.
_STEPS = 1 << 9


def layout_of(header: Header) -> L2Layout:
    """The layout of the L2 entries of the image with this header."""
    if header.external_data:
        from .l2_external import ExternalExtendedL2Layout, ExternalL2Layout

        return (ExternalExtendedL2Layout if header.extended_l2 else ExternalL2Layout)(header.cluster_bits)
    if header.extended_l2:
        from .l2_extended import ExtendedL2Layout

        return ExtendedL2Layout(header.cluster_bits)
    return L2Layout(header.cluster_bits)


class Table:
    """One L2 table: its entries, its offset in the file, and the part that is not on disk."""

    __slots__ = ("entries", "high", "low", "new", "offset", "own", "stored")

    def __init__(self, offset: int, entries: Any, *, new: bool = False, own: bool = True) -> None:
        self.offset = offset
        self.entries = entries
        self.new = new  # nothing on disk points to it
        self.own = own  # its reference count is one: it may be changed in place
        self.stored = new  # the file is known to have storage for all of it
        self.low, self.high = len(entries), 0  # the entries that are not on disk yet


class Mappings:
    """The L1 table and the L2 tables of one image. Not thread-safe: the driver holds its lock around every call."""

    def __init__(
        self, file: Child, header: Header, cache_bytes: int, *, writable: bool = True, data: Child | None = None
    ) -> None:
        """`data`: the edge to the external data file, if the image has one."""
        self._file = file
        self._data = file if data is None else data
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self.layout = layout_of(header)
        self.per_table = self.layout.per_table
        self._table_bits = self.layout.index_bits
        #: A unit of the status is 1 << `_unit_bits` bytes, and a table describes 1 << `_units_bits` units.
        self._unit_bits = header.cluster_bits - self.layout.units_bits
        self._units_bits = self.layout.index_bits + self.layout.units_bits
        self._map_entry = self.layout.map_one  # called for every read
        self._writable = writable
        self._blank: Any = None
        self._max_tables = max(cache_bytes >> header.cluster_bits, 4)
        self._tables: dict[int, Table] = {}  # by L1 index, the first loaded first
        self._dirty: set[int] = set()  # L1 indexes of tables that are not wholly on disk
        #: The active L1 table. A resize replaces it, which takes effect at the next flush.
        self.l1 = L1Table.load(file, header.l1_table_offset, header.l1_size)

    @property
    def dirty(self) -> bool:
        return bool(self._dirty or self.l1.changed or not self.l1.published)

    @property
    def pressure(self) -> bool:
        """Whether so many changed tables are in memory that they should be written."""
        return len(self._dirty) > self._max_tables // 2

    # -- reading

    def map_one(self, offset: int, length: int) -> Mapping | None:
        """The mapping of a range inside one uncompressed cluster whose L2 table is cached; else None. Needs no lock: it reads
        one table and one entry once, and the range lock of the request excludes changes of this cluster. It saves 0.5 us of
        a small read."""
        within = offset & self._cluster_size - 1
        if within + length > self._cluster_size:
            return None
        cluster = offset >> self._cluster_bits
        table = self._tables.get(cluster >> self._table_bits)
        if table is None:
            return None
        return self._map_entry(table.entries[cluster & self.per_table - 1], within, length, self._data)

    def map(self, offset: int, length: int) -> Mapping:
        """As `FormatNode.map`. The token of a compressed cluster is its L2 entry."""
        bits, table_bits = self._unit_bits, self._units_bits
        unit = offset >> bits
        within = offset & (1 << bits) - 1
        last = offset + length - 1 >> bits  # the last unit of the request
        which = unit >> table_bits
        table = self.table(which)
        if table is None:
            while which < last >> table_bits and not self.l1.l2_offset(which + 1):
                which += 1
            run = (which + 1 << table_bits + bits) - offset
            return Mapping(0, min(run, length))
        base = which << table_bits
        try:
            flags, host, units, entry = self.layout.run(
                table.entries, unit - base, min(1 << table_bits, last + 1 - base)
            )
        except InvalidEntry as error:
            raise self._corrupt(error, table.offset) from error
        run = min((units << bits) - within, length)
        if host >= 0:
            return Mapping(flags, run, host + within, self._data)
        if flags & DATA:
            return Mapping(flags, run, -1, self._data, entry)
        return Mapping(flags, run)

    def map_columns(self, offset: int, length: int) -> Columns:
        """As `FormatNode.map_columns`. The result also ends early, at a cluster boundary, after many batches: the contents of
        the tables do not affect the maximum of memory and time."""
        bits, table_bits = self._unit_bits, self._units_bits
        first, last = offset >> bits, offset + length - 1 >> bits
        runs = BlockRuns(self._data, bits, offset, length)
        for which, count, there in islice(self._l1_runs(first >> table_bits, last >> table_bits), _STEPS):
            base = which << table_bits
            # Only the units of the request: entries past the end of the disk have no meaning.
            low, high = max(first - base, 0), min(last + 1 - base, count << table_bits)
            if there:
                try:
                    runs.add_runs(*self.layout.runs(self._batch(which, count), low, high), high - low)
                except InvalidEntry as error:
                    raise self._corrupt(error) from error
            else:
                runs.add_alike(high - low)
            if runs.full:
                break
        return runs.columns()

    def _l1_runs(self, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
        """(L1 index, count, whether the L2 tables exist) of runs of L1 entries from `first` to `last`: runs of missing
        tables, and runs of existing tables that `_batch` reads at once."""
        if first == last:
            yield first, 1, bool(self.l1.l2_offset(first))
            return
        from ...numeric import np

        step = max(_BATCH >> self._cluster_bits, 1)
        for begin in range(first, last + 1, _L1_BATCH):
            there = self.l1.existing(begin, min(_L1_BATCH, last + 1 - begin))
            edges = np.flatnonzero(there[1:] != there[:-1]) + 1
            for lo, hi in pairwise([0, *edges.tolist(), len(there)]):
                if there[lo]:
                    yield from ((begin + at, min(step, hi - at), True) for at in range(lo, hi, step))
                else:
                    yield begin + lo, hi - lo, False

    def _batch(self, which: int, count: int) -> Any:
        """The entries of `count` consecutive L2 tables, all of which exist, as one column, which the caller only reads."""
        from ...numeric import np

        table = self._tables.get(which)
        if table is not None and count == 1:
            return self.layout.column(table.entries)
        size, end = self._cluster_size, align_up(self._file.node.size, self._cluster_size)
        raw = np.empty((count, size // 8), np.uint64)
        view = raw.view(np.uint8).reshape(-1).data
        offsets = self.l1.l2_offsets(which, count)
        loaded: list[tuple[int, int]] = []
        at = 0
        while at < count:
            table = self._tables.get(which + at)
            if table is not None:
                column = self.layout.column(table.entries)
                raw[at] = column.byteswap() if _SWAP else column
                at += 1
                continue
            offset = offsets[at]
            if offset & size - 1 or offset + size > end:
                self._table_offset(which + at)
            # Adjacent tables are read in one request.
            stop = at + 1
            while (
                stop < count
                and offsets[stop] == offset + (stop - at) * size
                and which + stop not in self._tables
                and offsets[stop] + size <= end
            ):
                stop += 1
            self._file.tell("l2_load")
            self._file.read_into(offset, view[at * size : stop * size])
            loaded.append((at, stop))
            at = stop
        if _SWAP:
            raw.byteswap(inplace=True)
        for at, stop in loaded if self.layout.external else ():
            self.layout.adopt(raw[at:stop].reshape(-1), which + at << self._table_bits, strict=False)
        return raw.reshape(-1)

    def table(self, which: int) -> Table | None:
        """The L2 table to which this L1 entry points; None if there is none."""
        table = self._tables.get(which)
        if table is not None:
            return table
        if not self.l1.l2_offset(which):
            return None
        self._file.tell("l2_load")
        offset = self._table_offset(which)
        if self._cluster_size >= _LARGE and not self._writable and self._file.reads_zero(offset, self._cluster_size):
            # All tables in holes of a read-only image share one array of zeros.
            self._blank = self._blank or self.layout.blank()
            entries = self._blank
        else:
            entries = self.layout.load(self._file, offset)
            if self.layout.external:
                try:
                    self.layout.adopt(self.layout.column(entries), which << self._table_bits, strict=self._writable)
                except InvalidEntry as error:
                    raise self._corrupt(error, offset) from error
        table = Table(offset, entries, own=self.l1.owns(which))
        self._keep(which, table)
        return table

    def _table_offset(self, which: int) -> int:
        """The offset of an existing L2 table. Raises CorruptImage if it is misaligned or outside the file."""
        offset = self.l1.l2_offset(which)
        if offset & self._cluster_size - 1 or offset + self._cluster_size > align_up(
            self._file.node.size, self._cluster_size
        ):
            raise CorruptImage(
                f"the offset {offset:#x} of L2 table {which} is misaligned or outside the file",
                path=self._file.node.filename,
                offset=self.l1.offset + 8 * which,
                hint="check the image",
            )
        return offset

    def _corrupt(self, error: InvalidEntry, offset: int | None = None) -> CorruptImage:
        """The error for an invalid entry of the L2 table at `offset`; None: the table is not known."""
        return CorruptImage(str(error), path=self._file.node.filename, offset=offset, hint="check the image")

    def changed_tables(self) -> dict[int, Any]:
        """The tables that are not wholly on disk: their entries, as columns that the caller only reads, by offset."""
        tables = [self._tables[which] for which in self._dirty]
        return {table.offset: self.layout.column(table.entries) for table in tables}

    # -- changes: an exception may interrupt a method at any call, so related statements contain no calls

    def ensure_stored(self, table: Table) -> None:
        """Make sure that the file has storage for this table, so that writing it cannot fail with ENOSPC."""
        if not table.stored:
            raw = self.layout.to_disk(table.entries)
            if has_hole(self._file, table.offset, raw):
                self._file.write(table.offset, memoryview(raw))
            table.stored = True

    def link_table(self, which: int, table: Table) -> None:
        """Make this L1 entry point to `table`, which is new."""
        entry = own_entry(table.offset)
        self._tables[which] = table
        self._dirty |= {which}
        self.l1.changed |= {which}
        self.l1.entries[which] = entry
        self._evict()

    def unlink_table(self, which: int) -> int:
        """From now on this L1 entry points to no table. Returns the offset of the table, which was not changed since it was
        written; 0: there was none."""
        offset = self.l1.l2_offset(which)
        self._tables.pop(which, None)  # first: no table is kept of an entry without one
        self.l1.changed |= {which}
        self.l1.entries[which] = 0
        return offset

    def set(self, which: int, index: int, entry: int) -> None:
        """Change one entry of a cached table."""
        table = self._tables[which]
        self._dirty |= {which}
        if index < table.low:
            table.low = index
        if index >= table.high:
            table.high = index + 1
        table.entries[index] = entry

    def put(self, which: int, index: int, entries: Any) -> None:
        """Change consecutive entries of a cached table. `entries`: as the layout makes them."""
        table = self._tables[which]
        stop = index + len(entries)
        self._dirty |= {which}
        if index < table.low:
            table.low = index
        if stop > table.high:
            table.high = stop
        table.entries[index:stop] = entries

    # -- writes, in the order of `Tables.flush`

    def write_tables(self) -> None:
        """Write what nothing on disk points to yet: new L2 tables, and a new L1 table."""
        for which in sorted(self._dirty):
            table = self._tables[which]
            if table.new:
                self._file.tell("l2_alloc_write")
                self._file.write(table.offset, memoryview(self.layout.to_disk(table.entries)))
        if self.l1.new:
            self._file.tell("l1_grow_write_table")
            self.l1.write(self._file)

    def write_links(self) -> None:
        """Write changed entries of older L2 tables, then L1 entries. Everything to which they point is durable. If this, or
        the flush after it, fails, new tables count as published: from then on only this method writes them."""
        for which in sorted(self._dirty):
            table = self._tables[which]
            if not table.new and table.low < table.high:
                # Whole sectors, which disks write atomically.
                step = self.layout.per_sector
                low, high = align_down(table.low, step), min(align_up(table.high, step), self.per_table)
                self._file.tell("l2_update")
                raw = self.layout.to_disk(table.entries[low:high])
                self._file.write(table.offset + (low << self.layout.entry_bits), memoryview(raw))
        for which in self._dirty:
            table = self._tables[which]
            if table.new:
                table.new, table.low, table.high = False, self.per_table, 0
        if self.l1.new:
            self.l1.new = False
            self.l1.changed.clear()
        else:
            self.l1.write_changed(self._file)

    def written(self) -> None:
        """Called when everything is on disk."""
        for which in self._dirty:
            table = self._tables[which]
            table.low, table.high = self.per_table, 0
        self._dirty.clear()
        self.l1.changed.clear()
        self.l1.published = True
        self._evict()

    def _keep(self, which: int, table: Table) -> None:
        self._tables[which] = table
        if len(self._tables) > self._max_tables:
            self._evict(which)

    def _evict(self, but: int = -1) -> None:
        """Evict the oldest clean tables if there are too many. Changed tables stay until they are written, and the table
        `but` stays since the caller is about to change it."""
        surplus = len(self._tables) - self._max_tables
        if surplus > 0:
            clean = [which for which in self._tables if which not in self._dirty and which != but]
            for which in clean[: surplus + self._max_tables // 8]:
                del self._tables[which]
