"""Changing the size of a qcow2 disk. New bytes read as zero, regardless of the backing file; clusters past the end are freed.

The request path has locked the whole node: no other request runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import LimitExceeded, OptionError
from ...format_node import To
from ...graph import rebook
from ...limits import MIB, align_down, align_up
from . import layout as q

if TYPE_CHECKING:
    from ...format_node import FormatNode
    from .header import Header
    from .tables import Tables

_ZEROS = memoryview(bytes(MIB))


def resize(node: FormatNode, tables: Tables, size: int) -> None:
    """Change the size of the disk of `node` to `size`, a multiple of the sector size; OptionError for any other value
    except the present size.

    The order of writes: a larger size is stored after everything new reads as zero, a smaller size before clusters are
    freed."""
    header = tables.header
    old = header.size
    if size % q.SECTOR and size != old:
        below = align_down(size, q.SECTOR)
        raise OptionError(
            f"the size {size} is not a multiple of the sector size {q.SECTOR}",
            path=node.filename,
            hint=f"choose {below} or {below + q.SECTOR}",
        )
    if size != old and header.nb_snapshots:
        from . import snapshot_table

        entries = snapshot_table.read(tables.file, header)
        if any(entry.disk_size is None for entry in entries):
            raise OptionError(
                "a snapshot of the image does not say its size, and has that of the disk",
                path=node.filename,
                hint="delete the snapshot first",
            )
    if size > old:
        # An interrupted earlier shrink, or a power cut, may have left clusters past the end, which must not become visible.
        covered = len(tables.mappings.l1) << header.l1_covers_bits
        _give_back(node, align_up(old, header.cluster_size), min(align_up(size, header.cluster_size), covered))
        grow_l1(tables, size, node)
        _blank(node, header, old, size)
        node.flush()
        tables.set_size(size)
    elif size < old:
        node.flush()
        # All that the change allocates, before anything changes: then a full disk cannot stop it in the middle.
        end = align_up(size, header.cluster_size)
        if end % (1 << header.l1_covers_bits) and end < old:
            tables.changing(tables.own_if_any, end >> header.l1_covers_bits)
        tables.set_size(size)
        tables.file.flush()
        first, last = align_up(size, header.cluster_size), align_up(old, header.cluster_size)
        tables.changing(tables.unlink_shared, -(-first >> header.l1_covers_bits), -(-last >> header.l1_covers_bits))
        _give_back(node, first, last)


def grow_l1(tables: Tables, size: int, node: FormatNode | None = None) -> None:
    """Extend the L1 table for a disk of `size` bytes: a longer table replaces it at the next flush. Its memory is booked for
    `node`, and LimitExceeded raised if that exceeds the budget; None: a new image, for which there is no node yet."""
    header = tables.header
    entries = header.l1_entries(size)
    if entries <= len(tables.mappings.l1):
        return
    if entries * 8 > q.MAX_L1_BYTES:
        raise LimitExceeded(
            f"a disk of {size} bytes is too large for clusters of {header.cluster_size} bytes",
            path=tables.file.node.filename,
            hint="use a larger cluster_size",
        )
    if node is None:
        tables.changing(tables.grow_l1, entries)
        return
    before = node.kept_bytes
    rebook(node, entries * 8, "a longer L1 table")
    try:
        tables.changing(tables.grow_l1, entries)
    finally:
        if len(tables.mappings.l1) < entries:  # it failed
            node.kept_bytes = before


def _give_back(node: FormatNode, start: int, end: int) -> None:
    """Free the clusters of [start, end), past the end of the disk. Both are multiples of the cluster size."""
    if start < end:
        node.drop(start, end - start, To.BELOW)


def _blank(node: FormatNode, header: Header, old: int, size: int) -> None:
    """Make [old, size) read as zero: the rest of the last cluster may contain any bytes, and so may a longer backing file."""
    start = min(align_up(old, header.cluster_size), size)
    if old < start and not node.reads_zero(old, start - old):
        unit = node.limits.request_alignment
        first = align_down(old, unit)
        if first < old:  # the disk ended inside a sector, which an encrypted image writes whole
            sector = memoryview(bytearray(min(unit, start - first)))
            node.read_into(first, sector[: old - first])
            node.write(first, sector)
        _write_zeros(node, align_up(old, unit), start)
    backing = node.backing
    below = min(backing.node.size if backing is not None else 0, size)
    if below > start:
        stop = align_up(below, header.cluster_size)
        if header.version >= 3:
            node.zero(start, stop - start)
        else:
            _write_zeros(node, start, min(stop, size))


def _write_zeros(node: FormatNode, start: int, stop: int) -> None:
    for at in range(start, stop, len(_ZEROS)):
        node.write(at, _ZEROS[: min(len(_ZEROS), stop - at)])
