"""The filter `nozero`: makes zero requests write zeros, as storage without a fast zero operation does."""

from __future__ import annotations

from ..node import FilterNode


class NoZero(FilterNode):
    """Refuses zero requests: the request path writes zeros to `image` instead, or fails a request with NO_FALLBACK."""

    driver = "nozero"
    faithful = True

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Raise NotSupported without a change."""
        raise self.refuse("zero")
