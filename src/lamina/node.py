"""The contract of a node: what every storage, format and filter is, and what it may rely on.

A disk image is a graph of nodes. *Storage* nodes are where bytes lie; *format* nodes lay a disk out in storage; *filter*
nodes watch or change what passes. Each node implements the operations below. It never calls another node directly: it
holds its children as edges (`request.Child`), and the edge is the request path. So a driver may rely on this:

- every request is inside the node: `0 <= offset`, `offset + length <= size`. Only storage that grows (`growable`) is also
  handed writes that end past its size, when a format allocates there;
- no request is empty, and none changes a node that was opened read-only;
- offset and end are multiples of what the driver declared in `limits`, except that the node's own end (`size`) counts as
  aligned; and no request is longer than the declared maximum;
- requests that overlap, rounded out to `serialise` bytes, are ordered: reads share, all others exclude;
- views are C-contiguous `memoryview`s of format "B"; a driver keeps no reference to one after it returns.

In return it does each request whole or raises a `LaminaError`; after an error the bytes of that request, and no others,
are undefined. All operations may be called from any number of threads at once. All offsets and lengths are in bytes.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from .errors import NotSupported, ReadOnly, UnsupportedFeature
from .limits import MAX_SIZE, Limits
from .ranges import RangeLock

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .graph import Opener
    from .report import CheckReport
    from .request import Child
    from .schema import Schema

#: Flags of `write` and `zero`.
FUA = 1  #: the operation returns only when its bytes are on stable storage
MAY_UNMAP = 2  #: `zero` may give the storage back
NO_FALLBACK = 4  #: `zero` must be quick, or raise NotSupported without touching a byte

_serial = itertools.count(1)


class Node:
    """One node of the graph. Subclass `StorageNode`, `FilterNode`, `TransformNode` or `FormatNode` rather than this."""

    #: The driver's name in options and in the registry.
    driver: ClassVar[str]
    #: The options that `open` accepts, with types and documentation.
    schema: ClassVar[Schema]
    #: Flags that `write` and `zero` honour themselves; the request path emulates FUA by a flush where it is missing.
    supported_flags: int = 0

    def __init__(self, *, name: str | None = None, read_only: bool = False) -> None:
        self.name = name or f"{self.driver}#{next(_serial)}"
        self.read_only = read_only
        #: role -> edge; frozen while requests run.
        self.children: dict[str, Child] = {}
        self.ranges = RangeLock()

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """The node that `options` (parsed by `schema`) describe; children are opened through `opener`."""
        raise NotImplementedError

    # -- what it is

    @property
    def size(self) -> int:
        """The length of the node in bytes, exact, never rounded."""
        raise NotImplementedError

    @property
    def growable(self) -> bool:
        """Whether a write past the end makes the node longer (storage for formats)."""
        return False

    @property
    def limits(self) -> Limits:
        """What requests to this node look like. Asked when an edge to it is made."""
        return Limits()

    @property
    def serialise(self) -> int:
        """Granularity in which the request path orders overlapping requests; 0: the driver does not need it."""
        return 0

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        """(file, shift): byte `x` of this node is byte `x + shift` of that file; None if there is no such simple answer."""
        return None

    @property
    def filename(self) -> str:
        """How a person would name this node: a path where there is one."""
        for child in self.children.values():
            return child.node.filename
        return self.name

    # -- what it does

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`."""
        raise self.refuse("read")

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to `view`. `flags`: FUA."""
        raise self.refuse("write")

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes read as zero, without sending zeros. Raise NotSupported (touching nothing) where that cannot be
        done quickly: the request path then writes them. `flags`: FUA, MAY_UNMAP, NO_FALLBACK."""
        raise self.refuse("zero")

    def discard(self, offset: int, length: int) -> None:
        """The caller no longer needs these bytes; the storage may be given back. NotSupported is no failure."""
        raise self.refuse("discard")

    def flush(self) -> None:
        """When this returns, everything that was written before it was called is on stable storage."""

    def truncate(self, size: int) -> None:
        """Make the node `size` bytes long; what is added reads as zero."""
        raise self.refuse("truncate")

    def extents(self, offset: int, length: int) -> Extents:
        """The exact status of these bytes: contiguous, covering each byte once, coalesced. Never rounded."""
        raise self.refuse("extents")

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are known to read as zero without reading them. May miss, never invents."""
        return False

    def event(self, name: str) -> None:
        """The node above is about to do what `name` says (`l2_load`, `write_aio`, ...), so that a test can make it fail
        right there. Nothing happens unless the driver overrides this (`blkdebug` does)."""

    def close(self) -> None:
        """Give everything back, children last. Called once, with no request running. Storage is closed even if an earlier
        step fails; the first error is raised."""
        first: BaseException | None = None
        for child in self.children.values():
            try:
                child.close()
            except Exception as error:  # noqa: BLE001 - every child is closed; the first error is raised below
                first = first or error
        self.children = {}
        if first is not None:
            raise first

    def refuse(self, operation: str) -> NotSupported:
        """The error that says that this driver cannot do `operation`."""
        return NotSupported(f"the driver {self.driver} has no {operation}", node=self.name, operation=operation)

    def __repr__(self) -> str:
        inside = ", ".join(f"{role}={child.node!r}" for role, child in self.children.items())
        return f"<{self.name}{': ' if inside else ''}{inside}>"


class StorageNode(Node):
    """Where bytes lie. It is its own host file; what is added when it grows reads as zero."""

    #: The path it was opened by, where it is a file: names inside images are relative to its directory.
    path: str | None = None
    #: (device, inode) where it is a file, so that a chain that contains itself is noticed.
    identity: tuple[int, int] | None = None

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        return (self, 0)


class _OverImage(Node):
    """What both kinds of filters share: one child, `image`."""

    # The edge to the child does what the child cannot.
    supported_flags = FUA

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.children["image"] = image

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Opens `image`; the other options become keyword arguments of the class."""
        rest = {key.replace("-", "_"): value for key, value in options.items() if key != "image"}
        image = opener.child("image", options["image"], grows=True)
        return cls(image, name=opener.name, read_only=opener.read_only, **rest)

    @property
    def image(self) -> Child:
        return self.children["image"]

    def flush(self) -> None:
        self.image.flush()


class FilterNode(_OverImage):
    """An *observer*: it leaves bytes, offsets and lengths alone. Everything passes to the child `image` unless overridden;
    an operation that it does not know may pass too, since passing cannot corrupt."""

    @property
    def size(self) -> int:
        return self.image.node.size

    @property
    def growable(self) -> bool:
        return self.image.node.growable

    @property
    def limits(self) -> Limits:
        return self.image.node.limits

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        return self.image.node.host_base

    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.image.discard(offset, length)

    def truncate(self, size: int) -> None:
        self.image.truncate(size)

    def extents(self, offset: int, length: int) -> Extents:
        return self.image.extents(offset, length)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.image.reads_zero(offset, length)


class TransformNode(_OverImage):
    """A filter that changes bytes, offsets or lengths. It refuses every operation that it does not implement: one that
    passed through unchanged would corrupt data. Only `flush` passes."""


# What holds a stretch of a format's disk (Mapping.kind).
BELOW = 0  #: not this layer: the backing node answers, or zero where there is none
ZERO = 1  #: reads as zero; offset >= 0 where a place in `file` is kept for it
DATA = 2  #: stored in the child `file` at `offset`
COMPRESSED = 3  #: packed in the child `file` at `offset`; `read_packed` unpacks


class Mapping(NamedTuple):
    """What holds the first `length` bytes that were asked about."""

    kind: int
    length: int
    offset: int = -1  #: place in the child `file`, -1: none


class Reservation:
    """Room for a write that no reader can see yet: `length` bytes of the request go to `host` in the child `file`.

    Where `new` is true the room is fresh: the `head` bytes before and the `tail` bytes after the request's own belong to
    the same clusters and must be filled with what they read as before. `blank`: the room is known to read as zero.
    """

    __slots__ = ("blank", "head", "host", "length", "new", "offset", "tail", "token")

    def __init__(self, offset: int, length: int, host: int, *, new: bool = False, head: int = 0, tail: int = 0) -> None:
        self.offset = offset
        self.length = length
        self.host = host
        self.new = new
        self.head = head
        self.tail = tail
        self.blank = False
        self.token: Any = None


class FormatNode(Node):
    """A layout of a disk in the child `file`, over the child `backing` where there is one.

    A format implements a *mapping*, not I/O. Reads, status and copy-on-write all derive from it, here, so that they cannot
    disagree: `map` for one small request, `map_columns` for a whole stretch (a conformance test holds them equal), and for
    writing `reserve` -> the bytes are written -> `commit`, or `abandon` if that failed. A mapping is never published before
    the bytes that it points to are on their way.
    """

    def map(self, offset: int, length: int) -> Mapping:
        """What holds the byte at `offset`, and for how many bytes from there, up to `length`, the answer stays the same kind
        and contiguous. Plain Python: the path of small reads."""
        raise NotImplementedError

    def map_columns(self, offset: int, length: int) -> Extents:
        """The same for the whole stretch, as columns made by `columns`; stretches of kind BELOW are not present."""
        raise NotImplementedError

    def reserve(self, offset: int, length: int) -> Reservation:
        """Room for the first bytes of a write. Raises if there is none."""
        raise self.refuse("write")

    def commit(self, reservation: Reservation) -> None:
        """The bytes are written: readers see them from now on."""

    def abandon(self, reservation: Reservation) -> None:
        """The bytes were not written: the room is free again, and readers never saw it."""

    def read_packed(self, offset: int, mapping: Mapping, view: memoryview) -> None:
        """Fill `view` from a COMPRESSED stretch that begins at `offset`."""
        raise self.refuse("read of packed data")

    @classmethod
    def inspect(cls, storage: Child) -> dict[str, Any]:
        """What the header in `storage` says, opening nothing else: "virtual-size", "cluster-size", "backing-filename",
        "backing-filename-format" where the format has them, and "format-specific" with all the rest. It works for images
        that use features which `open` refuses; "unsupported" then lists those. Raises FormatError if there is no header."""
        raise UnsupportedFeature(f"the driver {cls.driver} cannot inspect")

    def check(self) -> CheckReport:
        """Hold the structures of the image against one another, changing nothing. Findings are returned, not raised."""
        raise UnsupportedFeature(f"the driver {self.driver} has no check")

    # -- what derives from the mapping

    @property
    def file(self) -> Child:
        return self.children["file"]

    @property
    def backing(self) -> Child | None:
        return self.children.get("backing")

    def read_into(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        at = offset
        while at < end:
            mapping = self.map(at, end - at)
            kind, length, host = mapping
            part = view if length == len(view) else view[at - offset : at - offset + length]
            if kind == DATA:
                self.file.read_into(host, part)
            elif kind == BELOW:
                self.read_below(at, part)
            elif kind == ZERO:
                fill_zero(part)
            else:
                self.read_packed(at, mapping, part)
            at += length

    def read_below(self, offset: int, view: memoryview) -> None:
        """Fill `view` with what the layers below hold; zeros past their end."""
        backing = self.backing
        inside = 0
        if backing is not None:
            inside = min(max(backing.node.size - offset, 0), len(view))
            if inside:
                backing.read_into(offset, view[:inside])
        if inside < len(view):
            fill_zero(view[inside:])

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        end = offset + len(view)
        at = offset
        while at < end:
            room = self.reserve(at, end - at)
            try:
                part = view[at - offset : at - offset + room.length]
                if room.new:
                    self._fill(room, part)
                else:
                    self.file.write(room.host, part)
            except BaseException:
                self.abandon(room)
                raise
            self.commit(room)
            at += room.length

    def _fill(self, room: Reservation, part: memoryview) -> None:
        """Write the request's bytes into fresh room, and around them what was there before (copy-on-write)."""
        head, tail = room.head, room.tail
        before, after = room.offset - head, room.offset + room.length
        # Room that is known to be blank need not be filled with zeros.
        if head and room.blank and self.reads_zero(before, head):
            head, before = 0, room.offset
        if tail and room.blank and self.reads_zero(after, min(tail, max(self.size - after, 0))):
            tail = 0
        if not head and not tail:
            self.file.write(room.host, part)
            return
        # One buffer, one write: a reader of the file never finds the cluster half filled.
        whole = memoryview(bytearray(head + room.length + tail))
        if head:
            self.read_into(before, whole[:head])
        whole[head : head + room.length] = part
        inside = min(tail, max(self.size - after, 0))  # the last cluster may pass the end of the disk: zeros there
        if inside:
            self.read_into(after, whole[head + room.length : head + room.length + inside])
        self.file.write(room.host - head, whole)

    def extents(self, offset: int, length: int) -> Extents:
        own = self.map_columns(offset, length)
        if own.present.all():
            return own
        if self.backing is None:
            return _nobody_below(own)
        return own.over(_status_below(self.backing, offset, length))

    def reads_zero(self, offset: int, length: int) -> bool:
        end = offset + length
        while offset < end:
            kind, run, _ = self.map(offset, end - offset)
            if kind == BELOW:
                backing = self.backing
                if backing is not None:
                    inside = min(max(backing.node.size - offset, 0), run)
                    if inside and not backing.reads_zero(offset, inside):
                        return False
            elif kind != ZERO:
                return False
            offset += run
        return True

    def columns(self, start: Any, length: Any, flags: Any, host: Any) -> Extents:
        """Columns of this layer, which become the answer's own; `host` is the place in the child `file`, -1 where there is
        none. The rows are contiguous, and not checked again."""
        from .extents import Extents
        from .numeric import np

        base = self.file.node.host_base
        if base is None:
            host = np.full(len(start), -1, dtype=np.int64)
        elif base[1]:
            host = np.where(host >= 0, host + base[1], -1)
        files = () if base is None else (base[0],)
        file = (host >> 63).astype(np.int32)  # 0, the only one, or -1
        return Extents(int(start[0]), start, length, flags, np.zeros(len(start), np.int32), file, host, files)


def _nobody_below(own: Extents) -> Extents:
    """The status of the bottom layer: what it does not own reads as zero, and nobody owns it."""
    from .extents import ZERO, Extents
    from .numeric import np

    flags = np.where(own.present, own.flags, np.uint8(ZERO))
    return Extents(own.begin, own.start, own.length, flags, own.depth, own.file, own.offset, own.files)


def _status_below(backing: Child, offset: int, length: int) -> Extents:
    """What the layers below answer for a stretch of a layer. Past the end of a shorter backing node it reads as zero and is
    owned by the layer whose end was passed."""
    from .extents import Extents

    inside = min(max(backing.node.size - offset, 0), length)
    if not inside:
        return Extents.single(offset, length, zero=True, present=True)
    below = backing.extents(offset, inside)
    # What is added may be like what the layer below ends with.
    return below if inside == length else below.pad_zero(offset + length).coalesce()


_ZEROS = bytes(1 << 16)


def fill_zero(view: memoryview) -> None:
    """Set every byte of `view` to zero."""
    length = len(view)
    if length <= len(_ZEROS):
        view[:] = _ZEROS[:length]
    else:
        view[:] = bytes(length)


def require_writable(node: Node, operation: str) -> None:
    """Raise ReadOnly if `node` was opened read-only."""
    if node.read_only:
        raise ReadOnly(
            "it was opened read-only",
            path=node.filename,
            operation=operation,
            hint="open it for writing (read_only=False; not -r)",
        )


def check_size(size: int) -> int:
    """`size` if a node can be that long, else ValueError."""
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is outside 0..{MAX_SIZE}")
    return size
