"""The filter `nodiscard`: keeps all space allocated, for disks that must not become sparse."""

from __future__ import annotations

from ..node import MAY_UNMAP, FilterNode


class NoDiscard(FilterNode):
    """Refuses discards, and passes zero requests to `image` without the flag MAY_UNMAP."""

    driver = "nodiscard"
    faithful = True

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(offset, length, flags & ~MAY_UNMAP)

    def discard(self, offset: int, length: int) -> None:
        """Raise NotSupported. The request path ignores this error, since a discard is only advice."""
        raise self.refuse("discard")
