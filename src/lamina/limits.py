"""Limits: what a node can take in one request, and what a file may make us allocate.

Two small records without I/O. `Limits` is declared by drivers and enforced above them by the request path (`request.py`):
no driver rounds or splits. `Budget` bounds every allocation whose size a file or a peer names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from .errors import LimitExceeded, OptionError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

#: No offset, length or size may pass this: it is what a signed 64-bit file offset can hold.
MAX_SIZE = (1 << 63) - 1

#: The largest single transfer the request path passes to a driver that declares no limit of its own.
MAX_TRANSFER = 1 * GIB


#: The most rows of one answer to a question for extents; whoever asked goes on where the answer ends. It bounds the memory of
#: every answer (about 40 bytes a row, and a few times that while it is made), whatever an image says.
MAX_ROWS = 1 << 17


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def align_down(value: int, alignment: int) -> int:
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    return value + -value % alignment


class Limits(NamedTuple):
    """What a node asks of the requests it receives. All in bytes; 0 means "no limit of its own".

    A request's offset is a multiple of `request_alignment`, and so is its end, unless it ends exactly at the node's size:
    the end of a node always counts as aligned. The same holds for the zero and discard alignments.
    """

    #: Reads and writes start and end on multiples of this power of two.
    request_alignment: int = 1
    #: The largest read or write.
    max_transfer: int = 0
    #: A hint for callers that may choose: the transfer size that works best.
    optimal_transfer: int = 0
    #: `zero` gets whole multiples of this; what is left at head and tail is written.
    zero_alignment: int = 1
    max_zero: int = 0
    #: `discard` gets whole multiples of this; what is left at head and tail is kept.
    discard_alignment: int = 1
    max_discard: int = 0
    #: Whole multiples of this power of two are what a write with COMPRESS can pack; 0: the node packs nothing.
    compress_alignment: int = 0


#: No chain of backing files is deeper: deeper ones do not fit the stack of Python.
MAX_CHAIN = 150


class _Members(NamedTuple):
    #: The deepest chain of backing files, at most MAX_CHAIN.
    chain_depth: int = 64
    #: Bytes of memory for the tables of the image on top that are cached; an image further down gets its share of as much.
    cache_bytes: int = 16 * MIB
    #: Extents of one answer of `Image.extents`, which holds them all at once (about 40 bytes each, twice while it is made).
    rows: int = 1 << 22
    #: Bytes of memory for tables that stay loaded while the images of the graph are open, of all of them together.
    memory: int = 256 * MIB
    #: Bytes of data that a job (convert, copy) writes of what it reads from the image, at most; None: any number. Zeros that
    #: are left out, or made without being written, do not count. A small file may read as terabytes.
    max_output: int | None = None


class Budget(_Members):
    """Upper bounds on what the images of one graph may cost, before a byte of them is trusted: it belongs to the whole graph,
    however many files that has. (The lengths that a header names are held against the limits of their format, and against
    the size of the file, before anything is allocated.) OptionError for values that cannot be."""

    __slots__ = ()

    def __new__(cls, *values: int | None, **named: int | None) -> Self:
        return cls._make(_Members(*values, **named))  # type: ignore[arg-type]  # looked at below

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Self:  # type: ignore[override]  # also what `_replace` makes is checked
        made = tuple.__new__(cls, iterable)
        for name, value in zip(cls._fields, made, strict=True):
            if (value is not None or name != "max_output") and (not isinstance(value, int) or value < 0):
                raise OptionError(f"{name} of a budget is {value!r}, not a number from 0 on")
        if made.chain_depth > MAX_CHAIN:
            raise OptionError(f"chain_depth is {made.chain_depth}, and no chain is deeper than {MAX_CHAIN} files")
        return made


class Memory:
    """Counts the memory of the images of one graph against the limit of their budget: `taken` bytes so far."""

    __slots__ = ("_limit", "taken")

    def __init__(self, limit: int, taken: int = 0) -> None:
        self._limit = limit
        self.taken = taken

    def take(self, count: int, what: str, path: str | None = None) -> None:
        """Book `count` bytes for `what`, before they are allocated. Raises LimitExceeded where the limit leaves less."""
        if self.taken + count > self._limit:
            raise LimitExceeded(
                f"{what} takes {count} bytes of memory, and of {self._limit} for all images of this graph {self.taken} "
                "are in use",
                path=path,
                hint="raise memory in the budget (--limits memory=1G), if these images are trusted",
            )
        self.taken += count


#: The default budget, strict enough for untrusted files.
DEFAULT_BUDGET = Budget()
