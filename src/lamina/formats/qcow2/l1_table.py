"""L1 tables: their entries, which point to L2 tables, and their offsets in the file.

An image has an active L1 table, and one for each snapshot. After "Cluster mapping" of the published specification.

The header of a file of a few KiB can describe an L1 table of 32 MiB that is one hole. Memory for such a table is mapped
anonymously, so that only the pages of the stored parts are allocated.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from . import layout as q
from .holes import has_hole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child

_SWAP = sys.byteorder == "little"
#: The size from which on a query for the holes of a table pays off, and the length of each query.
_SMALLEST = 256 << 10
_STEP = 64 << 10
#: The number of entries in one batch of a walk over all entries.
_BATCH = 1 << 16
#: Entries in one sector, which a disk writes at once.
_SECTOR = 512 // 8


def own_entry(l2_offset: int) -> int:
    """The entry that points to the L2 table at `l2_offset`, as the only reference to it."""
    return l2_offset | q.COPIED


class Decoded(NamedTuple):
    """What an entry says. `offset`: of the L2 table; 0: there is none. `reserved`: the bits that must be 0 and are not."""

    offset: int
    copied: bool
    reserved: int


def decode(entry: int) -> Decoded:
    """What an entry says, as it is in the file."""
    return Decoded(entry & q.OFFSET_MASK, bool(entry & q.COPIED), entry & ~(q.COPIED | q.OFFSET_MASK))


class L1Table:
    """One L1 table in memory; `write` and `write_changed` write it to the disk. Not thread-safe."""

    __slots__ = ("changed", "entries", "new", "offset", "published")

    def __init__(self, offset: int, entries: array[int] | memoryview[int], *, new: bool = False) -> None:
        #: Its offset in the file, in bytes.
        self.offset = offset
        self.entries = entries
        #: Nothing on the disk points to it yet.
        self.new = new
        #: The pointer to it on the disk is durable.
        self.published = not new
        #: Indexes of entries that are not on the disk yet.
        self.changed: set[int] = set()

    @classmethod
    def load(cls, file: Child, offset: int, count: int) -> L1Table:
        """The table of `count` entries at `offset` of `file`, which contains all of it."""
        if count * 8 < _SMALLEST or stored_bytes(file, offset, count) == count * 8:
            entries = array("Q", (0,)) * count
            _read(file, offset, entries)
            return cls(offset, entries)
        import mmap

        # Private: a forked process gets its own copy. (Without the flag there are no forks either.)
        how = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        view = memoryview(mmap.mmap(-1, count * 8, **how)).cast("Q")
        for start, stop in _stored(file, offset, count * 8):
            part = array("Q", (0,)) * (stop - start >> 3)
            _read(file, start, part)
            at = start - offset >> 3
            view[at : at + len(part)] = memoryview(part)
        return cls(offset, view)

    def __len__(self) -> int:
        return len(self.entries)

    def l2_offset(self, index: int) -> int:
        """The offset of the L2 table to which this entry points; 0: there is none."""
        return self.entries[index] & q.OFFSET_MASK

    def l2_offsets(self, first: int, count: int) -> list[int]:
        """`l2_offset` of `count` entries, from `first` on."""
        return [entry & q.OFFSET_MASK for entry in self.entries[first : first + count]]

    def owns(self, index: int) -> bool:
        """Whether this entry is the only reference to its L2 table."""
        return bool(self.entries[index] & q.COPIED)

    def existing(self, first: int, count: int) -> Any:
        """Which of `count` L2 tables, from that of the entry `first` on, exist, as a column."""
        from ...numeric import np

        return offsets_of(np.frombuffer(self.entries, np.uint64, count, 8 * first)) != 0

    def l2_clusters(self, bits: int, *, copied: bool) -> Iterator[list[int]]:
        """The clusters (of `1 << bits` bytes) of L2 tables, in batches: those of entries with the flag COPIED, or of those
        without."""
        mask, both, flag = q.OFFSET_MASK, q.COPIED | q.OFFSET_MASK, q.COPIED if copied else 0
        for at in range(0, len(self.entries), _BATCH):
            part = self.entries[at : at + _BATCH]
            yield [(e & mask) >> bits for e in part if e & q.COPIED == flag and e & both != flag]

    def grown(self, offset: int, count: int) -> L1Table:
        """A copy for another offset, extended to `count` entries with entries that point to nothing."""
        entries = array("Q", self.entries.tobytes())
        entries.frombytes(bytes(8 * (count - len(entries))))
        return L1Table(offset, entries, new=True)

    # -- changes and writes

    def ensure_stored(self, file: Child, index: int) -> None:
        """Make sure that the file has storage for this entry, so that writing it cannot fail with ENOSPC."""
        if self.new:
            return
        first = index - index % _SECTOR
        sector = self.entries[first : first + _SECTOR].tobytes()
        if not any(sector) and has_hole(file, self.offset + 8 * first, sector):
            file.write(self.offset + 8 * first, memoryview(sector))

    def write(self, file: Child) -> None:
        """Write all of it."""
        file.write(self.offset, memoryview(_big_endian(self.entries)))

    def write_changed(self, file: Child) -> None:
        """Write the changed entries. They stay in `changed` until the caller knows that they are durable."""
        for low, high in _runs(sorted(self.changed)):
            file.tell("l1_update")
            file.write(self.offset + 8 * low, memoryview(_big_endian(self.entries[low:high])))


# -- columns of entries (uint64)


def offsets_of(entries: Any) -> Any:
    """The offsets of the L2 tables to which these entries point; 0: none."""
    from ...numeric import np

    return entries & np.uint64(q.OFFSET_MASK)


def copied_mask(entries: Any) -> Any:
    """Which of these entries have the flag COPIED: their L2 table has one reference."""
    from ...numeric import np

    return entries & np.uint64(q.COPIED) != 0


def reserved_mask(entries: Any) -> Any:
    """Which of these entries have bits that must be 0."""
    from ...numeric import np

    return entries & np.uint64(~(q.COPIED | q.OFFSET_MASK) & (1 << 64) - 1) != 0


def with_copied(entries: Any, owned: Any) -> Any:
    """These entries with the flag COPIED where `owned` is true, and without it elsewhere."""
    from ...numeric import np

    return np.where(owned, entries | np.uint64(q.COPIED), entries & np.uint64(~q.COPIED & (1 << 64) - 1))


# -- reading and writing


def stored_bytes(file: Child, offset: int, count: int) -> int:
    """The number of bytes of this table of `count` entries that are not known to be zero, and must be read."""
    return sum(stop - start for start, stop in _stored(file, offset, 8 * count))


def _read(file: Child, offset: int, entries: array[int]) -> None:
    file.read_into(offset, memoryview(entries).cast("B"))
    if _SWAP:
        entries.byteswap()


def _stored(file: Child, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts [start, stop) that are not known to be zero. A small table is one part."""
    if length < _SMALLEST:
        yield offset, offset + length
        return
    for start in range(offset, offset + length, _STEP):
        stop = min(start + _STEP, offset + length)
        if not file.reads_zero(start, stop - start):
            yield start, stop


def _big_endian(entries: array[int] | memoryview[int]) -> bytes:
    copy = array("Q", entries.tobytes())
    if _SWAP:
        copy.byteswap()
    return copy.tobytes()


def _runs(indexes: list[int]) -> list[tuple[int, int]]:
    """Consecutive indexes as half-open ranges."""
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
