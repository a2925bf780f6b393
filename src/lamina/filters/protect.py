"""The filter `protect`: refuses writes to chosen ranges. One of the filters; for boot sectors, headers and partitions that
nobody should change. Ranges are bytes, from the first up to but not including the last."""

from __future__ import annotations

from typing import Any

from ..around import AroundNode, Request
from ..errors import ReadOnly
from ..limits import MAX_SIZE, Limits
from ..node import FilterNode
from ..options import parse_range
from ..request import Child
from ..schema import Option


class Protect(AroundNode):
    """`image`, of which `ranges` ("0-1M,8M-", sizes with suffixes; an end left out is the end of all) are read-only. A
    write, zero, discard or change of size that touches a byte of them raises ReadOnly and touches no byte at all."""

    driver = "protect"
    faithful = True
    options = (Option("ranges", "str", "what stays as it is: FROM-TO,FROM-,...; TO is not included", required=True),)

    def __init__(self, image: Child, ranges: str, **common: Any) -> None:
        super().__init__(image, **common)
        self._ranges = {text.strip(): parse_range(text) for text in ranges.split(",")}

    @property
    def limits(self) -> Limits:
        """None: a request is judged whole, by its own bytes, before the edge below splits or widens it."""
        return Limits(max_transfer=MAX_SIZE, optimal_transfer=self.image.node.limits.optimal_transfer)

    # These touch nothing.
    read_into = FilterNode.read_into
    extents = FilterNode.extents

    def around(self, kind: str, request: Request, offset: int, length: int, flags: int, /) -> Any:
        if kind == "truncate":
            offset, length = min(offset, self.size), abs(offset - self.size)
        for text, (start, end) in self._ranges.items():
            if offset < end and start < offset + length:
                raise ReadOnly(
                    f"the range {text} is protected", node=self.name, operation=kind, offset=offset, length=length
                )
        return request()
