"""Changes of an image that concern many reference counts at once: new tables beside the old ones, published by one write.

Snapshots are made, applied and deleted by changing the counts of nearly all clusters, and with them the flags COPIED of the
active tables. Counts and flags lie in different sectors: changed in place, one after the other, they would contradict each
other when the power is cut in between. So every block and table that changes is written anew into free clusters, to which
nothing points. Then one write of the header, within its sector, replaces the active L1 table, the refcount table and the
snapshot table. Whatever happens before leaves the old image, with no more than free clusters written; whatever happens after
finds the new one.

After "Host cluster management" and "Snapshots" of the published specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import BlockIOError, CorruptImage, LimitExceeded
from ...limits import MAX_SIZE, MIB, align_up
from ...numeric import np
from . import l1_table, l2_entry, snapshot_table
from . import layout as q
from .l2_batches import BATCH, host_clusters, read_tables
from .refcount_block import unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .cluster_set import ClusterSet
    from .snapshot_table import Entry
    from .tables import Tables

#: L2 tables of more bytes than twice what the file stores, and this, lie over one another or in holes.
_SLACK = 64 * MIB
#: Bytes of memory for each cluster of the file: its count before and after, and its place in the list of free clusters.
_PER_CLUSTER = 16
_ENOSPC = 28


class L1Place(NamedTuple):
    """An L1 table in the file."""

    offset: int
    entries: int


class Rewrite:
    """One such change of the image of `tables`, which are all on disk, and which no other thread uses meanwhile. Call
    `count_path` and `release` for the L1 tables that come and go, then `publish`."""

    def __init__(self, tables: Tables, book: Callable[[int], None]) -> None:
        """`book` is called with the bytes of memory that this takes, before they are allocated."""
        self._tables, self._book = tables, book
        self._file, self._header = tables.file, tables.header
        self._bits, self._cluster = self._header.cluster_bits, self._header.cluster_size
        self._layout = tables.mappings.layout
        self._metadata = self._claimed()
        # Where this fails, the counts are read again: they say from where on the file was never written.
        tables.forget_refcounts()
        self._path = self._file.node.filename
        #: Bits of a count in the blocks that are written.
        self._bits_of_counts = self._header.refcount_bits
        self._most = (1 << self._bits_of_counts) - 1
        self._per_block = self._cluster * 8 >> self._header.refcount_order
        self._walked = 0
        allocated = self._file.node.allocated
        self._may_walk = 2 * (self._file.size if allocated is None else allocated) + _SLACK
        self._table = self._refcount_table()
        self._passed = 0
        self._prepare()

    def _claimed(self) -> ClusterSet:
        """The clusters with metadata. No two structures lie over each other, and no cluster has more references than its
        count says: what seems to be free is free."""
        counts = self._tables.refcounts
        counts.scan()
        return counts.metadata

    def _prepare(self) -> None:
        #: The count of each cluster of the file, and some behind it.
        self._counts = self._load_counts()
        self._before = self._counts.copy()
        #: The clusters that nothing on disk refers to, in order; `_passed` of them are not to be looked at any more.
        self._free = np.flatnonzero(self._counts == 0)

    # -- counts

    def _refcount_table(self) -> Any:
        header = self._header
        raw = bytearray(header.refcount_table_clusters << self._bits)
        self._file.read_into(header.refcount_table_offset, memoryview(raw))
        entries = np.frombuffer(raw, ">u8").astype(np.uint64) & np.uint64(q.REFBLOCK_MASK)
        if int(entries.max(initial=0)) > MAX_SIZE:
            raise self._corrupt("a refcount block is outside the file", 0)
        return entries.astype(np.int64)

    def _load_counts(self) -> Any:
        used = np.flatnonzero(self._table)
        blocks = max(int(used[-1]) + 1 if len(used) else 0, 1)
        clusters = max(blocks * self._per_block, -(-self._file.size >> self._bits))
        kind = np.uint64 if self._header.refcount_order > 5 else np.uint32
        clusters = align_up(clusters, self._per_block)
        self._book(clusters * _PER_CLUSTER)
        counts = np.zeros(clusters, kind)
        for which in used.tolist():
            at = which * self._per_block
            counts[at : at + self._per_block] = unpacked(
                self._read_cluster(int(self._table[which])), self._header.refcount_bits
            )
        return counts

    def _packed(self, counts: Any) -> bytes:
        bits = self._bits_of_counts
        if bits >= 8:
            return bytes(counts.astype(f">u{bits // 8}").tobytes())
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        parts = counts.astype(np.uint8).reshape(-1, 8 // bits) << shifts
        return bytes(np.bitwise_or.reduce(parts, axis=1).astype(np.uint8).tobytes())

    def _change(self, clusters: Any, by: int) -> None:
        """Raise or lower the count of each of these clusters (int64), once for each time that it is there."""
        if not len(clusters):
            return
        if int(clusters.min()) < 0 or int(clusters.max()) >= len(self._counts):
            raise self._corrupt("an entry points beyond the end of the file", int(clusters.max()))
        counts = self._counts
        if by < 0:
            which, times = np.unique(clusters, return_counts=True)
            wrong = np.flatnonzero(times > counts[which])
            if len(wrong):
                raise self._corrupt("a cluster in use is counted too low", int(which[wrong[0]]))
            counts[which] -= times.astype(counts.dtype)
            return
        wrong = np.flatnonzero(counts[clusters] == 0)
        if len(wrong):
            raise self._corrupt("a cluster in use is counted as free", int(clusters[wrong[0]]))
        one = counts.dtype.type(1)  # an int would make floating-point numbers of counts of 64 bits
        np.add.at(counts, clusters, one)
        raised = counts[clusters]
        if int(raised.max()) > self._most or not raised.all():
            raise LimitExceeded(
                f"a cluster would have more references than {self._header.refcount_bits} bits count",
                path=self._path,
                hint="convert the image to one with larger counts (refcount_bits)",
            )

    def _corrupt(self, what: str, cluster: int) -> CorruptImage:
        return CorruptImage(what, path=self._path, offset=cluster << self._bits, hint="check the image")

    def _read_cluster(self, offset: int) -> bytearray:
        if offset % self._cluster or offset >= self._file.size:
            raise self._corrupt("a table is misaligned or outside the file", offset >> self._bits)
        raw = bytearray(self._cluster)
        self._file.read_into(offset, memoryview(raw))
        return raw

    # -- references

    def entries_of(self, place: L1Place) -> Any:
        """The entries of this L1 table (uint64)."""
        raw = bytearray(place.entries * 8)
        self._file.read_into(place.offset, memoryview(raw))
        return np.frombuffer(raw, ">u8").astype(np.uint64)

    def count_path(self, entries: Any, by: int) -> None:
        """Count one reference more (`by` 1) or less (-1) to each L2 table of these L1 entries, and to each cluster to which
        the L2 tables point."""
        offsets = l1_table.offsets_of(entries).astype(np.int64)
        offsets = offsets[offsets != 0]
        self._change(offsets >> self._bits, by)
        for _, words in self._l2_tables(offsets):
            for clusters in host_clusters(words, self._layout, self._path):
                self._change(clusters, by)

    def _l2_tables(self, offsets: Any) -> Iterator[tuple[Any, Any]]:
        """(offsets, entries as one column) of these L2 tables, in batches."""
        for part, words in read_tables(self._file, offsets, self._bits):
            self._walked += len(part) << self._bits
            if self._walked > self._may_walk:
                raise CorruptImage("the L2 tables cannot all lie in the file", path=self._path, hint="check the image")
            yield part, words

    def release(self, offset: int, length: int) -> None:
        """The clusters of a structure of `length` bytes at `offset` lose a reference."""
        first = offset >> self._bits
        self._change(np.arange(first, first + (-(-length >> self._bits)), dtype=np.int64), -1)

    # -- new clusters

    def _allocate(self, clusters: int) -> int:
        """The offset of so many consecutive clusters, free before and now, which nothing that is on disk refers to."""
        first = self._find(clusters)
        if first < 0:
            old, more = len(self._counts), align_up(clusters, self._per_block)
            zeros = np.zeros(more, self._counts.dtype)
            self._counts, self._before = np.append(self._counts, zeros), np.append(self._before, zeros)
            self._free = np.append(self._free, np.arange(old, old + more))
            first = self._find(clusters)
        end = first + clusters << self._bits
        if self._metadata.first_of(first, first + clusters) >= 0:
            raise self._corrupt("a cluster with metadata is counted as free", first)
        if end > q.MAX_HOST_OFFSET:
            raise LimitExceeded("the image file has reached the largest size that qcow2 can address", path=self._path)
        if end > self._file.node.size and not self._file.node.growable:
            raise BlockIOError("no space is left in the storage", errno=_ENOSPC, path=self._path)
        self._counts[first : first + clusters] = 1
        return first << self._bits

    def _find(self, clusters: int) -> int:
        """The first of so many consecutive free clusters, or -1."""
        if clusters == 1:
            while self._passed < len(self._free):
                cluster = int(self._free[self._passed])
                self._passed += 1
                if not self._counts[cluster]:
                    return cluster
            return -1
        free = self._free[self._passed :]
        free = free[self._counts[free] == 0]
        heads = np.flatnonzero(np.diff(free, prepend=-2) != 1)
        long = np.flatnonzero(np.diff(heads, append=len(free)) >= clusters)
        return int(free[heads[long[0]]]) if len(long) else -1

    def _write(self, offset: int, data: bytes) -> None:
        self._file.write(offset, memoryview(data.ljust(align_up(len(data), self._cluster), b"\0")))

    # -- the active table

    def _own_flags(self, entries: Any) -> Any:
        """The active L1 entries with their flags as the counts ask for. L2 tables whose flags are wrong are written anew."""
        entries = l1_table.offsets_of(entries)
        # Nothing in an external data file is counted, and the flags of its clusters do not depend on counts.
        which = np.flatnonzero(entries if not self._header.external_data else entries[:0])
        step = max(BATCH >> self._bits, 1)
        stride = 1 << self._layout.entry_bits - 3
        per_table = self._cluster // 8
        for at in range(0, len(which), step):
            part = which[at : at + step]
            for offsets, words in self._l2_tables(entries[part].astype(np.int64)):
                column = words[::stride]
                wanted = self._with_flags(column)
                changed = (wanted != column).reshape(len(offsets), -1).any(axis=1)
                words[::stride] = wanted
                for number in np.flatnonzero(changed).tolist():
                    new = self._allocate(1)
                    table = words[number * per_table : (number + 1) * per_table]
                    self._write(new, bytes(table.astype(">u8").tobytes()))
                    self._change(np.array([int(offsets[number]) >> self._bits]), -1)
                    entries[part[number]] = new
        only = self._counts[(entries >> np.uint64(self._bits)).astype(np.int64)] == 1
        return l1_table.with_copied(entries, (entries != 0) & only)

    def _with_flags(self, entries: Any) -> Any:
        """These L2 entries with COPIED where the count of their cluster is one, and nowhere else."""
        plain = ~l2_entry.compressed_mask(entries)
        offsets = np.where(plain, l2_entry.offsets_of(entries), np.uint64(0)).astype(np.int64)
        one = (offsets != 0) & (self._counts_at(offsets >> self._bits) == 1)
        return l2_entry.with_copied(entries, one)

    # -- the end

    def publish(self, active: Any, old: list[Entry], new: list[Entry], *, size: int) -> None:
        """Make `active` (L1 entries, whose references are counted) the L1 table of the disk, which has `size` bytes, and
        `new` the snapshots, in place of `old`. The old L1 table stays as it is: a caller that keeps it for no snapshot
        releases it before. After an error the image is as before."""
        header = self._header
        listed = b"".join(entry.to_bytes() for entry in new)
        if len(listed) > snapshot_table.MAX_BYTES or len(new) > q.MAX_SNAPSHOTS:
            raise LimitExceeded("the image has as many snapshots as it can have", path=self._path)
        if old:
            self.release(header.snapshots_offset, sum(len(entry.to_bytes()) for entry in old))
        values = {"size": size, "crypt_method": header.crypt_method}
        values |= {"nb_snapshots": len(new), "snapshots_offset": 0}
        entries = self._own_flags(active)
        raw = bytes(entries.astype(">u8").tobytes())
        values |= {"l1_size": len(entries), "l1_table_offset": 0}
        if raw:
            values["l1_table_offset"] = self._allocate(-(-len(raw) >> self._bits))
            self._write(values["l1_table_offset"], raw)
        if listed:
            values["snapshots_offset"] = self._allocate(-(-len(listed) >> self._bits))
            self._write(values["snapshots_offset"], listed)
        values["refcount_table_offset"], values["refcount_table_clusters"] = self._write_counts()
        self._file.flush()
        self._tables.switch(values | self._header_values())

    def _header_values(self) -> dict[str, int]:
        """Further fields that the same write changes; they follow those of `publish`, without a gap."""
        return {}

    def _write_counts(self) -> tuple[int, int]:
        """Write the blocks whose counts changed, and a table of all, to free clusters; its offset and its clusters."""
        header = self._header
        self._release_counts()
        new: dict[int, int] = {}
        table, table_clusters = -1, 0
        while True:
            # New blocks take clusters, whose counts lie in blocks that then change as well, until all have been counted.
            missing = [which for which in self._changed_blocks() if which not in new]
            for which in missing:
                new[which] = self._allocate(1)
                if which < len(self._table) and self._table[which]:
                    self._change(np.array([int(self._table[which]) >> self._bits]), -1)
            blocks = max(max(new, default=0) + 1, len(self._table))
            needed = align_up(blocks * 8, self._cluster) >> self._bits
            if needed > max(table_clusters, header.refcount_table_clusters) and table >= 0:
                self.release(table, table_clusters << self._bits)
                table = -1
            if table < 0:
                table_clusters = max(needed, header.refcount_table_clusters)
                if table_clusters << self._bits > max(q.MAX_REFTABLE_BYTES, self._cluster):
                    raise LimitExceeded("the refcount table has reached its largest size", path=self._path)
                table = self._allocate(table_clusters)
            elif not missing:
                break
        entries = np.zeros(table_clusters << self._bits - 3, np.int64)
        entries[: len(self._table)] = self._table
        for which, offset in new.items():
            entries[which] = offset
            at = which * self._per_block
            self._write(offset, self._packed(self._counts[at : at + self._per_block]))
        self._write(table, bytes(entries.astype(">u8").tobytes()))
        return table, table_clusters

    def _release_counts(self) -> None:
        """The refcount table of now is replaced, and so is each block when it changes."""
        header = self._header
        self.release(header.refcount_table_offset, header.refcount_table_clusters << self._bits)

    def _counts_at(self, clusters: Any) -> Any:
        highest = int(clusters.max(initial=0))
        if highest >= len(self._counts):
            raise self._corrupt("an entry points beyond the end of the file", highest)
        return self._counts[clusters]

    def _changed_blocks(self) -> list[int]:
        changed = np.flatnonzero(self._counts != self._before) // self._per_block
        return np.unique(changed).tolist()  # type: ignore[no-any-return]

    def freed(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is free now and was in use before, as far as it lies in the file."""
        gone = np.flatnonzero((self._counts == 0) & (self._before != 0))
        if not len(gone):
            return
        for run in np.split(gone, np.flatnonzero(np.diff(gone) != 1) + 1):
            start = int(run[0]) << self._bits
            stop = min(int(run[-1]) + 1 << self._bits, self._file.size)
            if start < stop:
                yield start, stop - start
