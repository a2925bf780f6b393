"""Entries of L2 tables: decoding and encoding.

After "Cluster mapping" of the published specification. Only this module, `l2_extended` and `l2_external` use the bits of an
L2 entry; mappings, writes, compression and the check call them, and treat entries as opaque numbers.

The functions decode the first 64 bits of an entry, which have the same format in every image, except for the flag ZERO. An
`L2Layout` decodes what differs between images: the size of an entry, and ZERO. An entry of 16 bytes ("extended L2 entries")
is a number of 128 bits, whose upper half is the subcluster bitmap; the subclass of `L2Layout` in `l2_extended` decodes it.
The status of a disk is reported in *units*: clusters here, subclusters in that subclass.

Plain Python decodes single entries (`map_one`, `run`), numpy decodes columns of whole tables (`runs`).
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...block_runs import following
from ...format_node import Mapping
from ...status import COMPRESSED, DATA, PRESENT, ZERO
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...request import Child

_STORED, _ZEROED, _COMPRESSED = DATA | PRESENT, ZERO | PRESENT, DATA | PRESENT | COMPRESSED
# Module globals, since small reads look them up.
_OFFSET, _FLAG_ZERO, _FLAG_COMPRESSED, _FLAG_COPIED = q.OFFSET_MASK, q.ZERO, q.COMPRESSED, q.COPIED
_NAMES = _OFFSET | _FLAG_COMPRESSED
_OWN = _FLAG_COPIED | _FLAG_COMPRESSED
#: The bits in which a cluster and its successor must agree, the offset apart, to belong to one run.
_RUN_MASK = _OFFSET | _FLAG_COMPRESSED | _FLAG_ZERO
#: `runs` replaces each entry of a compressed cluster by this value.
_ANY_COMPRESSED = 2
#: The status flags of a cluster by the bits ZERO and `_ANY_COMPRESSED` of its entry in `runs`, plus 4 if it has an offset.
_FLAGS = bytes([0, _ZEROED, _COMPRESSED, 0, _STORED, _ZEROED, 0, 0])
_SWAP = sys.byteorder == "little"
_new = tuple.__new__


class InvalidEntry(ValueError):
    """The entry violates the specification; the text says how."""


# -- one entry


def is_compressed(entry: int) -> bool:
    """Whether the cluster is stored compressed."""
    return bool(entry & _FLAG_COMPRESSED)


def data_cluster(entry: int) -> int:
    """The offset of the host cluster that stores the data uncompressed, or is allocated for it; 0: there is none."""
    return 0 if entry & _FLAG_COMPRESSED else entry & _OFFSET


def own_cluster(entry: int) -> int:
    """The same, if the reference count of that cluster is one, so that it may be overwritten in place; else 0."""
    return entry & _OFFSET if entry & _OWN == _FLAG_COPIED else 0


def names_clusters(entry: int) -> bool:
    """Whether this entry is a reference to host clusters: to data, to compressed data, or to allocated storage."""
    return entry & _NAMES != 0


def own_entry(host: int) -> int:
    """The entry that points to the host cluster at `host`, as the only reference to it."""
    return host | _FLAG_COPIED


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The entry for `length` bytes of compressed data at `offset`."""
    further = (offset + length - 1) // q.SECTOR - offset // q.SECTOR
    return _FLAG_COMPRESSED | further << _sectors_at(cluster_bits) | offset


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(offset, length) of the compressed data to which an entry points: up to the end of its last sector."""
    at = _sectors_at(cluster_bits)
    offset = entry & max_compressed_offset(cluster_bits) - 1
    sectors = (entry >> at & (1 << 62 - at) - 1) + 1
    return offset, sectors * q.SECTOR - offset % q.SECTOR


def compressed_clusters(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(first, count) of the host clusters that the sectors of the compressed data overlap."""
    offset, length = compressed_range(entry, cluster_bits)
    first = offset >> cluster_bits
    return first, (offset + length - 1 >> cluster_bits) - first + 1


class Decoded(NamedTuple):
    """What an entry says. `offset`: where its data is, of compressed data with its `length` up to the end of its last
    sector; 0 in uncompressed entries: nowhere. `reserved`: the bits that must be 0 and are not."""

    compressed: bool
    offset: int
    length: int
    copied: bool
    zero: bool
    reserved: int


def decode(entry: int, cluster_bits: int) -> Decoded:
    """What the first 64 bits of an entry say, as they are in the file. (Extended entries have no flag ZERO there.)"""
    copied = bool(entry & _FLAG_COPIED)
    if entry & _FLAG_COMPRESSED:
        return Decoded(True, *compressed_range(entry, cluster_bits), copied, False, 0)
    reserved = entry & ~(_FLAG_COPIED | _OFFSET | _FLAG_ZERO)
    return Decoded(False, entry & _OFFSET, 1 << cluster_bits, copied, bool(entry & _FLAG_ZERO), reserved)


def max_compressed_offset(cluster_bits: int) -> int:
    """The offset before which compressed data must end."""
    return 1 << min(_sectors_at(cluster_bits), 56)


def _sectors_at(cluster_bits: int) -> int:
    """The lowest bit of the field with the number of additional sectors."""
    return 62 - (cluster_bits - 8)


class L2Layout:
    """The layout of the L2 entries of one image: their size, and everything that depends on it."""

    __slots__ = ("cluster_bits", "cluster_size", "index_bits", "misaligned", "not_simple", "per_sector", "per_table")

    #: The size of an entry is 1 << `entry_bits` bytes.
    entry_bits: ClassVar[int] = 3
    #: A cluster consists of 1 << `units_bits` units.
    units_bits: ClassVar[int] = 0
    #: Whether the offsets are those of an external data file, so that tables from the disk must be adopted.
    external: ClassVar[bool] = False

    def __init__(self, cluster_bits: int) -> None:
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        #: A table, which is one cluster, has `per_table` == 1 << `index_bits` entries.
        self.index_bits = cluster_bits - self.entry_bits
        self.per_table = 1 << self.index_bits
        #: The number of entries in a sector, which disks write atomically.
        self.per_sector = q.SECTOR >> self.entry_bits
        #: The bits of an offset that are zero at a cluster boundary, and the bits that exclude an entry from `map_one`.
        self.misaligned = _OFFSET & self.cluster_size - 1
        self.not_simple = _FLAG_COMPRESSED | self.misaligned

    # -- entries

    def reads_zero(self, entry: int) -> bool:
        """Whether the flags of the entry make the cluster read as zero, with or without storage. Not for compressed ones."""
        return bool(entry & _FLAG_ZERO)

    def zeroed(self, entry: int = 0) -> int:
        """The entry of a cluster that reads as zero and keeps the storage to which `entry` points."""
        return entry | _FLAG_ZERO

    def is_run(self, first: int, entry: int, clusters: int) -> bool:
        """Whether `entry` equals `first`, an entry of an uncompressed cluster, with the offset `clusters` clusters higher."""
        return entry == first + clusters * self.cluster_size

    # -- tables

    def blank(self) -> array[int]:
        """The entries of an empty table."""
        return array("Q", (0,)) * self.per_table

    def load(self, file: Child, offset: int) -> array[int]:
        """The entries of the table at `offset` of `file`."""
        entries = self.blank()  # an array made from bytes takes twice the memory
        file.read_into(offset, memoryview(entries).cast("B"))
        if _SWAP:
            entries.byteswap()
        return entries

    def adopt(self, words: Any, cluster: int, *, strict: bool) -> None:
        """Change the entries of consecutive tables (uint64) from their form on the disk to that in memory. `cluster`: the
        guest cluster of the first entry. `strict`: raise InvalidEntry for an invalid entry now, not when it is used."""

    def to_disk(self, entries: array[int]) -> bytes:
        """The entries in the byte order of the file."""
        copy = entries[:]
        if _SWAP:
            copy.byteswap()
        return copy.tobytes()

    def own_entries(self, host: int, clusters: int) -> array[int]:
        """The entries that point to consecutive host clusters from `host` on, as the only references to them."""
        first = host | _FLAG_COPIED
        return array("Q", range(first, first + (clusters << self.cluster_bits), self.cluster_size))

    # -- status

    def map_one(self, entry: int, within: int, length: int, file: Child) -> Mapping | None:
        """The mapping of `length` bytes of a cluster, from its byte `within` on; None if it is compressed or misaligned, or
        needs more than one row. Called for each small read."""
        if entry & self.not_simple:
            return None
        host = entry & _OFFSET
        if host:
            return _new(Mapping, (_ZEROED if entry & _FLAG_ZERO else _STORED, length, host + within, file, None))
        return _new(Mapping, (_ZEROED if entry & _FLAG_ZERO else 0, length, -1, None, None))

    def run(self, entries: Sequence[int], unit: int, stop: int) -> tuple[int, int, int, int]:
        """(flags, offset or -1, units, entry) of the run that begins with this unit of a table: the flags of `Mapping`, the
        host offset, the number of contiguous units with this status, up to `stop` (or fewer), and the entry of the first
        cluster. Raises InvalidEntry."""
        entry = entries[unit]
        if entry & _FLAG_COMPRESSED:
            return _COMPRESSED, -1, 1, entry
        host = entry & _OFFSET
        units = following(entries, unit, stop, _RUN_MASK, self.cluster_size if host else 0)
        if host:
            if host & self.misaligned:
                raise self.invalid(host)
            return _ZEROED if entry & _FLAG_ZERO else _STORED, host, units, entry
        return _ZEROED if entry & _FLAG_ZERO else 0, -1, units, entry

    def invalid(self, host: int) -> InvalidEntry:
        """The error for an entry that points to `host`, which is misaligned."""
        return InvalidEntry(f"an L2 entry points to {host:#x}, which is not a multiple of the cluster size")

    def column(self, entries: Any) -> Any:
        """The entries of a table in memory as a column of 64-bit words (uint64) that shares their memory."""
        from ...numeric import np

        return np.frombuffer(entries, np.uint64)

    def runs(self, words: Any, first: int, stop: int) -> tuple[Any, Any, Any]:
        """All runs of the units from `first` to `stop`, as columns (see `BlockRuns.add_runs`): the number of the first unit
        of each run, counted from `first`, its flags, and its offset or -1. `words`: the entries of consecutive tables
        (uint64). Raises InvalidEntry."""
        from ...numeric import np

        entries = words[first:stop]
        known = entries & np.uint64(_RUN_MASK)
        seen = int(np.bitwise_or.reduce(known))
        if not seen:
            return np.zeros(1, np.int64), np.zeros(1, np.uint8), np.full(1, -1)
        if seen & _FLAG_COMPRESSED:
            known[known >= np.uint64(_FLAG_COMPRESSED)] = _ANY_COMPRESSED
            seen = int(np.bitwise_or.reduce(known))
        known = known.view(np.int64)
        if seen & self.misaligned:
            raise self.invalid(int(known[(known & self.misaligned).nonzero()[0][0]] & _OFFSET))
        step = known[1:] - known[:-1]
        begins = np.ones(len(known), np.bool_)
        np.not_equal(step, np.where(known[:-1] >= q.SECTOR, self.cluster_size, 0), out=begins[1:])
        heads = begins.nonzero()[0]
        known = known[heads]
        has_offset = known >= q.SECTOR
        # Small columns, and changes in place: new memory of the size of `known` takes longer than the work on it.
        kinds = known.astype(np.uint8) & np.uint8(3) | has_offset.view(np.uint8) << np.uint8(2)
        known &= _OFFSET
        known[~has_offset] = -1
        return heads, np.frombuffer(_FLAGS, np.uint8).take(kinds), known


# -- columns of entries (uint64), for the check


def offset_field(entry: int) -> int:
    """The offset in an entry of an L1 or L2 table, without the flags."""
    return entry & _OFFSET


def compressed_mask(entries: Any) -> Any:
    """Which of these entries belong to compressed clusters."""
    return _any(entries, _FLAG_COMPRESSED)


def copied_mask(entries: Any) -> Any:
    """Which of these entries have the flag COPIED: their cluster has one reference."""
    return _any(entries, _FLAG_COPIED)


def with_copied(entries: Any, owned: Any) -> Any:
    """These entries with the flag COPIED where `owned` is true, and without it elsewhere."""
    from ...numeric import np

    return np.where(owned, entries | np.uint64(_FLAG_COPIED), entries & np.uint64(~_FLAG_COPIED & (1 << 64) - 1))


def zero_mask(entries: Any) -> Any:
    """Which of these entries, of uncompressed clusters, have the flag ZERO."""
    return _any(entries, _FLAG_ZERO)


def reserved_mask(entries: Any) -> Any:
    """Which of these entries, of uncompressed clusters, have bits that must be 0."""
    return _any(entries, ~(_FLAG_COPIED | _OFFSET | _FLAG_ZERO) & (1 << 64) - 1)


def offsets_of(entries: Any) -> Any:
    """The offsets (uint64) to which these entries, of uncompressed clusters, point; 0: none."""
    from ...numeric import np

    return entries & np.uint64(_OFFSET)


def compressed_ranges(entries: Any, cluster_bits: int) -> tuple[Any, Any]:
    """Begin and end (uint64) of the sectors to which these entries of compressed clusters point. The begin includes bits
    from 56 on, which must be 0."""
    from ...numeric import np

    at = _sectors_at(cluster_bits)
    begin = entries & np.uint64((1 << at) - 1)
    sectors = (entries >> np.uint64(at) & np.uint64((1 << 62 - at) - 1)) + np.uint64(1)
    in_sectors = begin & np.uint64((1 << 64) - q.SECTOR)
    return begin, in_sectors + sectors * np.uint64(q.SECTOR)


def owned_clusters(tables: Any, cluster_bits: int) -> tuple[Any, int] | None:
    """The host clusters (int64) to which the entries of these tables, one in each row, point, and how many do not follow the
    cluster before; None if an entry that is not 0 has any other flag than COPIED, or an offset inside a cluster. It takes a
    third of the time that a look at each flag takes."""
    from ...numeric import np

    used = tables != 0
    entries = tables[used]
    others = (1 << 64) - 1 & ~(_FLAG_COPIED | _OFFSET) | (1 << cluster_bits) - 1
    if int(np.bitwise_or.reduce(entries)) & others or not int(np.bitwise_and.reduce(entries)) & _FLAG_COPIED:
        return None
    entries &= np.uint64(_OFFSET)
    clusters = entries.view(np.int64)
    clusters >>= cluster_bits
    if not clusters.all():
        return None
    jump = clusters[1:] - clusters[:-1] != 1
    ends = np.cumsum(np.count_nonzero(used, axis=1))
    jump[ends[(ends > 0) & (ends < len(clusters))] - 1] = False  # two tables
    return clusters, int(np.count_nonzero(jump))


def _any(entries: Any, bits: int) -> Any:
    from ...numeric import np

    return entries & np.uint64(bits) != 0
