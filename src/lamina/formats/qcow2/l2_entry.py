"""Entries of L2 tables: what an entry says of its cluster of the disk, and how an entry is made.

After "Cluster mapping" of the published specification. Mappings, writes, compression and the check ask this module, and no
other module looks at the bits of an entry; they pass entries on as numbers.

The first 64 bits of an entry are the same in every image, but for the flag ZERO, and the functions here read them. What
depends on the image, such as the size of an entry, is a matter of its `L2Layout`. An entry of 16 bytes ("extended L2
entries") is one number, too: its second half, the bitmap of the subclusters, is its bits from 64 on. A subclass of `L2Layout`
reads these, and a sequence of such numbers takes the place of the array of `blank`. The status of a disk is told in *units*:
here these are clusters, and with extended entries subclusters. (`tests/unit/test_qcow2_l2_layouts.py` has such a layout.)

Single entries are read in plain Python (`map_one`, `run`), whole tables as columns of numpy (`runs`).
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, ClassVar

from ...block_runs import following
from ...format_node import Mapping
from ...status import COMPRESSED, DATA, PRESENT, ZERO
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...request import Child

_STORED, _ZEROED, _COMPRESSED = DATA | PRESENT, ZERO | PRESENT, DATA | PRESENT | COMPRESSED
# The path of small reads looks these up in one step.
_OFFSET, _FLAG_ZERO, _FLAG_COMPRESSED, _FLAG_COPIED = q.OFFSET_MASK, q.ZERO, q.COMPRESSED, q.COPIED
_NAMES = _OFFSET | _FLAG_COMPRESSED
_OWN = _FLAG_COPIED | _FLAG_COMPRESSED
#: What must go on, or be alike, for the next cluster to be of the same run.
_RUN_MASK = _OFFSET | _FLAG_COMPRESSED | _FLAG_ZERO
#: In the columns of `runs` it stands for an entry of a compressed cluster, whose other bits do not matter there.
_ANY_COMPRESSED = 2
#: The flags of a cluster by what `runs` knows of its entry: the bits ZERO and `_ANY_COMPRESSED`, and 4 if it has an offset.
_FLAGS = bytes([0, _ZEROED, _COMPRESSED, 0, _STORED, _ZEROED, 0, 0])
_SWAP = sys.byteorder == "little"
_new = tuple.__new__


class InvalidEntry(ValueError):
    """An entry says what cannot be. The text tells what."""


# -- one entry


def is_compressed(entry: int) -> bool:
    """Whether the cluster is stored compressed."""
    return bool(entry & _FLAG_COMPRESSED)


def data_cluster(entry: int) -> int:
    """The offset of the host cluster that holds the data uncompressed, or is kept for it; 0: there is none."""
    return 0 if entry & _FLAG_COMPRESSED else entry & _OFFSET


def own_cluster(entry: int) -> int:
    """The same, where that cluster has one reference, this one, and may be written in place; else 0."""
    return entry & _OFFSET if entry & _OWN == _FLAG_COPIED else 0


def names_clusters(entry: int) -> bool:
    """Whether a host cluster counts this entry among its references, whatever is stored there."""
    return entry & _NAMES != 0


def own_entry(host: int) -> int:
    """The entry for the host cluster at `host`, to which it is the only reference."""
    return host | _FLAG_COPIED


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The entry for `length` bytes of compressed data at `offset`."""
    further = (offset + length - 1) // q.SECTOR - offset // q.SECTOR
    return _FLAG_COMPRESSED | further << _sectors_at(cluster_bits) | offset


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(offset, length) of the compressed data that an entry names: up to the end of its last sector."""
    at = _sectors_at(cluster_bits)
    offset = entry & max_compressed_offset(cluster_bits) - 1
    sectors = (entry >> at & (1 << 62 - at) - 1) + 1
    return offset, sectors * q.SECTOR - offset % q.SECTOR


def compressed_clusters(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(first, count): the host clusters that the sectors of the compressed data touch."""
    offset, length = compressed_range(entry, cluster_bits)
    first = offset >> cluster_bits
    return first, (offset + length - 1 >> cluster_bits) - first + 1


def max_compressed_offset(cluster_bits: int) -> int:
    """Compressed data must end before this."""
    return 1 << min(_sectors_at(cluster_bits), 56)


def _sectors_at(cluster_bits: int) -> int:
    """The bit at which the number of further sectors begins."""
    return 62 - (cluster_bits - 8)


class L2Layout:
    """The entries of the L2 tables of one image: their size, and what depends on it."""

    __slots__ = ("cluster_bits", "cluster_size", "index_bits", "misaligned", "not_simple", "per_sector", "per_table")

    #: Bytes of an entry, as a power of two.
    entry_bits: ClassVar[int] = 3
    #: Units of a cluster, as a power of two.
    units_bits: ClassVar[int] = 0

    def __init__(self, cluster_bits: int) -> None:
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        #: A table, which is a cluster, has `per_table`, 1 << `index_bits`, entries.
        self.index_bits = cluster_bits - self.entry_bits
        self.per_table = 1 << self.index_bits
        #: The entries in a sector, which a disk writes at once.
        self.per_sector = q.SECTOR >> self.entry_bits
        #: The bits of an offset that does not lie on a cluster, and those that an entry of `map_one` has none of.
        self.misaligned = _OFFSET & self.cluster_size - 1
        self.not_simple = _FLAG_COMPRESSED | self.misaligned

    # -- entries

    def reads_zero(self, entry: int) -> bool:
        """Whether the cluster reads as zero by a flag (storage may be kept for it). Not for compressed clusters."""
        return bool(entry & _FLAG_ZERO)

    def zeroed(self, entry: int = 0) -> int:
        """The entry by which the cluster reads as zero, with the storage that `entry` names kept."""
        return entry | _FLAG_ZERO

    def is_run(self, first: int, entry: int, clusters: int) -> bool:
        """Whether `entry` is as `first`, of an uncompressed cluster, but for its host cluster, which lies so many behind."""
        return entry == first + clusters * self.cluster_size

    # -- tables

    def blank(self) -> array[int]:
        """The entries of a table that says nothing."""
        return array("Q", (0,)) * self.per_table

    def load(self, file: Child, offset: int) -> array[int]:
        """The entries of the table at `offset` of `file`."""
        entries = self.blank()  # from bytes it would take twice the memory
        file.read_into(offset, memoryview(entries).cast("B"))
        if _SWAP:
            entries.byteswap()
        return entries

    def to_disk(self, entries: array[int]) -> bytes:
        """These entries as they are stored."""
        copy = entries[:]
        if _SWAP:
            copy.byteswap()
        return copy.tobytes()

    def own_entries(self, host: int, clusters: int) -> array[int]:
        """The entries for so many host clusters from `host` on, each with one reference."""
        first = host | _FLAG_COPIED
        return array("Q", range(first, first + (clusters << self.cluster_bits), self.cluster_size))

    # -- what a table says of clusters

    def map_one(self, entry: int, within: int, length: int, file: Child) -> Mapping | None:
        """The mapping of `length` bytes from the byte `within` of a cluster on, which end inside it; None if it is compressed
        or misaligned. The path of small reads."""
        if entry & self.not_simple:
            return None
        host = entry & _OFFSET
        if host:
            return _new(Mapping, (_ZEROED if entry & _FLAG_ZERO else _STORED, length, host + within, file, None))
        return _new(Mapping, (_ZEROED if entry & _FLAG_ZERO else 0, length, -1, None, None))

    def run(self, entries: Sequence[int], unit: int, stop: int) -> tuple[int, int, int, int]:
        """(flags, offset or -1, units, entry): what this unit of the table is, for how many units, up to `stop`, this goes on
        and is contiguous (or for fewer), and the entry of its cluster. The flags are those of `Mapping`. Raises
        InvalidEntry."""
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
        """The error for an entry that names the host cluster at `host`, which is misaligned."""
        return InvalidEntry(f"an L2 entry names a cluster at {host:#x}, which is not a multiple of the cluster size")

    def column(self, entries: Any) -> Any:
        """The entries of a table in memory as a column of words (uint64), which share their memory."""
        from ...numeric import np

        return np.frombuffer(entries, np.uint64)

    def runs(self, words: Any, first: int, stop: int) -> tuple[Any, Any, Any]:
        """The same of the units from `first` to `stop` as columns (see `BlockRuns.add_runs`): the number of the first unit of
        each run, counted from `first`, its flags, and its offset or -1. `words`: the entries of consecutive tables, uint64.
        Raises InvalidEntry."""
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
        goes_on = np.where(known[:-1] >= q.SECTOR, step == self.cluster_size, step == 0)
        heads = np.concatenate((np.zeros(1, np.int64), np.logical_not(goes_on, out=goes_on).nonzero()[0] + 1))
        known = known[heads]
        has_offset = known >= q.SECTOR
        flags = np.frombuffer(_FLAGS, np.uint8)[(known & 3) + 4 * has_offset]
        return heads, flags, np.where(has_offset, known & _OFFSET, -1)


# -- columns of entries (uint64), for the check


def offset_field(entry: int) -> int:
    """The offset in an entry of any table, without the flags."""
    return entry & _OFFSET


def compressed_mask(entries: Any) -> Any:
    """Which of these entries are those of compressed clusters."""
    return _any(entries, _FLAG_COMPRESSED)


def copied_mask(entries: Any) -> Any:
    """Which of these entries say that their cluster has one reference."""
    return _any(entries, _FLAG_COPIED)


def zero_mask(entries: Any) -> Any:
    """Which of these entries, of uncompressed clusters, say that it reads as zero."""
    return _any(entries, _FLAG_ZERO)


def reserved_mask(entries: Any) -> Any:
    """Which of these entries, of uncompressed clusters, have bits that must be 0."""
    return _any(entries, ~(_FLAG_COPIED | _OFFSET | _FLAG_ZERO) & (1 << 64) - 1)


def offsets_of(entries: Any) -> Any:
    """The offsets (uint64) that these entries, of uncompressed clusters, name; 0: none."""
    from ...numeric import np

    return entries & np.uint64(_OFFSET)


def compressed_ranges(entries: Any, cluster_bits: int) -> tuple[Any, Any]:
    """Begin and end (uint64) of the sectors that these entries of compressed clusters name. Bits from 56 on of the begin,
    which must be 0, count."""
    from ...numeric import np

    at = _sectors_at(cluster_bits)
    begin = entries & np.uint64((1 << at) - 1)
    sectors = (entries >> np.uint64(at) & np.uint64((1 << 62 - at) - 1)) + np.uint64(1)
    in_sectors = begin & np.uint64((1 << 64) - q.SECTOR)
    return begin, in_sectors + sectors * np.uint64(q.SECTOR)


def _any(entries: Any, bits: int) -> Any:
    from ...numeric import np

    return entries & np.uint64(bits) != 0
