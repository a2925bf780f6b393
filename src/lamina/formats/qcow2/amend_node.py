"""The part of the node that changes options of its image in place; mixed into the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import OptionError
from ...format_node import FormatNode, To
from ...limits import MAX_SIZE, align_up
from ...node import require_writable
from ...request import sizes_changed
from . import amend
from . import layout as q
from .header_rewrite import require_room

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...schema import Schema
    from .bitmaps import Bitmaps
    from .header import Header
    from .tables import Tables


class Amendable(FormatNode):
    """A format node whose options change while no request runs."""

    amend_schema: ClassVar[Schema] = amend.SCHEMA
    header: Header
    tables: Tables
    _recording: Bitmaps | None

    def require_amendable(self, values: Mapping[str, Any]) -> None:
        require_writable(self, "amend")
        # Bitmaps that are not stored yet have no extension in the header.
        bitmaps = self._recording is not None and bool(self._recording.all)
        amend.require_possible(self.header, values, self.filename, bitmaps=bitmaps)
        if changes := amend.header_changes(self.header, values):
            require_room(self.header, self.tables.file, changes)

    def amend(self, values: Mapping[str, Any]) -> None:
        self.require_amendable(values)
        header = self.header
        compat, bits, size, slot = (values.get(name) for name in ("compat", "refcount_bits", "size", "encrypt"))
        newer = amend.version_changes(header, compat) if header.version == 2 else {}
        self._publish_header(amend.header_changes(header, values) | newer)
        if bits not in (None, header.refcount_bits):
            self.set_width(bits)
        if values.get("lazy_refcounts") is not None and header.version > 2:
            self.ranges.exclusive(0, MAX_SIZE, self.tables.changing, self._set_lazy, values["lazy_refcounts"])
        if slot is not None:
            self.amend_key_slot(slot)
        if size is not None:
            self.resize(size, "off")
        if amend.version_changes(header, compat):
            self.ranges.exclusive(0, MAX_SIZE, amend.drop_zero_flags, self, self.backed)
            self._publish_header(amend.version_changes(header, compat))

    @property
    def backed(self) -> bool:
        """Whether there is a backing file, which may not be open now, and be so the next time."""
        return self.backing is not None or self.header.backing_file is not None or self.backing_changes

    def resize(self, size: int, preallocation: str) -> None:
        require_writable(self, "resize")
        if preallocation != "off" and self.header.crypt_method:
            raise OptionError(
                "allocated clusters would read as anything under encryption",
                path=self.filename,
                hint="resize it without preallocation",
            )
        try:
            self.ranges.exclusive(0, MAX_SIZE, self._resize, size, preallocation)
        finally:
            sizes_changed()

    def _resize(self, size: int, preallocation: str) -> None:
        old = self.size
        self.truncate(size)
        if size > old and preallocation != "off":
            from .preallocation import preallocate

            preallocate(self.tables, preallocation, align_up(old, self.header.cluster_size), bare=False)
            self.flush()

    def make_empty(self) -> None:
        require_writable(self, "commit")
        self.ranges.exclusive(0, MAX_SIZE, self._make_empty)

    def _make_empty(self) -> None:
        recording, tables = self._recording, self.tables
        step = self.limits.max_discard
        try:
            self._recording = None  # no byte of the disk changes
            for at in range(0, self.size, step):
                self.drop(at, min(step, self.size - at), To.BELOW)
        finally:
            self._recording = recording
        self.flush()
        tables.settle()
        tables.changing(tables.unlink, range(min(self.header.l1_entries(self.size), len(tables.mappings.l1))))
        tables.settle()
        tables.file.flush()
        tables.changing(tables.trim)
        self.flush()

    def _publish_header(self, changes: Mapping[str, Any]) -> None:
        if changes:
            self.flush()
            self.tables.settle()
            self.ranges.exclusive(0, MAX_SIZE, self.tables.changing, self.tables.rewrite_header, changes)

    def _set_lazy(self, lazy: bool) -> None:
        rest = self.header.compatible_features & ~q.LAZY_REFCOUNTS
        self.tables.store({"compatible_features": rest | (q.LAZY_REFCOUNTS if lazy else 0)})

    def set_width(self, bits: int) -> None:
        """Give all reference counts this width."""
        raise NotImplementedError

    def amend_key_slot(self, values: Mapping[str, Any]) -> None:
        """Change a key slot; only an encrypted image has any (see `amend.require_possible`)."""
