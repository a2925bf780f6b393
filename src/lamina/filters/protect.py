"""The filter `protect`: refuses writes to given ranges, such as boot sectors, headers or partitions. Ranges are in bytes and
exclude their end."""

from __future__ import annotations

from typing import Any, ClassVar

from ..around import AroundChanges, Request
from ..errors import ReadOnly
from ..limits import MAX_SIZE, Limits
from ..options import parse_range
from ..request import Child
from ..schema import Option


class Protect(AroundChanges):
    """Protects `ranges` of `image` ("0-1M,8M-": sizes with suffixes; a range without an end has no upper bound). A write,
    zero request, discard or truncate that overlaps a range raises ReadOnly and changes no byte."""

    driver = "protect"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = (
        Option("ranges", "str", "the protected ranges: FROM-TO,FROM-,...; TO is excluded", required=True),
    )

    def __init__(self, image: Child, ranges: str, **common: Any) -> None:
        super().__init__(image, **common)
        self._ranges = {text.strip(): parse_range(text) for text in ranges.split(",")}

    @property
    def limits(self) -> Limits:
        """No limits, so that the filter checks each request as it was made, before the edge to the child splits or aligns
        it."""
        return Limits(max_transfer=MAX_SIZE, optimal_transfer=self.image.node.limits.optimal_transfer)

    def around(self, kind: str, request: Request, offset: int, length: int, flags: int, /) -> Any:
        if kind == "truncate":
            offset, length = min(offset, self.size), abs(offset - self.size)
        for text, (start, end) in self._ranges.items():
            if offset < end and start < offset + length:
                raise ReadOnly(
                    f"the range {text} is protected", node=self.name, operation=kind, offset=offset, length=length
                )
        return request()
