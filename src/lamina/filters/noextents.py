"""The filter `noextents`: the status says that all bytes are data. One of the filters; for a consumer that should read
everything, or to see what sparse handling gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..node import FilterNode

if TYPE_CHECKING:
    from ..extents import Extents


class NoExtents(FilterNode):
    """`image`, of which nobody knows where it is sparse. Bytes pass as they are."""

    driver = "noextents"

    def extents(self, offset: int, length: int) -> Extents:
        """One extent of data, owned by this layer, in no host file."""
        from ..extents import Extents

        return Extents.single(offset, length, data=True, present=True)

    def reads_zero(self, offset: int, length: int) -> bool:
        return False
