"""The filter `nodiscard`: no space is given back. One of the filters; for disks that must keep the room they have."""

from __future__ import annotations

from ..node import MAY_UNMAP, FilterNode


class NoDiscard(FilterNode):
    """`image`, to which no discard passes; zeroes pass, but not the permission to unmap."""

    driver = "nodiscard"
    faithful = True

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(offset, length, flags & ~MAY_UNMAP)

    def discard(self, offset: int, length: int) -> None:
        """Raises NotSupported, touching nothing; a discard is advice, so the request path above is content."""
        raise self.refuse("discard")
