"""The filter `blocksize`: sets a block size and a maximum transfer, in bytes. The filter only declares them; the request path
above it aligns and splits the requests."""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import OptionError
from ..limits import MIB, Limits, is_power_of_two
from ..node import FilterNode
from ..request import Child
from ..schema import Option


class BlockSize(FilterNode):
    """Passes reads and writes to `image` in complete blocks of `minimum` bytes (a power of two) and at most `maximum` bytes
    (0: the maximum of the child). Stricter limits of the child take precedence."""

    driver = "blocksize"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = (
        Option("minimum", "size", "the block size, a power of two", default=1, maximum=64 * MIB),
        Option("maximum", "size", "the largest read or write; 0: the limit of the child", default=0),
    )

    def __init__(self, image: Child, minimum: int = 1, maximum: int = 0, **common: Any) -> None:
        """Raises OptionError for invalid sizes."""
        super().__init__(image, **common)
        self._minimum, self._maximum = minimum, maximum
        block = self.limits.request_alignment
        if not is_power_of_two(minimum) or 0 < maximum < block:
            rule = f"minimum must be a power of two, and maximum 0 or at least one block ({block} bytes)"
            raise OptionError(f"minimum {minimum} and maximum {maximum} are not valid together", hint=rule)

    @property
    def limits(self) -> Limits:
        below = self.image.node.limits
        block = max(below.request_alignment, self._minimum)
        sizes = [size for size in (self._maximum, below.max_transfer) if size >= block]
        return below._replace(request_alignment=block, max_transfer=min(sizes, default=0))
