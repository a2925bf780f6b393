"""Limits: the requests that a node accepts, and the memory that a file may use.

Two small records without I/O. Drivers declare `Limits`, and the request path above them (`request.py`) enforces it: no driver
rounds or splits. `Budget` bounds every allocation whose size comes from a file or a peer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from .errors import Hint, LimitExceeded, OptionError

#: Units in bytes.
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

#: The largest offset, length or size: the largest signed 64-bit file offset.
MAX_SIZE = (1 << 63) - 1

#: The largest single transfer to a driver that declares no limit of its own.
MAX_TRANSFER = 1 * GIB


#: The most rows of one result of `extents`; the caller continues where the result ends. It bounds the memory of every result
#: (about 40 bytes a row, and a few times that during the computation), whatever the image contains.
MAX_ROWS = 1 << 17


def is_power_of_two(value: int) -> bool:
    """Whether `value` is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` up to `value`."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` from `value` on."""
    return value + -value % alignment


class Limits(NamedTuple):
    """The limits of requests to a node. All in bytes; 0 means "no limit of its own".

    The offset of a request is a multiple of `request_alignment`, and so is its end, unless it is the end of the node, which
    always counts as aligned. The same holds for the alignments of zero requests and discards.
    """

    #: Reads and writes begin and end at multiples of this power of two.
    request_alignment: int = 1
    #: The largest read or write.
    max_transfer: int = 0
    #: A hint for callers that can choose: the most efficient size of a transfer.
    optimal_transfer: int = 0
    #: `zero` gets whole multiples of this; zeros are written to the rest at head and tail.
    zero_alignment: int = 1
    max_zero: int = 0
    #: `discard` gets whole multiples of this; the rest at head and tail is not discarded.
    discard_alignment: int = 1
    max_discard: int = 0
    #: A write with COMPRESS compresses whole multiples of this power of two; 0: the node does not compress.
    compress_alignment: int = 0


#: The deepest possible chain of backing files: deeper ones do not fit the stack of Python.
MAX_CHAIN = 150


class _Members(NamedTuple):
    #: The number of backing files in the deepest chain, at most MAX_CHAIN.
    chain_depth: int = 64
    #: Bytes of memory for cached tables of the top image; an image further down gets a smaller share.
    cache_bytes: int = 16 * MIB
    #: The number of extents in one result of `Image.extents` (about 40 bytes each, twice that during the computation).
    rows: int = 1 << 22
    #: Bytes of memory for tables that stay loaded, of all open images of the graph together.
    memory: int = 256 * MIB
    #: The most bytes of data that a job (convert, copy) writes for this image; None: any number. Zeros that are skipped, or
    #: made without a transfer, do not count. A small file may read as terabytes.
    max_output: int | None = None


class Budget(_Members):
    """Upper bounds on the cost of the images of one graph, checked before their content is trusted. A budget applies to the
    whole graph, whatever the number of its files. (Lengths in a header are checked against the limits of their format and
    against the size of the file, before any allocation.) Raises OptionError for impossible values."""

    __slots__ = ()

    def __new__(cls, *values: int | None, **named: int | None) -> Self:
        return cls._make(_Members(*values, **named))  # type: ignore[arg-type]  # looked at below

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Self:  # type: ignore[override]  # also what `_replace` makes is checked
        made = tuple.__new__(cls, iterable)
        for name, value in zip(cls._fields, made, strict=True):
            if (value is not None or name != "max_output") and (not isinstance(value, int) or value < 0):
                raise OptionError(f"{name} of a budget is {value!r}, not a number of 0 or more")
        if made.chain_depth > MAX_CHAIN:
            raise OptionError(
                f"chain_depth is {made.chain_depth}, but the deepest possible chain has {MAX_CHAIN} files"
            )
        return made


class Memory:
    """The memory that the images of one graph have booked, `taken` bytes so far, against the limit of their budget."""

    __slots__ = ("_limit", "taken")

    def __init__(self, limit: int, taken: int = 0) -> None:
        self._limit = limit
        self.taken: int = taken

    def take(self, count: int, what: str, path: str | None = None) -> None:
        """Book `count` bytes for `what`, before they are allocated. Raises LimitExceeded if fewer are left."""
        if self.taken + count > self._limit:
            raise LimitExceeded(
                f"{what} needs {count} bytes of memory, but {self.taken} of {self._limit} bytes for all images of this graph "
                "are in use",
                path=path,
                hint=Hint(
                    "if you trust these images, raise memory in the budget: budget=Budget(memory=...)",
                    command="if you trust these images, allow more: --limits memory=1G",
                ),
            )
        self.taken += count


#: The default budget, strict enough for untrusted files.
DEFAULT_BUDGET = Budget()
