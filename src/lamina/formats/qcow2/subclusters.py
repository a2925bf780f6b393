"""Writes and zeroes of images with extended L2 entries: what `allocation` does, at the granularity of subclusters.

A write to a host cluster with a reference count of one goes there in place; `commit` then sets the allocation bits of the
subclusters that it filled. Any other write allocates new clusters, and copies only the rest of its first and of its last
subcluster, together with the allocated subclusters of an old cluster that is shared or compressed. Zeroes set bits; a cluster
is freed when none of its subclusters is allocated.

The bits reach the disk after the bytes that they describe, as all entries do (see `Tables.flush`).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from ...errors import CorruptImage, NotSupported
from ...format_node import Reservation, To
from ...limits import align_down, align_up
from ...status import COMPRESSED
from . import allocation
from .l2_entry import data_cluster, is_compressed, own_cluster
from .l2_extended import ALL, COUNT, allocated, with_subclusters, zeroed

if TYPE_CHECKING:
    from ...format_node import FormatNode
    from .mapping import Table
    from .tables import Tables


def reserve(tables: Tables, offset: int, length: int) -> Reservation:
    """As `FormatNode.reserve`."""
    bits, cluster_size, layout = tables.cluster_bits, tables.cluster_size, tables.mappings.layout
    within = offset & cluster_size - 1
    which, index = divmod(offset >> bits, layout.per_table)
    # The last cluster of the request, or of the L2 table.
    stop = min(index + (within + length - 1 >> bits) + 1, layout.per_table)
    table = tables.own_table(which)
    entries = table.entries
    host, run, blank = own_cluster(entries[index]), 1, False
    in_place = host != 0
    while index + run < stop and own_cluster(entries[index + run]) == (host + run * cluster_size if in_place else 0):
        run += 1
    for at in range(index, index + run):
        _require_valid(tables, table, at)
    if not in_place:
        host, run, blank = tables.allocate_data(offset >> bits, run)
    length = min(length, (run << bits) - within)
    # Everything from here on is counted from the beginning of the first cluster.
    end, before, unit_bits = within + length, run - 1 << bits, bits - layout.units_bits
    low = _begin(entries[index], within, unit_bits, in_place)
    high = before + _end(entries[index + run - 1], end - before, unit_bits, in_place)
    first, last = low >> unit_bits, high - 1 >> unit_bits
    if in_place and not any(
        _mask(first, last, at) & ~allocated(entries[index + at]) for at in range(run)
    ):  # nothing to commit
        return Reservation(offset, length, host + within - tables.shift, tables.data)
    return Reservation(
        offset,
        length,
        host + within - tables.shift,
        tables.data,
        new=True,
        head=within - low,
        tail=high - end,
        blank=blank,
        token=(which, index, host, run, not in_place, first, last),
    )


def _begin(entry: int, offset: int, unit_bits: int, in_place: bool) -> int:
    """Where to begin to fill a cluster with this old entry, for a write that begins at byte `offset` of it."""
    unit = offset >> unit_bits
    if is_compressed(entry):
        return 0
    stored = allocated(entry)
    if in_place:
        return offset if stored >> unit & 1 else unit << unit_bits
    lowest = (stored & -stored).bit_length() - 1 if stored else unit
    return min(unit, lowest) << unit_bits


def _end(entry: int, offset: int, unit_bits: int, in_place: bool) -> int:
    """Where to end, for a write that ends before byte `offset` of the cluster."""
    unit = offset - 1 >> unit_bits
    if is_compressed(entry):
        return COUNT << unit_bits
    stored = allocated(entry)
    if in_place:
        return offset if stored >> unit & 1 else unit + 1 << unit_bits
    return max(unit + 1, stored.bit_length()) << unit_bits


def _mask(first: int, last: int, cluster: int) -> int:
    """The bitmap of the subclusters of this cluster that are among those from `first` to `last`. Subclusters are counted from
    cluster 0 on."""
    low, high = max(first - cluster * COUNT, 0), min(last - cluster * COUNT, COUNT - 1)
    return (2 << high) - (1 << low)


def _require_valid(tables: Tables, table: Table, index: int) -> None:
    """Raise CorruptImage unless this entry is valid, and its clusters can be freed."""
    tables.require_droppable(table, index)
    entry = table.entries[index]
    stored = 0 if is_compressed(entry) else allocated(entry)
    if stored and (stored & zeroed(entry) or not data_cluster(entry)):
        raise CorruptImage(
            "the subclusters of an L2 entry are both allocated and zero, or have no host cluster",
            path=tables.file.node.filename,
            offset=table.offset + (index << tables.mappings.layout.entry_bits),
            hint="check the image; nothing was written",
        )


def commit(tables: Tables, which: int, index: int, host: int, clusters: int, _new: bool, first: int, last: int) -> None:
    """As `FormatNode.commit`, of a reservation with this token: the subclusters from `first` to `last` are filled."""
    table = tables.own_table(which)
    replaced = table.entries[index : index + clusters]
    entries = tables.mappings.layout.own_entries(host, clusters)
    for at in range(clusters):
        old, mask = replaced[at], _mask(first, last, at)
        if data_cluster(old) != host + (at << tables.cluster_bits):
            tables.require_droppable(table, index + at)
            kept = 0
        else:
            kept = allocated(old)
            replaced[at] = 0  # the cluster is the same
        if mask != ALL:
            entries[at] = with_subclusters(entries[at], mask | kept, zeroed(old) & ~mask)
    tables.mappings.put(which, index, entries)
    for at in range(clusters):
        if replaced[at]:
            tables.give_up(replaced[at])
    if tables.mappings.pressure:
        tables.write_out()


def commit_bare(tables: Tables, which: int, index: int, host: int, clusters: int, _new: bool) -> None:
    """Map clusters that were not mapped to host clusters, without an allocated subcluster."""
    tables.own_table(which)
    entries: Any = tables.mappings.layout.own_entries(host, clusters)
    entries.words[1::2] = array("Q", (0,)) * clusters
    tables.mappings.put(which, index, entries)
    tables.relieve()


def abandon(
    tables: Tables, _which: int, _index: int, host: int, clusters: int, new: bool, _first: int, _last: int
) -> None:
    """As `FormatNode.abandon`, of a reservation with this token. Subclusters that were filled in place stay unallocated."""
    if new:
        tables.abandon_data(host, clusters)


def expand_ends(node: FormatNode, offset: int, length: int) -> None:
    """Store uncompressed zeros in the parts of compressed clusters at the two ends of this range, before `drop`: a bitmap of
    subclusters cannot say that a part of a compressed cluster is zero."""
    size, end = node.serialise, min(offset + length, node.size)
    parts = [range(offset, min(align_up(offset, size), end))] if offset % size else []
    if end % size and end < node.size and align_down(end, size) >= offset:
        parts.append(range(align_down(end, size), end))
    for part in parts:
        if node.map(part.start, 1).flags & COMPRESSED:
            node.write(part.start, memoryview(bytes(len(part))))


def drop(tables: Tables, offset: int, length: int, to: To, keep: bool, backed: bool) -> None:
    """As `FormatNode.drop`, of whole subclusters; see `allocation.drop`. NotSupported if the range begins or ends inside a
    compressed cluster."""
    size = tables.cluster_size
    end = offset + length
    if end >= tables.header.size:
        end = align_up(end, size)  # the last cluster may extend past the end of the disk
    first, last = align_up(offset, size), align_down(end, size)
    for edge in (offset, end):
        if edge % size:
            _require_uncompressed(tables, edge)
    if first > last:  # inside one cluster
        _drop_part(tables, offset, end, to, keep)
        return
    if offset < first:
        _drop_part(tables, offset, first, to, keep)
    if first < last:
        allocation.drop(tables, first, last - first, to, keep, backed)
    if last < end:
        _drop_part(tables, last, end, to, keep)


def _require_uncompressed(tables: Tables, offset: int) -> None:
    which, index = divmod(offset >> tables.cluster_bits, tables.mappings.per_table)
    table = tables.mappings.table(which)
    if table is not None and is_compressed(table.entries[index]):
        raise NotSupported(
            "a part of a compressed cluster", node=tables.file.node.name, operation="zero", offset=offset
        )


def _drop_part(tables: Tables, offset: int, end: int, to: To, keep: bool) -> None:
    """Drop the subclusters from `offset` to `end`, all in one cluster."""
    bits, layout = tables.cluster_bits, tables.mappings.layout
    unit_bits = bits - layout.units_bits
    which, index = divmod(offset >> bits, layout.per_table)
    table = tables.own_table(which)
    _require_valid(tables, table, index)
    entry = table.entries[index]
    start = offset >> bits << bits
    mask = _mask(offset - start >> unit_bits, end - 1 - start >> unit_bits, 0)
    stored = allocated(entry) & ~mask
    zero = zeroed(entry) & ~mask if to is To.BELOW else zeroed(entry) | mask
    if data_cluster(entry) and not stored and not keep:
        tables.replace_entry(which, index, with_subclusters(0, 0, zero))
    else:
        tables.mappings.set(which, index, with_subclusters(entry, stored, zero))
    tables.relieve()
