"""The filter `protect`: refuses writes to chosen ranges. One of the filters; for boot sectors, headers and partitions that
nobody should change. Ranges are bytes, from the first up to but not including the last."""

from __future__ import annotations

from typing import ClassVar

from ..errors import OptionError, ReadOnly
from ..limits import MAX_SIZE, Limits
from ..node import FilterNode
from ..options import parse_size, shown
from ..request import Child
from ..schema import Option, Schema


class Protect(FilterNode):
    """`image`, of which `ranges` ("0-1M,8M-", sizes with suffixes; an end left out is the end of all) are read-only. A
    write, zero, discard or change of size that touches a byte of them raises ReadOnly and touches no byte at all."""

    driver: ClassVar[str] = "protect"
    schema: ClassVar[Schema] = Schema(
        "protect",
        [
            Option("image", "node", "the node below", required=True),
            Option("ranges", "str", "what stays as it is: FROM-TO,FROM-,...; TO is not included", required=True),
        ],
    )

    def __init__(self, image: Child, ranges: str, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._ranges = [parse_range(text) for text in ranges.split(",")]

    @property
    def limits(self) -> Limits:
        """None: a request is judged whole, by its own bytes, before the edge below splits or widens it."""
        return Limits(max_transfer=MAX_SIZE, optimal_transfer=self.image.node.limits.optimal_transfer)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._check("write", offset, len(view))
        self.image.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._check("zero", offset, length)
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self._check("discard", offset, length)
        self.image.discard(offset, length)

    def truncate(self, size: int) -> None:
        self._check("truncate", min(size, self.size), abs(size - self.size))
        self.image.truncate(size)

    def _check(self, operation: str, offset: int, length: int) -> None:
        for start, end, text in self._ranges:
            if offset < end and start < offset + length:
                raise ReadOnly(
                    f"the range {text} is protected", node=self.name, operation=operation, offset=offset, length=length
                )


def parse_range(text: str) -> tuple[int, int, str]:
    """(start, end, text) of "FROM-TO" or "FROM-"; OptionError for what is none, or empty."""
    first, dash, last = text.strip().partition("-")
    start, end = parse_size(first), parse_size(last) if last else MAX_SIZE
    if not dash or start >= end:
        raise OptionError(f"{shown(text)} is not a range", hint="write FROM-TO, or FROM- for all from there: 0-1M,8M-")
    return start, end, text.strip()
