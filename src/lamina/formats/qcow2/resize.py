"""Changing the size of a qcow2 disk. What is added reads as zero, whatever lies below; what is cut off is freed.

Called with the request path holding the whole node: no other request runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import LimitExceeded, OptionError
from ...limits import MIB, align_down, align_up
from . import layout as q

if TYPE_CHECKING:
    from .driver import Qcow2

_ZEROS = memoryview(bytes(MIB))


def resize(node: Qcow2, size: int) -> None:
    """Give the disk of `node` the size `size`, whole sectors: OptionError for any other size than the one that it has."""
    if size % q.SECTOR and size != node.header.size:
        below = align_down(size, q.SECTOR)
        raise OptionError(
            f"{size} bytes are no whole number of sectors of {q.SECTOR} bytes",
            path=node.filename,
            hint=f"choose {below} or {below + q.SECTOR}",
        )
    change_size(node, size)


def change_size(node: Qcow2, size: int) -> None:
    """The same for any size, which images that exist may have. The order of writes: a larger disk is announced when all that
    it adds is known to read as zero, a smaller one before its clusters are given back."""
    old = node.header.size
    if size > old:
        _forget_leftovers(node, old, size)
        grow_l1(node, size)
        _blank(node, old, size)
        node.flush()
        _announce(node, size)
    elif size < old:
        node.flush()
        _announce(node, size)
        node.file.flush()
        node.cut_off(align_up(size, node.header.cluster_size), old)


def _forget_leftovers(node: Qcow2, old: int, size: int) -> None:
    """Free the clusters past the end that an earlier cut left behind because it failed, or the power did, half-way: what is
    added must not show them."""
    header = node.header
    start = align_up(old, header.cluster_size)
    covered = header.l1_size << 2 * header.cluster_bits - 3
    node.cut_off(start, min(align_up(size, header.cluster_size), covered))


def grow_l1(node: Qcow2, size: int) -> None:
    """Make the L1 table long enough for a disk of `size` bytes: a new one that replaces the old at the next flush."""
    header = node.header
    entries = q.l1_entries(size, header.cluster_bits)
    if entries <= header.l1_size:
        return
    if entries * 8 > q.MAX_L1_BYTES:
        raise LimitExceeded(
            f"a disk of {size} bytes is too large for clusters of {header.cluster_size} bytes",
            path=node.filename,
            hint="use a larger cluster_size",
        )
    node.replace_l1(entries)


def _announce(node: Qcow2, size: int) -> None:
    old = node.header.size
    node.size_unsure = True  # until it is stored: cut short in between, the next flush stores the size that it finds
    node.header.size = size
    try:
        node.header.store(node.file, "size")
    except BaseException:
        node.header.size = old
        raise
    node.size_unsure = False


def _blank(node: Qcow2, old: int, size: int) -> None:
    """Make [old, size) read as zero: the rest of the last cluster may hold anything, and a longer backing file its bytes."""
    cluster_size = node.header.cluster_size
    start = min(align_up(old, cluster_size), size)
    if old < start and not node.reads_zero(old, start - old):
        _write_zeros(node, old, start)
    backing = node.backing
    below = min(backing.node.size if backing is not None else 0, size)
    if below > start:
        stop = align_up(below, cluster_size)
        if node.header.version >= 3:
            node.zero(start, stop - start)
        else:
            _write_zeros(node, start, min(stop, size))


def _write_zeros(node: Qcow2, start: int, stop: int) -> None:
    for at in range(start, stop, len(_ZEROS)):
        node.write(at, _ZEROS[: min(len(_ZEROS), stop - at)])
