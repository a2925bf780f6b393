"""The part of the node that concerns internal snapshots; mixed into the driver."""

from __future__ import annotations

from contextlib import suppress
from errno import ENOSPC
from typing import TYPE_CHECKING, Any

from ...errors import BlockIOError, LaminaError, OptionError
from ...format_node import FormatNode, To
from ...limits import MAX_SIZE, align_up
from ...node import require_writable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...results import Snapshot
    from .bitmaps import Bitmaps
    from .header import Header
    from .snapshot_table import Entry
    from .tables import Tables


class WithSnapshots(FormatNode):
    """A format node with the snapshots of its image. The state of the machine of a snapshot is stored like guest data, from
    the first byte on that no entry of the L1 table for the disk covers."""

    header: Header
    tables: Tables
    #: The bytes of machine state of the snapshot that is open.
    vm_state = 0
    #: Whether the disk is that of a snapshot, not that of now.
    of_snapshot = False
    _recording: Bitmaps | None
    _changes: Any

    def rewrite(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """work(tables, book, *arguments), which publishes new tables, while no request runs."""
        raise NotImplementedError

    def snapshots(self) -> Sequence[Snapshot]:
        from . import snapshot_table

        return [entry.result(self.header.size) for entry in snapshot_table.read(self.file, self.header)]

    def create_snapshot(self, name: str, vm_state: bytes | bytearray | memoryview = b"") -> Snapshot:
        from .snapshots import create

        view = memoryview(vm_state).cast("B")
        require_writable(self, "snapshot")
        try:
            if len(view):
                self.ranges.exclusive(0, MAX_SIZE, self._store_vm_state, view)
            entry: Entry = self.rewrite(create, name, len(view))
        except BaseException:
            with suppress(LaminaError):
                self._drop_vm_state(len(view))
            raise
        try:
            self._drop_vm_state(len(view))
        except BlockIOError as error:
            if error.errno != ENOSPC:  # the disk keeps a reference to it, which is no fault
                raise
        return entry.result(self.header.size)

    @property
    def _vm_state_at(self) -> int:
        return self.header.l1_entries(self.header.size) << self.header.l1_covers_bits

    def _store_vm_state(self, view: memoryview) -> None:
        from .resize import grow_l1

        start = self._vm_state_at
        grow_l1(self.tables, start + len(view), self)
        FormatNode.write(self, start, view)

    def _drop_vm_state(self, length: int) -> None:
        drop, tables, start = self._changes.drop, self.tables, self._vm_state_at
        covered = len(tables.mappings.l1) << self.header.l1_covers_bits  # less, where the L1 table could not grow
        run = min(align_up(length, self.header.cluster_size), covered - start)
        if run > 0:
            self.ranges.exclusive(0, MAX_SIZE, tables.changing, drop, tables, start, run, To.BELOW, False, False)

    def read_vm_state(self, offset: int, length: int) -> bytes:
        if not 0 <= offset <= offset + length <= self.vm_state:
            text = f"{length} bytes at {offset} are not inside the machine state of {self.vm_state} bytes"
            raise OptionError(text, path=self.filename, hint="open a snapshot that has one (snapshot-id)")
        found = bytearray(length)
        if length:
            self.read_into(self._vm_state_at + offset, memoryview(found))
        return bytes(found)

    def apply_snapshot(self, id: str) -> None:
        from .snapshots import apply

        recording = self._recording
        if recording is not None:
            from . import snapshot_table

            entry = snapshot_table.find(snapshot_table.read(self.file, self.header), id, None, self.filename)
            recording.require_all_usable(self.size if entry.disk_size is None else entry.disk_size)
            size = max(self.size, entry.disk_size or 0)
            recording.resize(size)
            recording.mark(0, size)
        self.rewrite(apply, id)
        if recording is not None:
            recording.resize(self.size)

    def delete_snapshot(self, id: str) -> None:
        from .snapshots import delete

        self.rewrite(delete, id)
