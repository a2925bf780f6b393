"""The snapshot table: the internal snapshots of an image, each with an L1 table of its own. After "Snapshots" of the
published specification.

A snapshot is a state of the disk. Its L1 table points to L2 tables and clusters as the active one does, and most of them are
shared: their reference count says by how many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import CorruptImage, Hint, LimitExceeded, OptionError, printable
from ...limits import MAX_SIZE, MIB, align_up
from ...options import shown
from ...results import Snapshot
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child
    from .header import Header

#: Bytes of the whole table that are read: 65,536 snapshots with names, or fewer with long ones.
MAX_BYTES = 64 * MIB
#: Bytes read at a time.
_STEP = 64 << 10


class Entry(NamedTuple):
    """One entry of the table. `extra` is kept byte for byte, whatever it holds."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    extra: bytes

    @property
    def disk_size(self) -> int | None:
        """Bytes of the disk; None where the entry, of version 2, does not say it: then it has the size of today."""
        return int.from_bytes(self.extra[8:16]) if len(self.extra) >= 16 else None

    @property
    def vm_state(self) -> int:
        """Bytes of the machine state, which lies in the clusters behind the disk."""
        return int.from_bytes(self.extra[:8]) if len(self.extra) >= 8 else self.vm_state_size

    @property
    def icount(self) -> int | None:
        """Instructions that the guest had executed, where that was counted."""
        count = int.from_bytes(self.extra[16:24]) if len(self.extra) >= 24 else -1
        return count if 0 <= count <= MAX_SIZE else None

    def result(self, size: int) -> Snapshot:
        """What users see of it. `size`: the disk of today."""
        return Snapshot(
            id=self.id,
            name=self.name,
            size=size if self.disk_size is None else self.disk_size,
            vm_state=self.vm_state,
            date=self.date_sec,
            date_nsec=self.date_nsec,
            vm_clock=self.vm_clock_nsec,
            icount=self.icount,
        )

    def to_bytes(self) -> bytes:
        """The entry as it lies in the table, padded to a multiple of 8."""
        id, name = (text.encode("utf-8", "surrogateescape") for text in (self.id, self.name))
        fixed: bytes = q.SNAPSHOT.pack(
            l1_table_offset=self.l1_table_offset,
            l1_size=self.l1_size,
            id_size=len(id),
            name_size=len(name),
            date_sec=self.date_sec,
            date_nsec=self.date_nsec,
            vm_clock_nsec=self.vm_clock_nsec,
            vm_state_size=self.vm_state_size,
            extra_data_size=len(self.extra),
        )
        whole = fixed + self.extra + id + name
        return whole.ljust(align_up(len(whole), 8), b"\0")


def read(file: Child, header: Header) -> list[Entry]:
    """All snapshots of the image in `file`. CorruptImage, LimitExceeded where the table cannot be read."""
    try:
        return list(entries(file, header))
    except CorruptImage as error:
        error.path = error.path or file.node.filename
        raise


def entries(file: Child, header: Header) -> Iterator[Entry]:
    """The snapshots one after the other, up to the first that cannot be read: then the error."""
    start = at = header.snapshots_offset
    table = bytearray()

    def need(count: int) -> None:
        """Have `count` bytes from `at` on in `table`."""
        end = at - start + count
        if start + end > file.size:
            raise CorruptImage("the snapshot table is not inside the file", offset=start)
        if end > MAX_BYTES:
            raise LimitExceeded(
                f"the snapshot table is longer than the limit of {MAX_BYTES} bytes", path=file.node.filename
            )
        if end > len(table):
            more = min(max(end - len(table), _STEP), file.size - start - len(table))
            piece = bytearray(more)
            file.read_into(start + len(table), memoryview(piece))
            table.extend(piece)

    for index in range(header.nb_snapshots):
        need(q.SNAPSHOT.size)
        fixed: Any = q.SNAPSHOT.unpack(table, at - start)
        if fixed.extra_data_size > q.MAX_SNAPSHOT_EXTRA:
            raise LimitExceeded(
                f"snapshot {index} has {fixed.extra_data_size} bytes of extra data, "
                f"above the limit of {q.MAX_SNAPSHOT_EXTRA}",
                path=file.node.filename,
            )
        whole = q.SNAPSHOT.size + fixed.extra_data_size + fixed.id_size + fixed.name_size
        need(whole)
        extra_at = at - start + q.SNAPSHOT.size
        id_at = extra_at + fixed.extra_data_size
        name_at = id_at + fixed.id_size
        yield Entry(
            fixed.l1_table_offset,
            fixed.l1_size,
            table[id_at:name_at].decode("utf-8", "surrogateescape"),
            table[name_at : name_at + fixed.name_size].decode("utf-8", "surrogateescape"),
            fixed.date_sec,
            fixed.date_nsec,
            fixed.vm_clock_nsec,
            fixed.vm_state_size,
            bytes(table[extra_at:id_at]),
        )
        at += align_up(whole, 8)


def require_usable(entry: Entry, file: Child, header: Header) -> None:
    """Raise CorruptImage, LimitExceeded where the L1 table of this snapshot cannot be what the entry says."""
    path, what = file.node.filename, f"the L1 table of snapshot {printable(entry.id)}"
    size = header.size if entry.disk_size is None else entry.disk_size
    if entry.l1_size * 8 > q.MAX_L1_BYTES:
        raise LimitExceeded(f"{what} has {entry.l1_size} entries, above the limit of {q.MAX_L1_BYTES // 8}", path=path)
    if entry.l1_table_offset % header.cluster_size or (entry.l1_size and not entry.l1_table_offset):
        raise CorruptImage(f"{what} at {entry.l1_table_offset:#x} is not on a cluster boundary", path=path)
    if entry.l1_table_offset + entry.l1_size * 8 > align_up(file.size, header.cluster_size):
        raise CorruptImage(f"{what} at {entry.l1_table_offset:#x} is not inside the file", path=path)
    if entry.l1_size < header.l1_entries(size):
        raise CorruptImage(f"{what} has {entry.l1_size} entries, too few for a disk of {size} bytes", path=path)


def find(entries: list[Entry], id: str | None, name: str | None, path: str) -> Entry:
    """The snapshot with this id and this name, as far as they are given. OptionError where there is none, or several."""
    found = [one for one in entries if id in (None, one.id) and name in (None, one.name)]
    said = " and ".join(f"{what} {shown(text)}" for what, text in (("id", id), ("name", name)) if text is not None)
    if not found:
        raise OptionError(
            f"the image has no snapshot with the {said}",
            path=path,
            hint=Hint("image.snapshots() lists them", command="lamina info lists them"),
        )
    if len(found) > 1:
        raise OptionError(f"the image has {len(found)} snapshots with the {said}", path=path, hint="give the id")
    return found[0]
