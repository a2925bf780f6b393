"""The filter `nodiscard`: no space is given back. One of the filters; for disks that must keep the room they have."""

from __future__ import annotations

from typing import ClassVar

from ..node import MAY_UNMAP, FilterNode
from ..schema import Option, Schema


class NoDiscard(FilterNode):
    """`image`, to which no discard passes; zeroes pass, but not the permission to unmap."""

    driver: ClassVar[str] = "nodiscard"
    schema: ClassVar[Schema] = Schema("nodiscard", [Option("image", "node", "the node below", required=True)])

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(offset, length, flags & ~MAY_UNMAP)

    def discard(self, offset: int, length: int) -> None:
        """Raises NotSupported, touching nothing; a discard is advice, so the request path above is content."""
        raise self.refuse("discard")
