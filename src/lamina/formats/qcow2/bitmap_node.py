"""The part of the node that concerns persistent dirty bitmaps; mixed into the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ...format_node import FormatNode
from ...graph import rebook
from ...limits import MAX_SIZE
from ...node import require_writable

if TYPE_CHECKING:
    from ...bitmap import DirtyBitmap
    from .bitmaps import Bitmaps
    from .header import Header
    from .tables import Tables


class WithBitmaps(FormatNode):
    """A format node with the bitmaps of its image."""

    keeps_bitmaps: ClassVar[bool] = True
    header: Header
    tables: Tables
    #: The bitmaps of an image that is open for writing, and bytes of memory that they keep.
    _recording: Bitmaps | None = None
    _bitmap_bytes = 0

    @property
    def takes_bitmaps(self) -> bool:
        return self.header.version > 2

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        found = self._recording or self._bitmaps_of_image()
        return {name: one for name, one in found.all.items() if not one.inconsistent}

    @property
    def inconsistent_bitmaps(self) -> Sequence[str]:
        found = self._recording or self._bitmaps_of_image()
        return [name for name, one in found.all.items() if one.inconsistent]

    def add_bitmap(self, name: str, granularity: int, *, enabled: bool = True) -> None:
        self._change_bitmaps(lambda bitmaps: bitmaps.add(name, granularity, enabled=enabled))

    def remove_bitmap(self, name: str) -> None:
        self._change_bitmaps(lambda bitmaps: bitmaps.remove(name))

    def clear_bitmap(self, name: str) -> None:
        self._change_bitmaps(lambda bitmaps: bitmaps.clear(name))

    def enable_bitmap(self, name: str, enabled: bool) -> None:
        self._change_bitmaps(lambda bitmaps: bitmaps.enable(name, enabled))

    def merge_bitmaps(self, name: str, sources: Iterable[DirtyBitmap]) -> None:
        self._change_bitmaps(lambda bitmaps: bitmaps.merge(name, sources))

    def _change_bitmaps(self, change: Callable[[Bitmaps], None]) -> None:
        """change(bitmaps), while no request runs."""
        require_writable(self, "bitmap")
        self.ranges.exclusive(0, MAX_SIZE, self._with_bitmaps, change)

    def _with_bitmaps(self, change: Callable[[Bitmaps], None]) -> None:
        recording = self._recording or self._bitmaps_of_image()
        change(recording)
        self._recording = recording

    def _bitmaps_of_image(self) -> Bitmaps:
        from .bitmaps import Bitmaps

        return Bitmaps(self.tables, self._book_bitmaps)

    def _book_bitmaps(self, total: int) -> None:
        rebook(self, self.kept_bytes - self._bitmap_bytes + total, "the dirty bitmaps")
        self._bitmap_bytes = total

    def _take_bitmaps(self) -> None:
        """From now on each change of the disk is recorded in its bitmaps, if it has any."""
        self._recording = None  # of tables that are no longer used
        if self.header.has_bitmaps and (found := self._bitmaps_of_image()).all:
            self._recording = found
