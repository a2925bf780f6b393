"""The filter `blocksize`: imposes a block size and a largest transfer. One of the filters. It only declares them: the request
path above reads, merges and splits. All in bytes."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from ..limits import MIB, Limits, is_power_of_two
from ..node import FilterNode
from ..request import Child
from ..schema import Option


class BlockSize(FilterNode):
    """`image`, which gets reads and writes of whole blocks of `minimum` (a power of two), none above `maximum` (0: as the
    child). A child that asks for larger blocks, or smaller transfers, gets its own way."""

    driver = "blocksize"
    faithful = True
    options = (
        Option("minimum", "size", "requests are multiples of it: a power of two", default=1, maximum=64 * MIB),
        Option("maximum", "size", "the largest read or write; 0: as the child", default=0),
    )

    def __init__(self, image: Child, minimum: int = 1, maximum: int = 0, **common: Any) -> None:
        """Raises OptionError for sizes that cannot be kept."""
        super().__init__(image, **common)
        self._minimum, self._maximum = minimum, maximum
        block = self.limits.request_alignment
        if not is_power_of_two(minimum) or 0 < maximum < block:
            rule = f"minimum must be a power of two, maximum at least one block ({block})"
            raise OptionError(f"blocks of {minimum} bytes and transfers of {maximum} cannot be", hint=rule)

    @property
    def limits(self) -> Limits:
        below = self.image.node.limits
        block = max(below.request_alignment, self._minimum)
        sizes = [size for size in (self._maximum, below.max_transfer) if size >= block]
        return below._replace(request_alignment=block, max_transfer=min(sizes, default=0))
