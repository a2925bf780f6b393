"""Internal snapshots: made, applied and deleted, each by one write of the header (see `rewrite`).

Each function is given what books memory (see `Rewrite`), and returns its result and the parts of the file (offset, length)
that are free now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...errors import OptionError
from ...options import shown
from . import snapshot_table
from .rewrite import L1Place, Rewrite
from .snapshot_table import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .header import Header
    from .tables import Tables

#: Bytes of a name, as other programs accept them.
MAX_NAME = 255


def create(
    tables: Tables, book: Callable[[int], None], name: str, vm_state: int
) -> tuple[Entry, Iterator[tuple[int, int]]]:
    """Keep the disk of now as a new snapshot, which takes over the L1 table; the disk gets a copy. `vm_state`: the bytes of
    machine state behind the disk."""
    header, entries = tables.header, snapshot_table.read(tables.file, tables.header)
    path = tables.file.node.filename
    if not name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME or "\0" in name:
        raise OptionError("the name of a snapshot is empty, or too long", path=path, hint=f"at most {MAX_NAME} bytes")
    if any(entry.name == name for entry in entries):
        raise OptionError(f"the image has a snapshot {shown(name)} already", path=path, hint="choose another name")
    change, active = Rewrite(tables, book), _active(header)
    found = change.entries_of(active)
    change.count_path(found, 1)
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    # Length of the machine state, size of the disk, and instructions: a disk alone has executed none, those of a machine
    # are not known.
    extra = vm_state.to_bytes(8) + header.size.to_bytes(8) + (b"\xff" * 8 if vm_state else bytes(8))
    short = vm_state if vm_state < 1 << 32 else 0  # of 32 bits, for programs that do not know `extra`
    entry = Entry(active.offset, active.entries, _free_id(entries), name, seconds, nanoseconds, 0, short, extra)
    change.publish(found, entries, [*entries, entry], size=header.size)
    return entry, change.freed()


def apply(tables: Tables, book: Callable[[int], None], id: str) -> tuple[None, Iterator[tuple[int, int]]]:
    """Make the disk read as the snapshot does, with its size."""
    header, entries = tables.header, snapshot_table.read(tables.file, tables.header)
    entry = _usable(tables, entries, id)
    change, active = Rewrite(tables, book), _active(header)
    change.count_path(change.entries_of(active), -1)
    change.release(active.offset, 8 * active.entries)
    found = change.entries_of(L1Place(entry.l1_table_offset, entry.l1_size))
    change.count_path(found, 1)
    change.publish(found, entries, entries, size=header.size if entry.disk_size is None else entry.disk_size)
    return None, change.freed()


def delete(tables: Tables, book: Callable[[int], None], id: str) -> tuple[None, Iterator[tuple[int, int]]]:
    """Give up what only this snapshot refers to."""
    header, entries = tables.header, snapshot_table.read(tables.file, tables.header)
    entry = _usable(tables, entries, id)
    change, active = Rewrite(tables, book), _active(header)
    kept = L1Place(entry.l1_table_offset, entry.l1_size)
    change.count_path(change.entries_of(kept), -1)
    change.release(kept.offset, 8 * kept.entries)
    found = change.entries_of(active)
    change.release(active.offset, 8 * active.entries)
    change.publish(found, entries, [one for one in entries if one is not entry], size=header.size)
    return None, change.freed()


def _active(header: Header) -> L1Place:
    return L1Place(header.l1_table_offset, header.l1_size)


def _usable(tables: Tables, entries: list[Entry], id: str) -> Entry:
    entry = snapshot_table.find(entries, id, None, tables.file.node.filename)
    snapshot_table.require_usable(entry, tables.file, tables.header)
    return entry


def _free_id(entries: Iterable[Entry]) -> str:
    numbers = [int(entry.id) for entry in entries if entry.id.isascii() and entry.id.isdecimal() and len(entry.id) < 19]
    return str(max(numbers, default=0) + 1)
