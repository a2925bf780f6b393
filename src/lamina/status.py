"""The bits of a status, one piece of it, and one extent: what stretches of a disk are, in plain Python.

The bits mean one thing everywhere: in the mapping of a format (`format_node`), in the columns of `extents`, and in what NBD
and the command line tell. In the base layer, without numpy: the path of small reads uses them.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

#: DATA: bytes are stored somewhere. ZERO: they read as zeros. PRESENT: a layer owns them, so none below it counts.
#: COMPRESSED: they are stored compressed (and so at no offset where they could be read as they are).
#:
#: ZERO without DATA: no bytes are stored. DATA and ZERO: a layer keeps storage for the stretch, and what it holds there reads
#: as zeros, since the file has a hole there. Neither: no layer owns the stretch (a mapping alone says so; `extents` adds
#: ZERO). Who only wants content looks at ZERO; who counts what is stored looks at DATA.
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
    """What the first `length` bytes that were asked about are, as a row of `Extents` would say it."""

    flags: int  #: DATA, ZERO, PRESENT, COMPRESSED
    length: int  #: bytes, above 0
    depth: int = 0  #: the layer that decides, 0 is the top
    file: HostFile | None = None  #: the file that holds the bytes as they read, or None
    offset: int = -1  #: where in that file they begin, or -1
