"""What lies in the clusters of a qcow2 file, in words: structures, entries of tables, and data, for `explain`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ...explanation import DATA, UNKNOWN, UNUSED, Guest, Part
from ...status import COMPRESSED, ZERO
from ...status import DATA as IS_DATA
from . import explain_fields, l1_table, l2_entry
from . import layout as q
from .explain_uses import L1, Entry
from .l2_extended import COUNT, allocated, zeroed
from .references import BITMAPS, ENCRYPTION, HEADER, L2_TABLE, NAMES, REFCOUNT_BLOCK, REFCOUNT_TABLE, SNAPSHOT_TABLE

if TYPE_CHECKING:
    from .explain_uses import Use, Uses
    from .header import Header

#: Guest ranges of one part that are told.
_MOST_GUESTS: Final = 64
_ENTRY: Final = 8

#: The L1 entries (table, index) that point to each L2 table.
Users = Mapping[int, Sequence[tuple[L1, int]]]


class Found:
    """Something that lies in the file: its bytes `start` to `stop`."""

    structure: ClassVar[str]

    def __init__(self, uses: Uses, start: int, stop: int) -> None:
        self.uses, self.start, self.stop = uses, start, stop

    @property
    def name(self) -> str:
        return self.structure

    def part(self, offset: int) -> Part | None:
        """The part of it that contains the byte at `offset`; None if it does not."""
        return self._part(offset) if self.start <= offset < self.stop else None

    def _part(self, offset: int) -> Part:
        raise NotImplementedError

    def _cut(self, at: int, what: str) -> Part:
        """The part from `at` to the end of the file, which comes too early."""
        return Part(self.name, at, self.uses.size - at, None, UNUSED, text=f"the file ends in this {what}")


class Region(Found):
    """A structure to which the header, or a record, points."""

    def __init__(self, uses: Uses, use: Use) -> None:
        super().__init__(uses, use.start, use.stop)
        self.use = use

    @property
    def name(self) -> str:
        return self.uses.name(self.use)

    def _part(self, offset: int) -> Part:
        use, uses = self.use, self.uses
        if use.kind in (HEADER, ENCRYPTION):
            return self._fields(offset)
        if use.kind == SNAPSHOT_TABLE or use.what == "directory":
            return self._record(offset)
        index = (offset - use.start) // _ENTRY
        at = use.start + index * _ENTRY
        value = uses.value(at)
        if value is None:
            return self._cut(at, "entry")
        text, details = self._entry(index, value)
        guests = {}
        if use.kind not in (BITMAPS, REFCOUNT_TABLE):
            status = "mapped" if details["l2-table"] else "unallocated"
            users = [(L1(use.start, 0, use.record), index)]
            guests = _served(uses, [(users, 0, status)], 1 << uses.header.l1_covers_bits)
        return Part(self.name, at, _ENTRY, uses.owner(use), f"entry {index}", value, text, details, **guests)

    def _entry(self, index: int, value: int) -> tuple[str, dict[str, Any]]:
        uses = self.uses
        if self.use.kind == REFCOUNT_TABLE:
            block = value & q.REFBLOCK_MASK
            first = index * uses.per_block << uses.bits
            where = f"in the refcount block at {block:#x}" if block else "0: there is no refcount block"
            return f"refcounts of the clusters from {first:#x} on are {where}", {"refcount-block": block or None}
        if self.use.kind == BITMAPS:
            offset = value & q.BITMAP_TABLE_MASK
            where = f"are at {offset:#x}" if offset else "are all 1" if value & 1 else "are all 0"
            return f"the bits of cluster {index} of the bitmap {where}", {"offset": offset or None}
        return l1_words(value)

    def _fields(self, offset: int) -> Part:
        """A field of the header, or of the LUKS header."""
        use, uses = self.use, self.uses
        if use.kind == HEADER:
            raw = uses.read(0, use.stop)
            return explain_fields.find(explain_fields.of_header(raw, uses.header), offset, self.name, 0, len(raw))
        places = explain_fields.of_luks(uses.read(use.start, 4096), use.start, use.stop - use.start)
        return explain_fields.find(places, offset, self.name, use.start, min(use.stop, uses.size))

    def _record(self, offset: int) -> Part:
        """A field of the snapshot table, or of the bitmap directory."""
        use, uses = self.use, self.uses
        of_snapshots = use.kind == SNAPSHOT_TABLE
        starts = uses.snapshot_starts if of_snapshots else uses.bitmap_starts
        number = bisect_right(starts, offset) - 1
        if not 0 <= number < len(starts) - 1:
            length = min(use.stop, uses.size) - starts[-1]
            return Part(self.name, starts[-1], length, None, UNKNOWN, text="no entry that can be read")
        start, stop = starts[number], starts[number + 1]
        raw = uses.read(start, stop - start)
        if len(raw) < stop - start:
            return Part(self.name, start, stop - start, None, UNKNOWN, text="it cannot be read")
        if of_snapshots:
            places, owner = explain_fields.of_snapshot(raw, start), uses.snapshot(number)
        else:
            places, owner = explain_fields.of_bitmap(raw, start), uses.bitmap(number)
        return explain_fields.find(places, offset, self.name, start, stop, owner)


class RefcountBlock(Found):
    structure = NAMES[REFCOUNT_BLOCK]

    def __init__(self, uses: Uses, start: int, indexes: Sequence[int]) -> None:
        """`indexes`: of the entries of the refcount table that point to it."""
        super().__init__(uses, start, start + uses.cluster)
        self.indexes = indexes

    def _part(self, offset: int) -> Part:
        uses = self.uses
        bits = uses.header.refcount_bits
        width = max(bits // 8, 1)
        at = self.start + (offset - self.start) // width * width
        value = uses.value(at, width)
        if value is None:
            return self._cut(at, "count")
        first = (at - self.start) * 8 // bits
        counts = uses.counts(self.start, first, max(8 // bits, 1)) or []
        found = {
            index * uses.per_block + first + step: count for index in self.indexes for step, count in enumerate(counts)
        }
        text = ", ".join(
            f"of cluster {cluster} at {cluster << uses.bits:#x} is {count}" for cluster, count in found.items()
        )
        field = f"count {first}" if len(counts) == 1 else f"counts {first} to {first + len(counts) - 1}"
        details = {"refcounts": {str(cluster): count for cluster, count in found.items()}}
        return Part(self.name, at, width, None, field, value, f"the refcount {text}", details)


class L2Table(Found):
    structure = NAMES[L2_TABLE]

    def __init__(self, uses: Uses, start: int, users: Sequence[tuple[L1, int]]) -> None:
        super().__init__(uses, start, start + uses.cluster)
        self.users = users

    def _part(self, offset: int) -> Part:
        uses = self.uses
        width = 1 << uses.layout.entry_bits
        index = (offset - self.start) // width
        at = self.start + index * width
        raw = uses.read(at, width)
        if len(raw) < width:
            return self._cut(at, "entry")
        entry = Entry(self.start, index, int.from_bytes(raw[:8]), int.from_bytes(raw[8:]))
        text, details = l2_words(uses.header, entry)
        owners = {uses.snapshot(l1.snapshot) for l1, _ in self.users}
        owner = owners.pop() if len(owners) == 1 else None
        guests = _served(uses, [(self.users, index << uses.bits, details["status"])], uses.cluster)
        return Part(self.name, at, width, owner, f"entry {index}", int.from_bytes(raw), text, details, **guests)


class Data(Found):
    """Uncompressed guest data."""

    structure = DATA

    def __init__(self, uses: Uses, start: int, entries: Sequence[Entry], users: Users) -> None:
        super().__init__(uses, start, start + uses.cluster)
        self.entries, self.users = entries, users

    def _part(self, offset: int) -> Part:
        uses = self.uses
        unit = uses.cluster >> uses.layout.units_bits
        number = (offset - self.start) // unit
        served = (
            (self.users[entry.table], (entry.number << uses.bits) + number * unit, _status(uses, entry, number))
            for entry in self.entries
        )
        at = self.start + number * unit
        guests = _served(uses, served, unit, offset - at)
        read = any(one.status in ("data", "machine state") for one in guests["guest"])
        text = f"{'encrypted ' * bool(uses.header.crypt_method)}data of the guest"
        text += "" if read else ", which no disk reads: the storage is kept for later"
        return Part(DATA, at, min(unit, uses.size - at), text=text, **guests)


class Compressed(Found):
    """Compressed guest data. `stop`: where the next one begins, or its last sector ends."""

    structure = "compressed guest data"

    def __init__(self, uses: Uses, start: int, stop: int, entries: Sequence[Entry], users: Users) -> None:
        super().__init__(uses, start, stop)
        self.entries, self.users = entries, users

    def _part(self, offset: int) -> Part:
        uses = self.uses
        served = ((self.users[entry.table], entry.number << uses.bits, "compressed") for entry in self.entries)
        kind = q.COMPRESSION_TYPES.get(uses.header.compression_type, "unknown")
        text = f"a compressed cluster ({kind}), up to the next one or the end of its last sector"
        length = min(self.stop, uses.size) - self.start
        return Part(self.name, self.start, length, text=text, **_served(uses, served, uses.cluster))


class BitmapBits(Found):
    structure = "bitmap bits"

    def __init__(self, uses: Uses, number: int, entry: Entry) -> None:
        """`number`: of the bitmap; `entry`: of its table."""
        start = entry.entry & q.BITMAP_TABLE_MASK
        super().__init__(uses, start, start + uses.cluster)
        self.number, self.entry = number, entry

    def _part(self, offset: int) -> Part:
        uses, size = self.uses, self.uses.header.size
        granularity = uses.bitmaps[self.number].granularity_bits
        first = self.entry.number * uses.cluster * 8 << granularity
        guests: tuple[Guest, ...] = ()
        if first < size:
            exact = first + ((offset - self.start) * 8 << granularity)
            span = min(uses.cluster * 8 << granularity, size - first)
            guests = (Guest(first, span, "recorded", None, exact if exact < size else None),)
        value = uses.value(offset, 1)
        text = f"a bit for each {1 << granularity} bytes of the disk; those of this byte, the lowest first: "
        text += "unreadable" if value is None else f"{value:08b}"[::-1]
        length, owner = min(self.stop, uses.size) - self.start, uses.bitmap(self.number)
        field = f"bits of cluster {self.entry.number}"
        return Part(self.name, self.start, length, owner, field, None, text, {"byte": value}, guests)


# -- guest ranges


def _served(
    uses: Uses, served: Iterable[tuple[Sequence[tuple[L1, int]], int, str]], length: int, exact: int | None = None
) -> dict[str, Any]:
    """The arguments of `Part` for the guest ranges of `length` bytes that it serves: of what the L2 tables of some L1 entries
    describe, from which byte on, and with which status. `exact`: the asked byte, counted from the start of each range."""
    found: list[Guest] = []
    more = 0
    for users, start, status in served:
        for l1, index in users[: _MOST_GUESTS - len(found)]:
            found.append(_guest(uses, l1, (index << uses.header.l1_covers_bits) + start, length, status, exact))
        more += len(users)
    return {"guest": tuple(found), "more": more - len(found)}


def _guest(uses: Uses, l1: L1, offset: int, length: int, status: str, exact: int | None) -> Guest:
    """The range of the disk to which this L1 table belongs; or of the state of the machine, which lies behind the disk."""
    header, id = uses.header, None
    if l1.snapshot >= 0:
        header, id = header.at_snapshot(uses.snapshots[l1.snapshot]), uses.snapshots[l1.snapshot].id
    state = header.l1_entries(header.size) << header.l1_covers_bits
    if l1.snapshot >= 0 and offset >= state:
        offset, status = offset - state, "machine state"
    elif offset >= header.size:
        status = "past the end of the disk"
    else:
        length = min(length, header.size - offset)
    return Guest(offset, length, status, id, None if exact is None or exact >= length else offset + exact)


def status_of(flags: int) -> str:
    """The word for the status flags of a mapping."""
    if flags & COMPRESSED:
        return "compressed"
    if flags & ZERO:
        return "zero"
    return "data" if flags & IS_DATA else "unallocated"


def _status(uses: Uses, entry: Entry, unit: int) -> str:
    """The status of a unit (cluster, or subcluster) of the cluster that this entry describes."""
    try:
        return status_of(uses.layout.run([entry.entry | entry.bitmap << 64], unit, unit + 1)[0])
    except l2_entry.InvalidEntry as error:
        return f"invalid: {error}"


def l1_words(value: int) -> tuple[str, dict[str, Any]]:
    """What an L1 entry says, in words and for programs."""
    found = l1_table.decode(value)
    text = (
        f"the L2 table is at {found.offset:#x}{', the only reference to it' * found.copied}"
        if found.offset
        else "no L2 table"
    )
    if found.reserved:
        text += f", reserved bits {found.reserved:#x}"
    return text, {"l2-table": found.offset or None, "copied": found.copied, "reserved": found.reserved}


def l2_words(header: Header, entry: Entry) -> tuple[str, dict[str, Any]]:
    """What an L2 entry says, in words and for programs."""
    found = l2_entry.decode(entry.entry, header.cluster_bits)
    details: dict[str, Any] = {"copied": found.copied, "reserved": found.reserved}
    if found.compressed:
        details |= {"status": "compressed", "offset": found.offset, "length": found.length}
        return f"compressed data at {found.offset:#x}, up to {found.length} bytes", details
    external = header.external_data
    stored = bool(found.offset) or (external and found.copied)
    where = f"at {found.offset:#x}{' of the data file' * external}" if stored else "nowhere"
    details |= {"offset": found.offset if stored else None}
    if header.extended_l2:
        whole = entry.entry | entry.bitmap << 64
        stores, zeros = allocated(whole), zeroed(whole)
        details |= {"allocated-subclusters": stores, "zero-subclusters": zeros}
        status = "data" if stores else "zero" if zeros else "unallocated"
        text = f"{stores.bit_count()} of {COUNT} subclusters stored, {zeros.bit_count()} zero; storage {where}"
    else:
        status = "zero" if found.zero else "data" if stored else "unallocated"
        words = {"data": f"data {where}", "zero": f"reads as zero, storage {where}", "unallocated": "not allocated"}
        text = words[status]
    text += ", the only reference" * found.copied + (f", reserved bits {found.reserved:#x}" if found.reserved else "")
    return text, details | {"status": status}
