"""The status of ranges of a disk in plain Python: its bits, a range with one status, and one extent.

The bits have the same meaning everywhere: in the mapping of a format (`format_node`), in the columns of `extents`, in NBD and
on the command line. Base layer, without numpy, since small reads use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, Protocol, cast

from .errors import printable

if TYPE_CHECKING:
    from .extents import Extents
    from .json_forms import ExtentJson

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
    def filename(self) -> str:
        """Its path, or another name for messages."""
        ...


class HostPath(NamedTuple):
    """A host file in extents that were pickled: its name. The node itself belongs to the process that opened it. `open` and
    `os.fspath` take it as a path."""

    filename: str

    def __fspath__(self) -> str:
        return self.filename

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"the host file {printable(self.filename)} has no {name}: these extents were pickled, which leaves the name of "
            "the file only; open the image in this process to use its nodes"
        )


class Extent(NamedTuple):
    """A range of a disk with one status: a row of `Extents`. Offsets and lengths are in bytes."""

    start: int  #: the first byte
    length: int  #: the number of bytes, above 0
    data: bool = False  #: whether the bytes are stored
    zero: bool = False  #: whether they are known to read as zeros
    present: bool = False  #: whether a layer of the chain owns them, so that no deeper layer matters
    #: The number of layers above the one that decides; 0 is the top; the bottom layer if none owns the bytes.
    depth: int = 0
    compressed: bool = False  #: whether they are stored compressed
    file: HostFile | None = None  #: the file that stores them as they are: its node, or a `HostPath`; None if none does
    offset: int | None = None  #: the offset of the first of them in that file

    @property
    def end(self) -> int:
        """The first byte behind the range."""
        return self.start + self.length

    def to_json(self) -> ExtentJson:
        """The same with the names of `lamina map --output=json`; without `file`, and without `offset` if there is none."""
        found = {
            name: getattr(self, name) for name in ("start", "length", "depth", "present", "zero", "data", "compressed")
        }
        return cast("ExtentJson", found if self.offset is None else found | {"offset": self.offset})


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
