"""The uses of one cluster of a qcow2 image: everything that lies in it, for `explain`.

The search takes the same way as the check: from the header to the tables, and from each table to what its entries point to.
It reads through `References`, and shares with it the decoding of entries; but it remembers, of all references, only those
to one cluster, and which entry each of them is. So the memory does not depend on the size of the image, and the time is
that of one walk over its tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ...errors import LaminaError
from ...numeric import np
from ...report import UNREADABLE
from . import bitmap_directory, l1_table, l2_entry, l2_extended, snapshot_table
from . import layout as q
from .holes import stored_tables
from .mapping import layout_of
from .refcount_block import unpacked
from .references import (
    BITMAPS,
    ENCRYPTION,
    HEADER,
    L1_TABLE,
    NAMES,
    REFCOUNT_TABLE,
    SNAPSHOT_L1,
    SNAPSHOT_TABLE,
    References,
)

if TYPE_CHECKING:
    from ...request import Child
    from .header import Header

#: L1 entries in one batch.
_BATCH: Final = 1 << 18
#: The entries that point to data in one cluster that are kept. (One of 2 MiB may have 20,000 compressed clusters.)
_MOST: Final = 1 << 17
#: The L1 entries that point to one L2 table that are kept: one for each snapshot, usually.
_MOST_L1: Final = 1 << 13
#: Bytes of the snapshot table that are looked at: those of 65,536 snapshots with names of usual length.
_MOST_BYTES: Final = 16 << 20


class L1(NamedTuple):
    """An L1 table: the active one, or that of a snapshot. `entries`: their number; `snapshot`: its index, -1 for the
    active table."""

    offset: int
    entries: int
    snapshot: int


class Use(NamedTuple):
    """A structure, or data, in bytes `start` to `stop` of the file. `kind`: as in `references`. `record`: which one, where
    there are several: of a snapshot or bitmap. `what`: the part of a kind, for bitmaps."""

    kind: int
    start: int
    stop: int
    record: int = -1
    what: str = ""


class Entry(NamedTuple):
    """An entry that points to something: entry `number` of the table at `table`, with the value `entry`. An extended L2
    entry also has a `bitmap` of subclusters."""

    table: int
    number: int
    entry: int
    bitmap: int = 0


class Reader:
    """The file in `storage`, and a line for each part of it that could not be read."""

    def __init__(self, storage: Child) -> None:
        self.storage, self.size = storage, storage.node.size
        self._problems: dict[str, None] = {}

    @property
    def path(self) -> str:
        return self.storage.node.filename

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(self._problems)

    def tell(self, problem: str) -> None:
        self._problems[problem] = None

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there, fewer at the end of the file; nothing, and a problem, if they cannot be read."""
        data = bytearray(max(min(length, self.size - offset), 0))
        try:
            if data:
                self.storage.read_into(offset, memoryview(data))
        except LaminaError as error:
            self.tell(f"{length} bytes at {offset:#x} cannot be read: {error.message}")
            return b""
        return bytes(data)

    def value(self, offset: int, length: int = 8) -> int | None:
        """The number in these bytes; None if not all of them can be read."""
        raw = self.read(offset, length)
        return int.from_bytes(raw) if len(raw) == length else None


class Uses(Reader):
    """The search in the image in `storage`, whose header is usable."""

    def __init__(self, storage: Child, header: Header) -> None:
        super().__init__(storage)
        self.header = header
        self.bits, self.cluster = header.cluster_bits, header.cluster_size
        self.layout = layout_of(header)
        #: Counts in a refcount block.
        self.per_block = self.cluster * 8 // header.refcount_bits
        self.walk = References(storage, header)
        self._budget, self._misaligned = self.walk.to_walk, self.walk.misaligned
        self.snapshots: list[snapshot_table.Entry] = []
        self.bitmaps: list[bitmap_directory.Entry] = []
        #: Where the records of the snapshot table and of the bitmap directory begin, and where the last one ends.
        self.snapshot_starts = [header.snapshots_offset]
        self.bitmap_starts = [0]
        self._read_records()
        self.regions = [use for use in self._regions() if use.start < use.stop]

    @property
    def problems(self) -> tuple[str, ...]:
        self._problems |= dict.fromkeys(one.message for one in self.walk.report.findings if one.kind == UNREADABLE)
        return super().problems

    def name(self, use: Use) -> str:
        """The name of a structure."""
        return f"bitmap {use.what}" if use.what else NAMES[use.kind]

    def owner(self, use: Use) -> str | None:
        """Whose structure it is, if there are several of its kind."""
        if use.record < 0:
            return None
        return self.bitmap(use.record) if use.kind == BITMAPS else self.snapshot(use.record)

    def snapshot(self, index: int) -> str | None:
        """The snapshot with this index in words; None for -1, the active disk."""
        return None if index < 0 else f"snapshot {self.snapshots[index].id}"

    def bitmap(self, number: int) -> str:
        return f"bitmap {self.bitmaps[number].name}"

    def refcount(self, cluster: int) -> int | None:
        """How many references to the cluster the image counts; None if that cannot be read."""
        header = self.header
        if header.lost_refcounts is not None:
            return None
        index, at = divmod(cluster, self.per_block)
        if index >= (header.refcount_table_clusters << self.bits) // 8:
            return 0
        entry = self.value(header.refcount_table_offset + 8 * index)
        if entry is None:
            return None
        block = entry & q.REFBLOCK_MASK
        if block % self.cluster:
            return None
        counts = self.counts(block, at, 1) if block else [0]
        return counts[0] if counts else None

    def counts(self, block: int, first: int, number: int) -> list[int] | None:
        """`number` counts from `first` on of the refcount block at `block`, all in one byte, or one count; None if they
        cannot be read."""
        bits = self.header.refcount_bits
        raw = self.read(block + first * bits // 8, max(bits // 8, 1))
        if len(raw) * 8 < bits:
            return None
        at = first % (8 // bits) if bits < 8 else 0
        found: list[int] = unpacked(raw, bits)[at : at + number].tolist()
        return found

    def _read_records(self) -> None:
        header = self.header
        try:
            for one in snapshot_table.entries(self.storage, header):
                self.snapshots.append(one)
                self.snapshot_starts.append(self.snapshot_starts[-1] + len(one.to_bytes()))
                if self.snapshot_starts[-1] - self.snapshot_starts[0] > _MOST_BYTES:
                    self.tell(f"only the first {len(self.snapshots)} of {header.nb_snapshots} snapshots are looked at")
                    break
        except LaminaError as error:
            self.tell(error.message)
        try:
            self.bitmaps = bitmap_directory.read(self.storage, header)
        except LaminaError as error:
            self.tell(error.message)
        if where := bitmap_directory.extension(header):
            self.bitmap_starts = [where[1]]
            for entry in self.bitmaps:
                self.bitmap_starts.append(self.bitmap_starts[-1] + len(entry.to_bytes()))

    def _regions(self) -> Iterator[Use]:
        header = self.header
        yield Use(HEADER, 0, self.cluster)
        yield Use(L1_TABLE, header.l1_table_offset, header.l1_table_offset + 8 * header.l1_size)
        if header.nb_snapshots:
            yield Use(SNAPSHOT_TABLE, header.snapshots_offset, self.snapshot_starts[-1])
        for l1 in self._l1_tables()[1:]:
            yield Use(SNAPSHOT_L1, l1.offset, l1.offset + 8 * l1.entries, l1.snapshot)
        length = header.refcount_table_clusters << self.bits
        if length:
            yield Use(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_offset + length)
        if (place := header.encryption_header) is not None:
            yield Use(ENCRYPTION, place[0], sum(place))
        if where := bitmap_directory.extension(header):
            yield Use(BITMAPS, where[1], where[1] + where[2], what="directory")
        for number, entry in enumerate(self.bitmaps):
            if entry.table_size:
                yield Use(BITMAPS, entry.table_offset, entry.table_offset + 8 * entry.table_size, number, "table")

    def _l1_tables(self) -> list[L1]:
        """The active table first. Those of snapshots that the check does not read are left out."""
        found = [L1(self.header.l1_table_offset, self.header.l1_size, -1)]
        for number, one in enumerate(self.snapshots):
            if one.l1_table_offset % self.cluster or one.l1_size * 8 > q.MAX_L1_BYTES:
                self.tell(f"the L1 table of snapshot {number} is not where one can be")
            elif one.l1_size:
                found.append(L1(one.l1_table_offset, one.l1_size, number))
        return found

    # -- what the entries of tables point to. A range is the bytes from `low` to `high` of the file.

    def refcount_blocks(self, low: int, high: int) -> list[tuple[int, int]]:
        """(index in the refcount table, offset) of the refcount blocks that overlap the range."""
        header = self.header
        count = (header.refcount_table_clusters << self.bits) // 8
        table = self.walk.entries(header.refcount_table_offset, count, "refcount table") & np.uint64(q.REFBLOCK_MASK)
        at = self._overlapping(table, low, high)
        return self._few(zip(at.tolist(), table[at].tolist(), strict=True), len(at))

    def l1_entries(self, low: int, high: int) -> list[tuple[L1, Entry]]:
        """The L1 entries that point to L2 tables that overlap the range."""
        found: list[tuple[L1, Entry]] = []
        for l1, first, entries in self._l1_batches():
            at = self._overlapping(l1_table.offsets_of(entries), low, high)
            found += self._few(
                ((l1, Entry(l1.offset, first + index, int(entries[index]))) for index in at[:_MOST_L1].tolist()),
                len(at),
                found,
                _MOST_L1,
            )
        return found

    def l2_entries(self, low: int, high: int) -> list[Entry]:
        """The L2 entries that point to data that overlaps the range."""
        found: list[Entry] = []
        offsets = self._l2_offsets()
        at = 0
        for tables in self.walk.l2_batches(offsets):
            bitmaps = None
            if self.header.extended_l2:
                tables, bitmaps = l2_extended.halves(tables)
            compressed = l2_entry.compressed_mask(tables)
            plain = np.where(compressed, np.uint64(0), l2_entry.offsets_of(tables))
            hit = self._inside(plain, low, high)
            if compressed.any():
                start, end = l2_entry.compressed_ranges(tables, self.bits)
                hit |= compressed & (start < np.uint64(high)) & (end > np.uint64(low))
            rows, columns = np.nonzero(hit)
            hits = zip(rows[:_MOST].tolist(), columns[:_MOST].tolist(), strict=True)
            found += self._few(
                (
                    Entry(
                        int(offsets[at + row]),
                        column,
                        int(tables[row, column]),
                        0 if bitmaps is None else int(bitmaps[row, column]),
                    )
                    for row, column in hits
                ),
                len(rows),
                found,
            )
            at += len(tables)
        return found

    def l1_users(self, tables: Iterable[int]) -> dict[int, list[tuple[L1, int]]]:
        """The L1 entries (table, index) that point to each of these L2 tables."""
        found: dict[int, list[tuple[L1, int]]] = {table: [] for table in tables}
        wanted = np.array(sorted(found), np.uint64)
        for l1, first, entries in self._l1_batches():
            offsets = l1_table.offsets_of(entries)
            for index in np.flatnonzero(np.isin(offsets, wanted)).tolist():
                users = found[int(offsets[index])]
                if len(users) < _MOST_L1:
                    users.append((l1, first + index))
        return found

    def bitmap_entries(self, low: int, high: int) -> list[tuple[int, Entry]]:
        """(number of the bitmap, entry of its table) of the clusters of bits that overlap the range."""
        found: list[tuple[int, Entry]] = []
        self.walk.to_walk = self._budget
        for number, one in enumerate(self.bitmaps):
            if not one.table_size or not self.walk.may_walk(8 * one.table_size, "bitmap table"):
                continue
            table = self.walk.entries(one.table_offset, one.table_size, "bitmap table")
            at = self._overlapping(np.where(table > 1, table & np.uint64(q.BITMAP_TABLE_MASK), np.uint64(0)), low, high)
            entries = ((number, Entry(one.table_offset, index, int(table[index]))) for index in at[:_MOST].tolist())
            found += self._few(entries, len(at), found)
        return found

    # -- tables

    def _l1_batches(self) -> Iterator[tuple[L1, int, Any]]:
        """(table, index of the first entry, entries) of all L1 tables."""
        self.walk.to_walk = self._budget
        for l1 in self._l1_tables():
            if l1.snapshot >= 0 and not self.walk.may_walk(8 * l1.entries, "L1 table of a snapshot"):
                return
            for first in range(0, l1.entries, _BATCH):
                entries = self.walk.entries(l1.offset + 8 * first, min(_BATCH, l1.entries - first), "L1 table")
                if len(entries):
                    yield l1, first, entries

    def _l2_offsets(self) -> Any:
        """The offsets of all L2 tables that are stored in the file, each once, in order."""
        found, waiting = np.zeros(0, np.uint64), 0
        parts: list[Any] = []
        for _, _, entries in self._l1_batches():
            offsets = l1_table.offsets_of(entries)
            parts.append(offsets[(offsets != 0) & (offsets < np.uint64(self.size))])
            waiting += len(parts[-1])
            if waiting > 4 * _BATCH:
                found, parts, waiting = np.unique(np.concatenate([found, *parts])), [], 0
        found = np.unique(np.concatenate([found, *parts]))
        if self.header.external_data:
            return found[:0]  # entries point into another file
        self.walk.misaligned = self._misaligned
        found = self.walk.on_clusters(found)
        return found[stored_tables(self.storage, found, self.cluster)] if len(found) else found

    def _inside(self, offsets: Any, low: int, high: int) -> Any:
        """Which of these clusters, 0: none, overlap the range."""
        after = np.uint64(max(low - self.cluster, 0))
        return (offsets != 0) & (offsets < np.uint64(high)) & (offsets > after)

    def _overlapping(self, offsets: Any, low: int, high: int) -> Any:
        return np.flatnonzero(self._inside(offsets, low, high))

    def _few(self, hits: Iterable[Any], count: int, before: Sequence[Any] = (), most: int = _MOST) -> list[Any]:
        """These `count` hits, as far as there is space for them beside those before."""
        space = max(most - len(before), 0)
        if count > space:
            self.tell("so many entries point to this cluster that not all of them are told")
        return list(islice(hits, space))
