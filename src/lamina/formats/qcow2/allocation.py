"""The changes that writes, zeroes and discards make to the tables: the hooks of `FormatNode` for uncompressed data.

`Tables.changing` calls each function. A write to a cluster with a reference count of one overwrites it in place. Any other
write allocates new clusters; `commit` makes the L2 entries point to these instead of the old clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...format_node import Reservation, To
from .l2_entry import data_cluster, is_compressed, names_clusters, own_cluster

if TYPE_CHECKING:
    from .tables import Tables


def reserve(tables: Tables, offset: int, length: int) -> Reservation:
    """As `FormatNode.reserve`."""
    bits, cluster_size = tables.cluster_bits, tables.cluster_size
    within = offset & cluster_size - 1
    cluster = offset >> bits
    layout = tables.mappings.layout
    per_table = layout.per_table
    which, index = divmod(cluster, per_table)
    # The last cluster of the request, or of the L2 table.
    stop = min(index + (within + length - 1 >> bits) + 1, per_table)
    table = tables.own_table(which)
    entries = table.entries
    entry = entries[index]
    host = own_cluster(entry)
    if host:
        tables.require_data(host, table, index)
        if layout.reads_zero(entry):  # it has storage with undefined content, which is filled like a new cluster
            return _fresh(tables, offset, length, host, 1, (which, index, host, 1, False))
        run = 1
        while index + run < stop and layout.is_run(entry, entries[index + run], run):
            tables.require_data(host + run * cluster_size, table, index + run)
            run += 1
        place = host + within - tables.shift
        return Reservation(offset, min(length, run * cluster_size - within), place, tables.data)
    run = 1
    while index + run < stop and not own_cluster(entries[index + run]):
        run += 1
    for at in range(index, index + run) if any(entries[index : index + run]) else ():
        tables.require_droppable(table, at)  # `commit` frees it, and must not fail
    host, run, blank = tables.allocate_data(cluster, run)
    reservation = _fresh(tables, offset, length, host, run, (which, index, host, run, True))
    reservation.blank = blank
    return reservation


def _fresh(tables: Tables, offset: int, length: int, host: int, clusters: int, token: Any) -> Reservation:
    within = offset & tables.cluster_size - 1
    length = min(length, (clusters << tables.cluster_bits) - within)
    tail = -(within + length) & tables.cluster_size - 1
    place = host + within - tables.shift
    return Reservation(offset, length, place, tables.data, new=True, head=within, tail=tail, token=token)


def commit(tables: Tables, which: int, index: int, host: int, clusters: int, _allocated: bool) -> None:
    """As `FormatNode.commit`, of a reservation with this token."""
    table = tables.own_table(which)
    replaced = table.entries[index : index + clusters]
    for at, entry in enumerate(replaced):
        if not entry:  # the usual case: the cluster was unallocated
            continue
        if data_cluster(entry) != host + (at << tables.cluster_bits):
            tables.require_droppable(table, index + at)
        else:
            replaced[at] = 0  # the write filled the storage that the entry had
    tables.mappings.put(which, index, tables.mappings.layout.own_entries(host, clusters))
    for entry in replaced:
        if entry:
            tables.give_up(entry)
    if tables.mappings.pressure:
        tables.write_out()


def abandon(tables: Tables, _which: int, _index: int, host: int, clusters: int, allocated: bool) -> None:
    """As `FormatNode.abandon`, of a reservation with this token."""
    if allocated:
        tables.abandon_data(host, clusters)


def drop(tables: Tables, offset: int, length: int, to: To, keep: bool, backed: bool) -> None:
    """As `FormatNode.drop`; `backed`: there is a backing node, whose bytes a cluster without an entry shows."""
    flagged = tables.header.version >= 3
    layout = tables.mappings.layout
    left = layout.zeroed() if flagged and to is not To.BELOW else 0
    # Whether unallocated clusters need the zero flag too. If not, missing tables stay missing.
    everywhere = flagged and (to is To.ZERO or (to is To.ANY and backed))
    for which, index, entry in tables.entries(offset, length, make=everywhere):
        named = names_clusters(entry)
        if named and (not (keep and flagged) or is_compressed(entry)):
            tables.replace_entry(which, index, left)
        elif (everywhere or (named and to is not To.BELOW)) and not layout.reads_zero(entry):
            tables.mappings.set(which, index, layout.zeroed(entry))
        elif to is To.BELOW and entry:
            tables.mappings.set(which, index, 0)
