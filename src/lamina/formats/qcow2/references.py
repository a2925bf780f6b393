"""The references to each cluster of a qcow2 image, collected from its tables for `check`.

The walk reads the image file without the caches of the driver, and shares with it only `layout`, `l1_table`, `l2_entry` and
`l2_extended`, which decode entries, so that it finds errors of the driver. After "Host cluster management", "Cluster mapping"
and "Snapshots" of the published specification "Qcow2 Image File Format".

References are collected in arrays of cluster indexes. The memory therefore depends on the tables that the file stores, and
not on the offsets in them. Each table is read once, regardless of the number of entries that point to it, and its references
are counted as often. Tables in holes of the file are not read. Only a few misaligned tables are read: each is a finding, and
thousands of them could overlap in the same bytes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from ...errors import LaminaError
from ...numeric import NDArray, np
from ...report import ERROR, MAX_FINDINGS, NOTE, UNREADABLE, CheckReport
from . import bitmap_references, external_references, l1_table, l2_entry, l2_extended
from . import layout as q
from .holes import stored_tables

if TYPE_CHECKING:
    from ...check_result import FindingKind
    from ...request import Child
    from .header import Header

Clusters = NDArray[np.integer[Any]]
Entries = NDArray[np.uint64]
Mask = NDArray[np.bool_]
_Number = TypeVar("_Number", bound=np.generic)

# The uses of a cluster, a bit each: two bits exclude each other.
HEADER: Final = 1
L1_TABLE: Final = 2
L2_TABLE: Final = 4
REFCOUNT_TABLE: Final = 8
REFCOUNT_BLOCK: Final = 16
SNAPSHOT_TABLE: Final = 32
SNAPSHOT_L1: Final = 64
ENCRYPTION: Final = 128
DATA: Final = 256
BITMAPS: Final = 512

NAMES: Final = {
    HEADER: "header",
    L1_TABLE: "L1 table",
    L2_TABLE: "L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    SNAPSHOT_L1: "L1 table of a snapshot",
    ENCRYPTION: "encryption header",
    DATA: "guest data",
    BITMAPS: "bitmaps",
}

#: Bytes of L2 tables in one batch.
_BATCH: Final = 512 << 10
#: Entries of L1 tables, or offsets of L2 tables, in one batch.
_L1_BATCH: Final = 1 << 18
#: L1 tables of snapshots with more bytes than twice the stored size of the file overlap many times, or lie in holes. Only
#: this many more bytes of them are read.
_SLACK: Final = 64 << 20
#: Bytes of misaligned L2 tables that are read, as the reference tools do: enough for damage, too little for an attack.
_MISALIGNED: Final = 1 << 20
#: The table size from which on a query for a hole in the file pays off before a read.
_HOLE: Final = 64 << 10
#: The minimum of offsets of each kind in one batch, regardless of the number of kinds.
_FEWEST: Final = 1 << 12


class Use(NamedTuple):
    """The common properties of a list of references."""

    kind: int
    #: The number of references for which each element stands.
    weight: int = 1
    #: The flag COPIED of the entries, and the number of active entries with it; None: the flag is not checked.
    copied: bool | None = None
    looks: int = 0


class References:
    """The references of one image. Call `walk` once, then read `uses`, `outside` and `refcount_table`."""

    def __init__(self, storage: Child, header: Header) -> None:
        self.storage = storage
        self.header = header
        self.bits = header.cluster_bits
        self.cluster = header.cluster_size
        self.size = storage.node.size
        #: The number of clusters of the file. Compressed data at the end of the file may extend into the cluster with this
        #: index.
        self.clusters = -(-self.size >> self.bits)
        self.block_entries = self.cluster * 8 >> header.refcount_order
        self.report = CheckReport(total_clusters=-(-header.size >> self.bits))
        #: The type of a cluster index inside the file.
        self.index: type[np.integer[Any]] = np.int32 if self.clusters < 1 << 30 else np.int64
        self.uses: dict[Use, list[Clusters]] = defaultdict(list)
        #: References past the end of the file, whose flag COPIED must match a stored refcount as well.
        self.outside: dict[Use, list[Clusters]] = defaultdict(list)
        stored = storage.node.allocated
        self.to_walk = 2 * (self.size if stored is None else min(stored, self.size)) + _SLACK
        self.misaligned = _MISALIGNED
        self.refcount_table: Entries = np.zeros(0, np.uint64)
        #: Whether a table could not be read completely: clusters may have more references.
        self.incomplete = False

    def walk(self) -> None:
        """Collect all references, and report errors in the entries themselves."""
        header = self.header
        self.region(HEADER, 0, self.cluster)
        self.region(L1_TABLE, header.l1_table_offset, header.l1_size * 8)
        tables = [self.l1_table(header.l1_table_offset, header.l1_size, active=True, weight=1)]
        tables += self.snapshots()
        if header.external_data:
            external_references.check_entries(self)
        else:
            self.l2_tables([table for table in tables if table is not None])
        self.encryption()
        bitmap_references.add(self, Use(BITMAPS))
        if header.lost_refcounts is not None:
            offset, length = header.lost_refcounts
            self.report.add(ERROR, f"the refcount table of {length} bytes at {offset:#x} is not inside the file")
        self.region(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * self.cluster)
        self.refcount_blocks()

    # -- findings

    def each(
        self, kind: FindingKind, message: Callable[[int], str], where: NDArray[Any], count: int = 1, *, shift: int = 0
    ) -> None:
        """Report a finding of `kind` for each element of `where`, counted `count` times; `message` returns its text.
        Elements are table entries, or clusters with the `shift` that makes them offsets."""
        most = max(MAX_FINDINGS - len(self.report.findings), 0)
        for value in where[:most].tolist():
            self.report.add(kind, message(value), self.offset_of(value << shift), count)
        rest = len(where) - most
        if rest > 0:
            self.report.add(kind, f"and {rest} more of this kind", None, rest * count)

    def offset_of(self, entry: int) -> int | None:
        """The offset in an entry, if it is inside the file."""
        offset = l2_entry.offset_field(entry)
        return offset if offset < self.size else None

    def read(self, offset: int, length: int, what: str) -> tuple[bytearray, list[tuple[int, int]]]:
        """The bytes, and (position, length) of the parts that could not be read. These parts, and bytes past the end of the
        file, are zeros. A failed read is repeated cluster by cluster, so that only the unreadable clusters are lost."""
        data = bytearray(length)
        inside = min(max(self.size - offset, 0), length)
        if not inside:
            return data, []
        view = memoryview(data)
        try:
            self.storage.read_into(offset, view[:inside])
            return data, []
        except LaminaError as error:
            if inside <= self.cluster:
                view[:] = bytes(length)
                self.report.add(UNREADABLE, f"{what} at {offset:#x}: {error.message}", offset)
                self.incomplete = True
                return data, [(0, length)]
        lost = []
        for at in range(0, inside, self.cluster):
            part, failed = self.read(offset + at, min(self.cluster, inside - at), what)
            view[at : at + len(part)] = part
            lost += [(at + position, span) for position, span in failed]
        return data, lost

    def entries(self, offset: int, count: int, what: str) -> Entries:
        """`count` table entries at `offset`; fewer if the file ends before."""
        count = min(count, max(-(-(self.size - offset) // 8), 0))
        if count * 8 >= _HOLE and self.storage.reads_zero(offset, count * 8):
            return np.zeros(count, np.uint64)  # the system allocates only pages that are accessed
        return _native(self.read(offset, count * 8, what)[0])

    def may_walk(self, length: int, what: str) -> bool:
        """Whether another `length` bytes of tables may be read: overlapping tables could make a small file endless."""
        if length > self.to_walk:
            self.report.add(UNREADABLE, f"{what}: the tables overlap so often that the rest is not checked")
            self.to_walk = 0
            self.incomplete = True
            return False
        self.to_walk -= length
        return True

    # -- references

    def region(self, kind: int, offset: int, length: int) -> None:
        """Add the references to a structure at these bytes. It may end in the last, incomplete cluster, but not after it."""
        if not length:
            return
        if offset + length - self.size >= self.cluster:
            self.report.add(ERROR, f"{NAMES[kind]} of {length} bytes at {offset:#x} extends past the end of the file")
            return
        last = offset + length - 1 >> self.bits
        self.uses[Use(kind)].append(np.arange(offset >> self.bits, last + 1, dtype=self.index))

    def point(self, use: Use, offsets: Entries, what: str) -> Mask:
        """Add references that each point to one cluster; misaligned ones, and those outside of the file, are findings.
        Returns which are inside."""
        misaligned = offsets & np.uint64(self.cluster - 1) != 0
        inside: Mask = offsets < np.uint64(self.size)
        if misaligned.any():
            text = f"{what} at {{:#x}} is not on a cluster boundary"
            self.each(ERROR, text.format, offsets[misaligned], use.weight)
            # It overlaps two clusters. Only the first one must match COPIED.
            second = offsets[misaligned & inside] + np.uint64(self.cluster - 1) >> np.uint64(self.bits)
            self.uses[Use(use.kind, use.weight)].append(second.astype(self.index))
        clusters = (offsets >> np.uint64(self.bits)).astype(np.int64)
        if not inside.all():
            self.each(ERROR, lambda at: f"{what} at {at:#x} is past the end of the file", offsets[~inside], use.weight)
            self.outside[use].append(clusters[~inside])
            clusters = clusters[inside]
        self.uses[use].append(clusters.astype(self.index))
        return inside

    # -- tables

    def l1_table(self, offset: int, count: int, *, active: bool, weight: int) -> tuple[Entries, int, bool] | None:
        """Add the references of an L1 table. Returns (offsets of its L2 tables, weight, active), or None if it must not be
        read."""
        if not active and not self.may_walk(count * 8, "L1 table of a snapshot"):
            return None
        found = [np.zeros(0, np.uint64)]
        for at in range(0, count, _L1_BATCH):
            entries = self.entries(offset + 8 * at, min(_L1_BATCH, count - at), "L1 table")
            found += self.l1_entries(entries[entries != 0], active, weight)
        return np.concatenate(found), weight, active

    def l1_entries(self, entries: Entries, active: bool, weight: int) -> list[Entries]:
        """Add the references of these entries, none of which is 0. Returns the offsets of the L2 tables to be read."""
        reserved = entries[l1_table.reserved_mask(entries)]
        self.each(ERROR, lambda entry: f"L1 entry {entry:#018x} has reserved bits set", reserved, weight)
        copied = l1_table.copied_mask(entries)
        offsets = l1_table.offsets_of(entries)
        if not active:
            return [self.on_clusters(offsets[self.point(Use(L2_TABLE, weight), offsets, "L2 table")])]
        found = []
        for flag, chosen in ((True, offsets[copied]), (False, offsets[~copied])):
            if len(chosen):
                inside = self.point(Use(L2_TABLE, weight, flag, weight), chosen, "L2 table")
                found.append(self.on_clusters(chosen[inside]))
        return found

    def on_clusters(self, offsets: Entries) -> Entries:
        """The aligned offsets, and a few of the others. References of the rest stay unknown."""
        misaligned = np.flatnonzero(offsets & np.uint64(self.cluster - 1))
        walked = min(self.misaligned // self.cluster, len(misaligned))
        self.misaligned -= walked * self.cluster
        if walked == len(misaligned):
            return offsets
        self.incomplete = True
        return np.delete(offsets, misaligned[walked:])

    def snapshots(self) -> list[tuple[Entries, int, bool] | None]:
        """Add the references of the snapshot table, and of the L1 tables to which it points."""
        header, at = self.header, self.header.snapshots_offset
        l1_tables: dict[tuple[int, int], int] = {}
        for index in range(header.nb_snapshots):
            if at + q.SNAPSHOT.size > self.size:
                self.report.add(UNREADABLE, f"the snapshot table ends in entry {index} of {header.nb_snapshots}", at)
                self.incomplete = True
                break
            raw, failed = self.read(at, q.SNAPSHOT.size, "snapshot table")
            if failed:
                break
            entry = q.SNAPSHOT.unpack(raw)
            if entry.extra_data_size > q.MAX_SNAPSHOT_EXTRA:
                text = f"snapshot {index} has {entry.extra_data_size} bytes of extra data; the rest is not checked"
                self.report.add(UNREADABLE, text, at)
                self.incomplete = True
                break
            if header.version >= 3 and entry.extra_data_size < 16:
                self.report.add(ERROR, f"snapshot {index} is incomplete: the size of the disk is missing", at)
            at += -(-(q.SNAPSHOT.size + entry.extra_data_size + entry.id_size + entry.name_size) // 8) * 8
            table = entry.l1_table_offset, entry.l1_size
            if table[0] % self.cluster:
                self.report.add(
                    ERROR, f"the L1 table of snapshot {index} at {table[0]:#x} is not on a cluster boundary"
                )
            elif table[1] * 8 > q.MAX_L1_BYTES:
                self.report.add(ERROR, f"the L1 table of snapshot {index} has {table[1]} entries, above the limit")
            else:
                self.region(SNAPSHOT_L1, table[0], table[1] * 8)
                l1_tables[table] = l1_tables.get(table, 0) + 1
        if header.nb_snapshots:
            self.region(SNAPSHOT_TABLE, header.snapshots_offset, at - header.snapshots_offset)
        return [self.l1_table(*table, active=False, weight=weight) for table, weight in l1_tables.items()]

    def l2_tables(self, found: list[tuple[Entries, int, bool]]) -> None:
        """Read each L2 table once, regardless of the number of L1 entries that point to it. `found`, which is emptied:
        (offsets of L2 tables, weight, active) of each L1 table."""
        alike: dict[tuple[int, bool], list[Entries]] = defaultdict(list)
        while found:
            offsets, weight, active = found.pop()
            alike[weight, active].append(offsets)
        lists = {use: joined(parts) for use, parts in alike.items()}
        for offsets in lists.values():
            offsets.sort()
        # In batches of adjacent offsets, since the columns of a batch take several times the memory of its offsets.
        for low, high in ranges(lists.values(), max(_L1_BATCH // max(len(lists), 1), _FEWEST)):
            edges = np.array((low, high), np.uint64)
            parts = {use: one[slice(*np.searchsorted(one, edges))] for use, one in lists.items()}
            if any(map(len, parts.values())):
                self.l2_range({use: part for use, part in parts.items() if len(part)})

    def l2_range(self, lists: dict[tuple[int, bool], Entries]) -> None:
        """The same for one batch: sorted lists of offsets by (weight, active)."""
        named = {use: _run_lengths(one) for use, one in lists.items()}
        offsets = np.unique(np.concatenate([one for one, _ in named.values()]))
        looks = np.zeros(len(offsets), np.int64)
        total = np.zeros(len(offsets), np.int64)
        for (weight, active), (one, times) in named.items():
            at = np.searchsorted(offsets, one)
            total[at] += times * weight
            if active:
                looks[at] += times * weight
        stored = stored_tables(self.storage, offsets, self.cluster)
        offsets, looks, total = offsets[stored], looks[stored], total[stored]
        order = np.lexsort((offsets, looks, total))
        offsets, looks, total = offsets[order], looks[order], total[order]
        edges = np.flatnonzero((np.diff(looks) != 0) | (np.diff(total) != 0)) + 1
        for group in np.split(np.arange(len(offsets)), edges):
            if len(group):
                for tables in self.l2_batches(offsets[group]):
                    self.l2_entries(tables, int(total[group[0]]), int(looks[group[0]]))

    def l2_batches(self, offsets: Entries) -> Iterator[Entries]:
        """The entries of the tables at these sorted offsets, in batches with one row per table. Adjacent tables are read
        together."""
        size = self.cluster
        step = max(_BATCH // size, 1)
        for start in range(0, len(offsets), step):
            batch = offsets[start : start + step].tolist()
            parts = []
            first = 0
            for index in range(1, len(batch) + 1):
                if index == len(batch) or batch[index] != batch[index - 1] + size:
                    parts.append(self.read(batch[first], (index - first) * size, "L2 table")[0])
                    first = index
            raw = parts[0] if len(parts) == 1 else bytearray().join(parts)
            yield _native(raw).reshape(len(batch), size // 8)

    def l2_entries(self, tables: Entries, weight: int, looks: int) -> None:
        """Add the references of the entries of these tables. Each counts `weight` times, `looks` of them as an active one."""
        report = self.report
        if self.header.extended_l2:
            tables, bitmaps = l2_extended.halves(tables)
            self.subclusters(tables, bitmaps, weight)
        plain = None if self.header.extended_l2 or not looks else l2_entry.owned_clusters(tables, self.bits)
        if plain is not None and int(plain[0].max(initial=0)) < self.clusters:
            report.allocated_clusters += looks * len(plain[0])
            report.fragmented_clusters += looks * plain[1]
            self.uses[Use(DATA, weight, True, looks)].append(plain[0].astype(self.index))
            return
        flat = tables.reshape(-1)
        used = np.flatnonzero(flat)
        entries = flat[used]
        rows = used // tables.shape[1]
        compressed = l2_entry.compressed_mask(entries)
        if compressed.any():
            self.compressed(entries[compressed], weight)
            count = looks * int(compressed.sum())
            report.compressed_clusters += count
            report.fragmented_clusters += count
            report.allocated_clusters += count
            entries, rows = entries[~compressed], rows[~compressed]
        reserved = entries[l2_entry.reserved_mask(entries)]
        self.each(ERROR, lambda entry: f"L2 entry {entry:#018x} has reserved bits set", reserved, weight)
        if self.header.version < 3 or self.header.extended_l2:
            zero = entries[l2_entry.zero_mask(entries)]
            # The reference tools count it in version 2, and ignore it in extended entries.
            kind: FindingKind = NOTE if self.header.extended_l2 else ERROR
            where = "in extended entries" if self.header.extended_l2 else "in version 2"
            self.each(kind, lambda entry: f"L2 entry {entry:#018x} has the zero flag, unknown {where}", zero, weight)
        offsets = l2_entry.offsets_of(entries)
        copied = l2_entry.copied_mask(entries)
        nowhere = offsets == 0
        if nowhere.any():
            stray = entries[nowhere & copied]
            self.each(ERROR, lambda entry: f"L2 entry {entry:#018x} has the flag COPIED but no offset", stray, weight)
            offsets, copied, rows = offsets[~nowhere], copied[~nowhere], rows[~nowhere]
        if looks and len(offsets):
            report.allocated_clusters += looks * len(offsets)
            jumps = (np.diff(offsets) != np.uint64(self.cluster)) & (np.diff(rows) == 0)
            report.fragmented_clusters += looks * int(jumps.sum())
        if not looks:
            self.point(Use(DATA, weight), offsets, "data cluster")
            return
        for flag, chosen in ((True, offsets[copied]), (False, offsets[~copied])):
            if len(chosen):
                self.point(Use(DATA, weight, flag, looks), chosen, "data cluster")

    def subclusters(self, entries: Entries, bitmaps: Entries, weight: int) -> None:
        """Report invalid subcluster bitmaps of these extended entries."""
        compressed, offsets = l2_entry.compressed_mask(entries), l2_entry.offsets_of(entries)
        both, stray = l2_extended.contradictory_mask(bitmaps), l2_extended.allocated_mask(bitmaps)
        for wrong, what in (
            (compressed & (bitmaps != 0), "of a compressed cluster has subclusters"),
            (~compressed & (offsets != 0) & both, "has a subcluster that is both allocated and zero"),
            (~compressed & (offsets == 0) & stray, "has allocated subclusters but no offset"),
        ):
            self.each(ERROR, f"L2 entry {{:#018x}} {what}".format, entries[wrong], weight)

    def compressed(self, entries: Entries, weight: int) -> None:
        """Add the references to compressed data: one for each cluster that its sectors overlap, at most three."""
        stray = entries[l2_entry.copied_mask(entries)]
        self.each(
            ERROR, lambda entry: f"L2 entry {entry:#018x} of a compressed cluster has the flag COPIED", stray, weight
        )
        start, end = l2_entry.compressed_ranges(entries, self.bits)
        beyond = end >= np.uint64(self.size + self.cluster)
        self.each(
            ERROR, lambda at: f"compressed data at {at:#x} extends past the end of the file", start[beyond], weight
        )
        first = (start[~beyond] >> np.uint64(self.bits)).astype(np.int64)
        last = (end[~beyond] - np.uint64(1) >> np.uint64(self.bits)).astype(np.int64)
        for step in range(3):
            self.uses[Use(DATA, weight)].append((first + step)[first + step <= last].astype(self.index))

    def encryption(self) -> None:
        """Add the references to the clusters of the LUKS header, if there is one."""
        if (place := self.header.encryption_header) is not None:
            self.region(ENCRYPTION, *place)

    # -- reference counts

    def refcount_blocks(self) -> None:
        """Add the references of the refcount table to its blocks."""
        header = self.header
        count = header.refcount_table_clusters * self.cluster // 8
        table = self.entries(header.refcount_table_offset, count, "refcount table")
        self.refcount_table = table & np.uint64(q.REFBLOCK_MASK)
        used = np.flatnonzero(table)
        entries = table[used]
        reserved = entries != self.refcount_table[used]
        self.each(ERROR, lambda e: f"refcount table entry {e:#018x} has reserved bits set", entries[reserved])
        entries = entries[~reserved]
        misaligned = entries & np.uint64(self.cluster - 1) != 0
        self.each(ERROR, lambda at: f"refcount block at {at:#x} is not on a cluster boundary", entries[misaligned])
        entries = entries[~misaligned]
        beyond = entries >= np.uint64(self.size)
        self.each(ERROR, lambda at: f"refcount block at {at:#x} is past the end of the file", entries[beyond])
        self.uses[Use(REFCOUNT_BLOCK)].append((entries[~beyond] >> np.uint64(self.bits)).astype(self.index))


def joined(parts: list[NDArray[_Number]]) -> NDArray[_Number]:
    """The concatenation of these arrays, of which there is at least one; the list is emptied."""
    whole = np.empty(sum(map(len, parts)), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def ranges(lists: Collection[NDArray[Any]], most: int) -> Iterator[tuple[int, int]]:
    """Ascending ranges of numbers that contain all elements of these sorted lists, with at most `most` elements of each list
    per range (more only if they are equal)."""
    edges = sorted({edge for one in lists for edge in [*one[::most].tolist(), *(one[-1:] + 1).tolist()]})
    return pairwise(edges)


def _run_lengths(values: Entries) -> tuple[Entries, NDArray[np.int64]]:
    """The distinct values of this sorted array, which is not empty, and the number of occurrences of each."""
    first = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    return values[first], np.diff(first, append=len(values))


def _native(raw: bytearray) -> Entries:
    """The entries in these big-endian bytes, which the array takes over."""
    entries = np.frombuffer(raw, np.uint64)
    return entries.byteswap(inplace=True) if sys.byteorder == "little" else entries
