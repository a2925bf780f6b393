"""The L2 entries of an image with an external data file, for `check`: they refer to no cluster of the image file.

After "External data file bit" and "Standard Cluster Descriptor" of the published specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...numeric import np
from ...report import ERROR, NOTE
from . import l1_table, l2_entry, l2_extended

if TYPE_CHECKING:
    from .references import References

#: L1 entries, and bytes of L2 tables, in one batch.
_L1_BATCH: Final = 1 << 18
_BATCH: Final = 4 << 20


def check_entries(found: References) -> None:
    """Report the invalid entries of all L2 tables, and count the clusters. References to the tables are counted elsewhere."""
    header, size = found.header, found.cluster
    step = max(_BATCH // size, 1)
    for begin in range(0, header.l1_size, _L1_BATCH):
        entries = found.entries(header.l1_table_offset + 8 * begin, min(_L1_BATCH, header.l1_size - begin), "L1 table")
        offsets = l1_table.offsets_of(entries)
        usable = (offsets != 0) & (offsets % np.uint64(size) == 0) & (offsets < np.uint64(found.size))
        which = np.flatnonzero(usable)
        for at in range(0, len(which), step):
            part = which[at : at + step]
            if not found.may_walk(len(part) * size, "L2 tables"):
                return
            raw = bytearray().join(found.read(offset, size, "L2 table")[0] for offset in offsets[part].tolist())
            _tables(found, np.frombuffer(raw, ">u8").astype(np.uint64).reshape(len(part), -1), begin + part)


def _tables(found: References, tables: Any, which: Any) -> None:
    """Check these L2 tables, one in each row, which describe the clusters of these L1 entries."""
    report = found.report
    if found.header.extended_l2:
        tables, bitmaps = l2_extended.halves(tables)
        found.subclusters(tables, np.where(l2_entry.copied_mask(tables), np.uint64(0), bitmaps), 1)
        twice = l2_extended.contradictory_mask(bitmaps) & l2_entry.copied_mask(tables)
        text = "L2 entry {:#018x} has a subcluster that is both allocated and zero"
        found.each(ERROR, text.format, tables[twice])
    per_table = tables.shape[1]
    rows, columns = np.nonzero(tables)
    entries = tables[rows, columns]
    place = (which[rows] * per_table + columns).astype(np.uint64) << np.uint64(found.bits)
    compressed = l2_entry.compressed_mask(entries)
    text = "L2 entry {:#018x} is compressed, which an external data file excludes"
    found.each(ERROR, text.format, entries[compressed])
    entries, place, rows = entries[~compressed], place[~compressed], rows[~compressed]
    text = "L2 entry {:#018x} has reserved bits set"
    found.each(ERROR, text.format, entries[l2_entry.reserved_mask(entries)])
    offsets, copied = l2_entry.offsets_of(entries), l2_entry.copied_mask(entries)
    stored = copied | (offsets != 0)
    text = "L2 entry {:#018x} does not point to the place of its cluster in the data file"
    found.each(ERROR, text.format, entries[stored & (offsets != place)])
    text = "L2 entry {:#018x} lacks the flag COPIED, which all entries with an external data file have"
    found.each(NOTE, text.format, entries[stored & ~copied & (offsets == place)])
    offsets, rows = offsets[stored], rows[stored]
    report.allocated_clusters += len(offsets)
    jumps = (np.diff(offsets) != np.uint64(found.cluster)) & (np.diff(rows) == 0)
    report.fragmented_clusters += int(jumps.sum())
