"""The filter `nozero`: has zeroes written as data. One of the filters; it stands in for storage that cannot zero quickly,
and makes space that must stay allocated be written."""

from __future__ import annotations

from ..node import FilterNode


class NoZero(FilterNode):
    """`image`, without quick zeroes: the request path above writes them instead, and refuses those that must be quick."""

    driver = "nozero"
    faithful = True

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Raises NotSupported, touching nothing."""
        raise self.refuse("zero")
