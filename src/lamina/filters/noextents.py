"""The filter `noextents`: reports all bytes as data. It makes consumers read everything, for example to measure the effect of
sparse handling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..node import FilterNode

if TYPE_CHECKING:
    from ..extents import Extents


class NoExtents(FilterNode):
    """Hides the extents of `image`. Reads and writes pass unchanged."""

    driver = "noextents"

    def extents(self, offset: int, length: int) -> Extents:
        """One extent of data, owned by this layer, without a host file."""
        from ..extents import Extents

        return Extents.single(offset, length, data=True, present=True)

    def reads_zero(self, offset: int, length: int) -> bool:
        return False
