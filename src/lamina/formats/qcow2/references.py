"""Who refers to which cluster of a qcow2 image: the walk through its tables, for `check`.

It reads the image file itself and shares neither cache nor code with the driver, only the constants of `layout`, so
that it can find the driver's bugs. After "Host cluster management", "Cluster mapping" and "Snapshots" of the published
specification "Qcow2 Image File Format".

References are collected as arrays of cluster indices, so the memory needed depends on the tables that the file really
stores and not on the offsets that they name. Each table is read once however many entries point to it; what it says then
counts that many times. Tables in holes of the file are not read. Of those that do not lie on a cluster few are:
they are findings, and thousands of them could lie over the same bytes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from ...errors import LaminaError
from ...numeric import NDArray, np
from ...report import ERROR, MAX_FINDINGS, UNREADABLE, CheckReport
from . import l1_table, l2_entry
from . import layout as q

if TYPE_CHECKING:
    from ...request import Child
    from .header import Header

Clusters = NDArray[np.int64]
Entries = NDArray[np.uint64]
Mask = NDArray[np.bool_]
_Number = TypeVar("_Number", bound=np.generic)

# What a cluster is used as. One bit each: a cluster with two bits is used twice in ways that exclude each other.
HEADER: Final = 1
L1_TABLE: Final = 2
L2_TABLE: Final = 4
REFCOUNT_TABLE: Final = 8
REFCOUNT_BLOCK: Final = 16
SNAPSHOT_TABLE: Final = 32
SNAPSHOT_L1: Final = 64
ENCRYPTION: Final = 128
DATA: Final = 256

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
}

#: Bytes of L2 tables that are looked at in one go.
_BATCH: Final = 4 << 20
#: Entries of L1 tables, or offsets of L2 tables, that are looked at in one go.
_L1_BATCH: Final = 1 << 18
#: Beyond twice what the file stores, L1 tables of snapshots lie over one another again and again, or in holes; no more than
#: this much then is walked.
_SLACK: Final = 64 << 20
#: Bytes of L2 tables that do not lie on a cluster and are walked all the same, as the peers do: enough for damage, and too
#: little for an attack.
_MISALIGNED: Final = 1 << 20
#: From so many tables on it pays to ask for all holes of the file at once.
_MANY: Final = 1024
#: From this size on it pays to ask whether a table lies in a hole of the file before it is read.
_HOLE: Final = 64 << 10
#: No fewer offsets of each kind are looked at in one go, whatever number of kinds there is.
_FEWEST: Final = 1 << 12


class Use(NamedTuple):
    """What a list of references has in common."""

    kind: int
    #: How often each counts.
    weight: int = 1
    #: COPIED as it stands in the entries, and how often that is looked at (in the active tables only); None: not at
    #: all.
    copied: bool | None = None
    looks: int = 0


class References:
    """The references of one image: call `walk` once, then read `uses`, `outside` and `refcount_table`."""

    def __init__(self, storage: Child, header: Header) -> None:
        self.storage = storage
        self.header = header
        self.bits = header.cluster_bits
        self.cluster = header.cluster_size
        self.size = storage.node.size
        #: Clusters of the file. A reference may run into the next one (compressed data at the end): that is index
        #: `clusters`.
        self.clusters = -(-self.size >> self.bits)
        self.block_entries = self.cluster * 8 >> header.refcount_order
        self.report = CheckReport(total_clusters=-(-header.size >> self.bits))
        self.uses: dict[Use, list[Clusters]] = defaultdict(list)
        #: Entries that point beyond the file: their COPIED flag still has a count to agree with.
        self.outside: dict[Use, list[Clusters]] = defaultdict(list)
        stored = storage.node.allocated
        self.to_walk = 2 * (self.size if stored is None else min(stored, self.size)) + _SLACK
        self.misaligned = _MISALIGNED
        self.refcount_table: Entries = np.zeros(0, np.uint64)
        #: Some table could not be read whole: clusters may have more references than were found.
        self.incomplete = False

    def walk(self) -> None:
        """Collect every reference, and report what is wrong with the entries themselves."""
        header = self.header
        self.region(HEADER, 0, self.cluster)
        self.region(L1_TABLE, header.l1_table_offset, header.l1_size * 8)
        tables = [self.l1_table(header.l1_table_offset, header.l1_size, active=True, weight=1)]
        tables += self.snapshots()
        self.l2_tables([table for table in tables if table is not None])
        self.encryption()
        self.region(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * self.cluster)
        self.refcount_blocks()

    # -- findings

    def each(
        self, kind: str, message: Callable[[int], str], where: NDArray[Any], count: int = 1, *, shift: int = 0
    ) -> None:
        """A finding of `kind` for every element of `where`, each worth `count`; `message` makes the text of one.
        Elements are table entries, or clusters with the `shift` that makes them offsets."""
        room = max(MAX_FINDINGS - len(self.report.findings), 0)
        for value in where[:room].tolist():
            self.report.add(kind, message(value), self.offset_of(value << shift), count)
        rest = len(where) - room
        if rest > 0:
            self.report.add(kind, f"and {rest} more of this kind", None, rest * count)

    def offset_of(self, entry: int) -> int | None:
        """The byte that an entry points to, if it is inside the file."""
        offset = l2_entry.offset_field(entry)
        return offset if offset < self.size else None

    def read(self, offset: int, length: int, what: str) -> tuple[bytearray, list[tuple[int, int]]]:
        """The bytes, and the (position, length) of the parts that could not be read. Those and what is beyond the file
        are zeros. A failing read is tried again cluster by cluster, so that no more than necessary is lost."""
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
            return np.zeros(count, np.uint64)  # of which only the pages that somebody touches are there
        return _native(self.read(offset, count * 8, what)[0])

    def may_walk(self, length: int, what: str) -> bool:
        """Whether another `length` bytes of tables may be walked: tables that overlap could make a small file endless."""
        if length > self.to_walk:
            self.report.add(UNREADABLE, f"{what}: the tables overlap so often that the rest of them is not examined")
            self.to_walk = 0
            self.incomplete = True
            return False
        self.to_walk -= length
        return True

    # -- references

    def region(self, kind: int, offset: int, length: int) -> None:
        """A structure that lies at these bytes. It may end in the cluster that the end of the file cuts, not after it."""
        if not length:
            return
        if offset + length - self.size >= self.cluster:
            self.report.add(ERROR, f"{NAMES[kind]} of {length} bytes at {offset:#x} passes the end of the file")
            return
        last = offset + length - 1 >> self.bits
        self.uses[Use(kind)].append(np.arange(offset >> self.bits, last + 1, dtype=np.int64))

    def point(self, use: Use, offsets: Entries, what: str) -> Mask:
        """Entries that each point to one cluster. Those that are misaligned or outside are findings. Which are inside."""
        misaligned = offsets & np.uint64(self.cluster - 1) != 0
        inside: Mask = offsets < np.uint64(self.size)
        if misaligned.any():
            text = f"{what} at {{:#x}} is not on a cluster boundary"
            self.each(ERROR, text.format, offsets[misaligned], use.weight)
            # It lies in two clusters. Only that of its first byte has to agree with COPIED.
            second = offsets[misaligned & inside] + np.uint64(self.cluster - 1) >> np.uint64(self.bits)
            self.uses[Use(use.kind, use.weight)].append(second.astype(np.int64))
        clusters = (offsets >> np.uint64(self.bits)).astype(np.int64)
        if not inside.all():
            self.each(
                ERROR, lambda at: f"{what} at {at:#x} is beyond the end of the file", offsets[~inside], use.weight
            )
            self.outside[use].append(clusters[~inside])
            clusters = clusters[inside]
        self.uses[use].append(clusters)
        return inside

    # -- tables

    def l1_table(self, offset: int, count: int, *, active: bool, weight: int) -> tuple[Entries, int, bool] | None:
        """What an L1 table refers to. Returns (offsets of its L2 tables, weight, active), or None if it may not be
        walked."""
        if not active and not self.may_walk(count * 8, "L1 table of a snapshot"):
            return None
        found = [np.zeros(0, np.uint64)]
        for at in range(0, count, _L1_BATCH):
            entries = self.entries(offset + 8 * at, min(_L1_BATCH, count - at), "L1 table")
            found += self.l1_entries(entries[entries != 0], active, weight)
        return np.concatenate(found), weight, active

    def l1_entries(self, entries: Entries, active: bool, weight: int) -> list[Entries]:
        """What these entries refer to, none of which is 0. Returns the offsets of the L2 tables that are to be walked."""
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
        """Those of these tables that lie on a cluster, and a few of the others. What more of them refer to is not known."""
        misaligned = np.flatnonzero(offsets & np.uint64(self.cluster - 1))
        walked = min(self.misaligned // self.cluster, len(misaligned))
        self.misaligned -= walked * self.cluster
        if walked == len(misaligned):
            return offsets
        self.incomplete = True
        return np.delete(offsets, misaligned[walked:])

    def snapshots(self) -> list[tuple[Entries, int, bool] | None]:
        """The snapshot table, and the L1 tables that it names."""
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
                text = f"snapshot {index} has {entry.extra_data_size} bytes of extra data; the rest is not examined"
                self.report.add(UNREADABLE, text, at)
                self.incomplete = True
                break
            if header.version >= 3 and entry.extra_data_size < 16:
                self.report.add(ERROR, f"snapshot {index} is incomplete: it has no size of the disk", at)
            at += -(-(q.SNAPSHOT.size + entry.extra_data_size + entry.id_size + entry.name_size) // 8) * 8
            place = entry.l1_table_offset, entry.l1_size
            if place[0] % self.cluster:
                self.report.add(
                    ERROR, f"the L1 table of snapshot {index} at {place[0]:#x} is not on a cluster boundary"
                )
            elif place[1] * 8 > q.MAX_L1_BYTES:
                self.report.add(ERROR, f"the L1 table of snapshot {index} has {place[1]} entries, more than can be")
            else:
                self.region(SNAPSHOT_L1, place[0], place[1] * 8)
                l1_tables[place] = l1_tables.get(place, 0) + 1
        if header.nb_snapshots:
            self.region(SNAPSHOT_TABLE, header.snapshots_offset, at - header.snapshots_offset)
        return [self.l1_table(*place, active=False, weight=weight) for place, weight in l1_tables.items()]

    def l2_tables(self, found: list[tuple[Entries, int, bool]]) -> None:
        """Walk every L2 table once, whatever number of L1 entries point to it. `found`, which it empties: the offsets of L2
        tables, how often each counts, and whether the active L1 table names them."""
        alike: dict[tuple[int, bool], list[Entries]] = defaultdict(list)
        while found:
            offsets, weight, active = found.pop()
            alike[weight, active].append(offsets)
        lists = {use: joined(parts) for use, parts in alike.items()}
        for offsets in lists.values():
            offsets.sort()
        # In ranges of offsets, so that what is kept of each table beside its offset takes little memory.
        for low, high in ranges(lists.values(), max(_L1_BATCH // max(len(lists), 1), _FEWEST)):
            edges = np.array((low, high), np.uint64)
            parts = {use: one[slice(*np.searchsorted(one, edges))] for use, one in lists.items()}
            if any(map(len, parts.values())):
                self.l2_range({use: part for use, part in parts.items() if len(part)})

    def l2_range(self, lists: dict[tuple[int, bool], Entries]) -> None:
        """The same for these offsets, ascending in each list, by (how often each counts, whether it is active)."""
        named = {use: _run_lengths(one) for use, one in lists.items()}
        offsets = np.unique(np.concatenate([one for one, _ in named.values()]))
        looks = np.zeros(len(offsets), np.int64)
        total = np.zeros(len(offsets), np.int64)
        for (weight, active), (one, times) in named.items():
            at = np.searchsorted(offsets, one)
            total[at] += times * weight
            if active:
                looks[at] += times * weight
        stored = self.stored_tables(offsets)
        offsets, looks, total = offsets[stored], looks[stored], total[stored]
        order = np.lexsort((offsets, looks, total))
        offsets, looks, total = offsets[order], looks[order], total[order]
        edges = np.flatnonzero((np.diff(looks) != 0) | (np.diff(total) != 0)) + 1
        for group in np.split(np.arange(len(offsets)), edges):
            if len(group):
                for tables in self.l2_batches(offsets[group]):
                    self.l2_entries(tables, int(total[group[0]]), int(looks[group[0]]))

    def stored_tables(self, offsets: Entries) -> Mask:
        """Of which of the tables at these ascending offsets some part is stored: the others lie in holes of the file."""
        size = self.cluster
        if len(offsets) < _MANY:
            if size < _HOLE:
                return np.ones(len(offsets), np.bool_)
            return np.array([not self.storage.reads_zero(at, size) for at in offsets.tolist()], np.bool_)
        keep = np.zeros(len(offsets), np.bool_)
        begin, end = int(offsets[0]), min(int(offsets[-1]) + size, self.size)
        for piece in self.storage.windows(begin, end - begin):
            data = piece.where(zero=False)
            if not len(data):
                continue
            edges = np.array((max(piece.begin - size + 1, 0), piece.end), np.uint64)
            low, high = np.searchsorted(offsets, edges).tolist()
            for at in range(low, high, _L1_BATCH):
                starts = offsets[at : min(at + _L1_BATCH, high)].astype(np.int64)
                row = np.searchsorted(data.start + data.length, starts, "right")
                first = data.start[np.minimum(row, len(data) - 1)]
                keep[at : at + len(starts)] |= (row < len(data)) & (first < starts + size)
        return keep

    def l2_batches(self, offsets: Entries) -> Iterator[Entries]:
        """The entries of the tables at these ascending offsets, some tables at a time, one to a row. Neighbours are
        read together."""
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
        """What the entries of these tables refer to. Each counts `weight` times, and `looks` times as an active one."""
        report = self.report
        flat = tables.reshape(-1)
        places = np.flatnonzero(flat)
        entries = flat[places]
        rows = places // tables.shape[1]
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
        if self.header.version < 3:
            zero = entries[l2_entry.zero_mask(entries)]
            self.each(
                ERROR, lambda entry: f"L2 entry {entry:#018x} has the zero flag, unknown in version 2", zero, weight
            )
        offsets = l2_entry.offsets_of(entries)
        copied = l2_entry.copied_mask(entries)
        nowhere = offsets == 0
        if nowhere.any():
            stray = entries[nowhere & copied]
            self.each(ERROR, lambda entry: f"L2 entry {entry:#018x} is marked COPIED but points nowhere", stray, weight)
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

    def compressed(self, entries: Entries, weight: int) -> None:
        """Compressed data counts in every cluster that its sectors touch: at most three."""
        stray = entries[l2_entry.copied_mask(entries)]
        self.each(
            ERROR, lambda entry: f"L2 entry {entry:#018x} of a compressed cluster is marked COPIED", stray, weight
        )
        start, end = l2_entry.compressed_ranges(entries, self.bits)
        beyond = end >= np.uint64(self.size + self.cluster)
        self.each(ERROR, lambda at: f"compressed data at {at:#x} passes the end of the file", start[beyond], weight)
        first = (start[~beyond] >> np.uint64(self.bits)).astype(np.int64)
        last = (end[~beyond] - np.uint64(1) >> np.uint64(self.bits)).astype(np.int64)
        for step in range(3):
            self.uses[Use(DATA, weight)].append((first + step)[first + step <= last])

    def encryption(self) -> None:
        """Where a LUKS header is, the clusters that it occupies."""
        if (place := self.header.encryption_header) is not None:
            self.region(ENCRYPTION, *place)

    # -- reference counts

    def refcount_blocks(self) -> None:
        """The refcount table, and the blocks that it names."""
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
        self.each(ERROR, lambda at: f"refcount block at {at:#x} is beyond the end of the file", entries[beyond])
        self.uses[Use(REFCOUNT_BLOCK)].append((entries[~beyond] >> np.uint64(self.bits)).astype(np.int64))


def joined(parts: list[NDArray[_Number]]) -> NDArray[_Number]:
    """These arrays, at least one, which it empties, one behind the other."""
    whole = np.empty(sum(map(len, parts)), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def ranges(lists: Collection[NDArray[Any]], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of numbers, ascending, that hold all of these sorted lists, at most `most` of each list in one (more only where
    they are equal)."""
    edges = sorted({edge for one in lists for edge in [*one[::most].tolist(), *(one[-1:] + 1).tolist()]})
    return pairwise(edges)


def _run_lengths(values: Entries) -> tuple[Entries, NDArray[np.int64]]:
    """Each of these sorted values once, and how often it is there. There is at least one."""
    first = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))
    return values[first], np.diff(first, append=len(values))


def _native(raw: bytearray) -> Entries:
    """The entries in these bytes, which become the array's own."""
    entries = np.frombuffer(raw, np.uint64)
    return entries.byteswap(inplace=True) if sys.byteorder == "little" else entries
