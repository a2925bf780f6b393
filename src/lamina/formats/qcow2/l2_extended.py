"""Extended L2 entries, of 16 bytes: the subclusters of each cluster.

After "Extended L2 Entries" of the published specification. An entry is a number of 128 bits: the lower half has the format of
a standard entry without the flag ZERO, the upper half is the subcluster bitmap. Its bit x says that subcluster x is
allocated, its bit 32 + x that the subcluster reads as zero; both at once, or an allocated subcluster without a host cluster,
are invalid. Compressed clusters have no subclusters, and their bitmap is not used.

`ExtendedL2Layout` decodes entries for the mapping, `subclusters` changes them for writes, and the functions at the end decode
columns for the check.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, Final

from ...format_node import Mapping
from ...status import COMPRESSED, DATA, PRESENT, ZERO
from . import layout as q
from .l2_entry import InvalidEntry, L2Layout

if TYPE_CHECKING:
    from ...request import Child

#: The subclusters of a cluster, and a bitmap of all of them.
COUNT: Final = 32
ALL: Final = (1 << COUNT) - 1

_STORED, _ZEROED, _COMPRESSED = DATA | PRESENT, ZERO | PRESENT, DATA | PRESENT | COMPRESSED
# Module globals, since small reads look them up.
_OFFSET, _FLAG_COMPRESSED, _WORD = q.OFFSET_MASK, q.COMPRESSED, (1 << 64) - 1
#: The bitmap of a cluster all of whose subclusters have these status flags.
_ALIKE = {0: 0, _STORED: ALL, _ZEROED: ALL << COUNT}
#: The status flags of a subcluster by its two bits: allocated, and reads as zero.
_FLAGS = bytes([0, _STORED, _ZEROED, 0])
_SWAP = sys.byteorder == "little"
_new = tuple.__new__


# -- one entry


def allocated(entry: int) -> int:
    """The bitmap of the allocated subclusters of an uncompressed cluster."""
    return entry >> 64 & ALL


def zeroed(entry: int) -> int:
    """The bitmap of the subclusters of an uncompressed cluster that read as zero by their flag."""
    return entry >> 96


def with_subclusters(entry: int, allocated: int, zeroed: int) -> int:
    """The entry with these bitmaps."""
    return entry & _WORD | allocated << 64 | zeroed << 96


class ExtendedEntries:
    """The entries of a table in memory, or a part of them: a sequence of numbers of 128 bits over an array of 64-bit words.
    Indexes are not negative, and slices have no step. An interrupt does not divide the change of an entry."""

    __slots__ = ("words",)

    def __init__(self, words: array[int]) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words) >> 1

    def __getitem__(self, index: Any) -> Any:
        if type(index) is slice:
            low, high, _ = index.indices(len(self))
            return ExtendedEntries(self.words[2 * low : 2 * high])
        return self.words[2 * index] | self.words[2 * index + 1] << 64

    def __setitem__(self, index: Any, entry: Any) -> None:
        words = self.words
        if type(index) is slice:
            low, high, _ = index.indices(len(self))
            words[2 * low : 2 * high] = entry.words
            return
        at, low, high = 2 * index, entry & _WORD, entry >> 64
        words[at] = low
        words[at + 1] = high


class ExtendedL2Layout(L2Layout):
    """The layout of extended L2 entries. A unit of the status is a subcluster."""

    __slots__ = ("unit_bits",)

    entry_bits = 4
    units_bits = 5

    def __init__(self, cluster_bits: int) -> None:
        super().__init__(cluster_bits)
        #: A subcluster has 1 << `unit_bits` bytes.
        self.unit_bits = cluster_bits - self.units_bits

    # -- entries

    def reads_zero(self, entry: int) -> bool:
        return zeroed(entry) == ALL

    def zeroed(self, entry: int = 0) -> int:
        return with_subclusters(entry, 0, ALL)

    # -- tables

    def blank(self) -> Any:
        return ExtendedEntries(array("Q", (0,)) * (2 * self.per_table))

    def load(self, file: Child, offset: int) -> Any:
        entries = self.blank()
        file.read_into(offset, memoryview(entries.words).cast("B"))
        if _SWAP:
            entries.words.byteswap()
        return entries

    def to_disk(self, entries: Any) -> bytes:
        return super().to_disk(entries.words)

    def own_entries(self, host: int, clusters: int) -> Any:
        """As for standard entries, with all subclusters allocated."""
        words = array("Q", (ALL,)) * (2 * clusters)
        words[::2] = super().own_entries(host, clusters)
        return ExtendedEntries(words)

    # -- status

    def map_one(self, entry: int, within: int, length: int, file: Child) -> Mapping | None:
        if entry & self.not_simple:
            return None
        bits = self.unit_bits
        mask = (2 << (within + length - 1 >> bits)) - (1 << (within >> bits))
        host, stored, zero = entry & _OFFSET, entry >> 64 & mask, entry >> 96 & mask
        if stored:
            if stored != mask or zero or not host:
                return None
            return _new(Mapping, (_STORED, length, host + within, file, None))
        if zero:
            if zero != mask:
                return None
            if host:
                return _new(Mapping, (_ZEROED, length, host + within, file, None))
            return _new(Mapping, (_ZEROED, length, -1, None, None))
        return _new(Mapping, (0, length, -1, None, None))

    def run(self, entries: Any, unit: int, stop: int) -> tuple[int, int, int, int]:
        index, at = unit >> 5, unit & 31
        entry = entries[index]
        if entry & _FLAG_COMPRESSED:
            return _COMPRESSED, -1, min(COUNT - at, stop - unit), entry
        host, bitmap = entry & _OFFSET, entry >> 64
        if host & self.misaligned:
            raise self.invalid(host)
        stored, zero = bitmap >> at & 1, bitmap >> COUNT + at & 1
        if stored and (zero or not host):
            raise InvalidEntry(
                "a subcluster is both allocated and zero"
                if zero
                else "a subcluster is allocated without a host cluster"
            )
        flags = _STORED if stored else _ZEROED if zero else 0
        place = host + (at << self.unit_bits) if flags and host else -1
        # The lowest bit of a subcluster that differs ends the run.
        differs = ((bitmap & ALL ^ -stored & ALL) | (bitmap >> COUNT ^ -zero & ALL)) >> at
        if differs:
            units = (differs & -differs).bit_length() - 1
            return flags, place, min(units, stop - unit), entry
        alike = _ALIKE[flags]
        index += 1
        while index << 5 < stop:
            follower = entries[index]
            host += self.cluster_size if host else 0
            if follower >> 64 != alike or follower & _FLAG_COMPRESSED or follower & self.misaligned:
                break
            if flags and follower & _OFFSET != host:
                break
            index += 1
        return flags, place, min(index << 5, stop) - unit, entry

    def column(self, entries: Any) -> Any:
        return super().column(entries.words)

    def runs(self, words: Any, first: int, stop: int) -> tuple[Any, Any, Any]:
        from ...numeric import np

        low, high = first >> 5, -(-stop >> 5)
        words = words[2 * low : 2 * high]
        if not words.any():
            return np.zeros(1, np.int64), np.zeros(1, np.uint8), np.full(1, -1)
        entries, bitmaps = words[::2], words[1::2]
        packed = entries & np.uint64(_FLAG_COMPRESSED) != 0
        host = (entries & np.uint64(_OFFSET)).view(np.int64)
        host[packed] = 0
        misaligned = (host & self.misaligned).nonzero()[0]
        if len(misaligned):
            raise self.invalid(int(host[misaligned[0]]))
        bitmaps = np.where(packed, np.uint64(0), bitmaps)
        # A row for each cluster, and 32 rows for a cluster with different subclusters.
        stored, zero = bitmaps & np.uint64(ALL), bitmaps >> np.uint64(COUNT)
        mixed = (stored != 0) & (stored != ALL) | (zero != 0) & (zero != ALL)
        size: Any = np.full(len(bitmaps), COUNT)
        start = np.arange(low, high, dtype=np.int64) * COUNT
        at: Any = np.zeros(len(bitmaps), np.int64)  # the first subcluster of a row
        if mixed.any():
            rows = np.where(mixed, COUNT, 1)
            at = np.arange(int(rows.sum())) - np.repeat(np.cumsum(rows) - rows, rows)
            start = np.repeat(start, rows) + at
            size = np.repeat(np.where(mixed, 1, COUNT), rows)
            bitmaps, host, packed = (np.repeat(column, rows) for column in (bitmaps, host, packed))
        begin, end = np.maximum(start, first), np.minimum(start + size, stop)
        inside = begin < end
        if not inside.all():
            start, begin, end, at, bitmaps, host, packed = (
                column[inside] for column in (start, begin, end, at, bitmaps, host, packed)
            )
        at = at + (begin - start)
        bit = at.astype(np.uint64)
        stored, zero = bitmaps >> bit & np.uint64(1), bitmaps >> bit + np.uint64(COUNT) & np.uint64(1)
        if ((stored != 0) & ((zero != 0) | (host == 0))).any():
            raise InvalidEntry("a subcluster is allocated without a host cluster, or is both allocated and zero")
        flags = np.frombuffer(_FLAGS, np.uint8).take((stored | zero << np.uint64(1)).astype(np.int64))
        place = np.where((flags != 0) & (host != 0), host + (at << self.unit_bits), -1)
        flags[packed] = _COMPRESSED
        heads = np.ones(len(flags), np.bool_)
        expected = np.where(place[:-1] >= 0, place[:-1] + (end - begin << self.unit_bits)[:-1], -1)
        heads[1:] = (place[1:] != expected) | (flags[1:] != flags[:-1])
        return begin[heads] - first, flags[heads], place[heads]


# -- columns (uint64), for the check


def halves(words: Any) -> tuple[Any, Any]:
    """The descriptors and the subcluster bitmaps of these tables, which have a row each."""
    return words[:, ::2], words[:, 1::2]


def allocated_mask(bitmaps: Any) -> Any:
    """Which of these bitmaps have an allocated subcluster."""
    from ...numeric import np

    return bitmaps & np.uint64(ALL) != 0


def contradictory_mask(bitmaps: Any) -> Any:
    """Which of these bitmaps have a subcluster that is both allocated and zero."""
    from ...numeric import np

    return bitmaps & bitmaps >> np.uint64(COUNT) != 0
