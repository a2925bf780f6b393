"""The status of ranges of a disk in plain Python: its bits, a range with one status, and one extent.

The bits have the same meaning everywhere: in the mapping of a format (`format_node`), in the columns of `extents`, in NBD and
on the command line. Base layer, without numpy, since small reads use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from .extents import Extents

#: DATA: the bytes are stored. ZERO: they read as zeros. PRESENT: they belong to a layer, so no layer below it matters.
#: COMPRESSED: they are stored compressed, and so have no offset.
#:
#: ZERO without DATA: no bytes are stored. DATA and ZERO: a layer has storage for the range, which reads as zeros, since the
#: file has a hole there. Neither: the range belongs to no layer (only a mapping says so; `extents` adds ZERO). A reader of
#: content uses ZERO; a reader that counts allocated bytes uses DATA.
DATA: Final = 1
ZERO: Final = 2
PRESENT: Final = 4
COMPRESSED: Final = 8


class HostFile(Protocol):
    """The file to which host offsets refer: a node of the graph. Two are equal if they are the same object."""

    @property
    def filename(self) -> str: ...


class HostPath(NamedTuple):
    """A host file in extents that were pickled: its path. The node itself belongs to the process that opened it."""

    filename: str


class Extent(NamedTuple):
    """`length` bytes from `start` with one status. The other fields have the meaning of the columns of `Extents`."""

    start: int
    length: int
    data: bool = False
    zero: bool = False
    present: bool = False
    depth: int = 0
    compressed: bool = False
    file: HostFile | None = None
    offset: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.length


class Status(NamedTuple):
    """The status of the first `length` bytes of a range, with the fields of a row of `Extents`."""

    flags: int  #: DATA, ZERO, PRESENT, COMPRESSED
    length: int  #: bytes, above 0
    depth: int = 0  #: the layer to which the bytes belong; 0 is the top
    file: HostFile | None = None  #: the file that stores the bytes uncompressed, or None
    offset: int = -1  #: their offset in that file, or -1


def rows_of(found: Extents, most: int) -> list[Status]:
    """The first `most` rows of `found`, in plain Python."""
    files = (*found.files, None)  # index -1 finds the None
    columns = (found.flags, found.length, found.depth, found.file, found.offset)
    rows = zip(*(column[:most].tolist() for column in columns), strict=True)
    return [Status(flags, size, depth, files[file], host) for flags, size, depth, file, host in rows]
