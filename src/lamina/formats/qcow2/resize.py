"""Changing the size of a qcow2 disk. What is added reads as zero, whatever lies below; what is cut off is freed.

Called with the request path holding the whole node: no other request runs.
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
    """Give the disk of `node` the size `size`, whole sectors: OptionError for any other size than the one that it has.

    The order of writes: a larger disk is announced when all that it adds is known to read as zero, a smaller one before its
    clusters are given back."""
    header = tables.header
    old = header.size
    if size % q.SECTOR and size != old:
        below = align_down(size, q.SECTOR)
        raise OptionError(
            f"{size} bytes are no whole number of sectors of {q.SECTOR} bytes",
            path=node.filename,
            hint=f"choose {below} or {below + q.SECTOR}",
        )
    if size > old:
        # What an earlier cut left behind past the end, because it failed, or the power did, half-way, must not be seen.
        covered = len(tables.mappings.l1) << 2 * header.cluster_bits - 3
        _give_back(node, align_up(old, header.cluster_size), min(align_up(size, header.cluster_size), covered))
        grow_l1(tables, size, node)
        _blank(node, header, old, size)
        node.flush()
        tables.set_size(size)
    elif size < old:
        node.flush()
        tables.set_size(size)
        tables.file.flush()
        _give_back(node, align_up(size, header.cluster_size), old)


def grow_l1(tables: Tables, size: int, node: FormatNode | None = None) -> None:
    """Make the L1 table long enough for a disk of `size` bytes: a new one that replaces the old at the next flush. The memory
    is booked for `node`, whose budget may refuse it; None: a new image, which is no node yet."""
    header = tables.header
    entries = q.l1_entries(size, header.cluster_bits)
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
    """Free the clusters of [start, end), which is past the end of the disk. Both are multiples of the cluster size, or the
    end that the disk had."""
    if start < end:
        node.drop(start, end - start, To.BELOW)


def _blank(node: FormatNode, header: Header, old: int, size: int) -> None:
    """Make [old, size) read as zero: the rest of the last cluster may hold anything, and a longer backing file its bytes."""
    start = min(align_up(old, header.cluster_size), size)
    if old < start and not node.reads_zero(old, start - old):
        _write_zeros(node, old, start)
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
