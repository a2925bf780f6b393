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

A read, a write or a zero can also be started and asked for later (`start_read`, ...; the contract is in `pending.py`). By
default it is done when it is started. Storage that is far away returns a request that goes on by itself, and filters that
only observe hand that on. Until a request is finished it owns its view, which the driver may keep so long, and its range.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar
from weakref import ref

from . import lifecycle, limits
from .errors import NotSupported, ReadOnly
from .limits import MAX_SIZE, Limits
from .pending import Pending, Startable
from .ranges import RangeLock
from .reopening import Reopenable
from .schema import IMAGE, Option, Schema
from .zeros import fill_zero as fill_zero  # where drivers look for it

if TYPE_CHECKING:
    from .bitmap import DirtyBitmap
    from .edge import Edge
    from .extents import Extents, HostFile
    from .graph import Opener
    from .request import Child
    from .root import Graph
    from .status import Status

#: Flags of `write`, `zero` and `copy_from`.
FUA = 1  #: the operation returns only when its bytes are on stable storage
MAY_UNMAP = 2  #: `zero` may give the storage back
NO_FALLBACK = 4  #: `zero` and `copy_from` must be quick, or raise NotSupported without touching a byte
#: `write` stores whole blocks of `limits.compress_alignment` compressed where that is smaller; all else, and everything where
#: a node cannot compress, is stored as it is: what is read back is the same.
COMPRESS = 8

_serial = itertools.count(1)

_Method = TypeVar("_Method", bound=Callable[..., None])
_plain: set[Any] = set()


def plain(method: _Method) -> _Method:
    """Marks a `read_into` or `write` that hands bytes on and does nothing else, so that they may travel another way as well
    (`Node.copyable`, `Node.copy_from`). The mark is on the method: who overrides it, to count, delay, change or fail, has
    it no more, and sees every byte."""
    _plain.add(method)
    return method


def is_plain(method: Callable[..., None]) -> bool:
    """Whether this `read_into` or `write`, as found in a class, is marked by `plain`."""
    return method in _plain


class Node(Startable, Reopenable):
    """One node of the graph. Subclass `StorageNode`, `FilterNode`, `TransformNode` or `FormatNode` rather than this."""

    #: The driver's name in options and in the registry.
    driver: ClassVar[str]
    #: The options that `open` accepts, with types and documentation.
    schema: ClassVar[Schema]
    #: What the options `detect-zeroes` and `discard` ask of the request path (see `request.py`): writes of zeros become
    #: `zero` with these flags, None: they do not; discards are passed on.
    zero_detected: int | None = None
    discards: bool = True
    #: Flags that `write` and `zero` honour themselves; the request path emulates FUA by a flush where it is missing, and
    #: takes COMPRESS away.
    supported_flags: int = 0
    #: Whether a request path may zero a whole block of `limits.zero_alignment` where a part of it was asked for and the rest
    #: reads as zero: storage and formats do not tell the two apart, a filter that watches requests does.
    widens_zero: ClassVar[bool] = True
    #: The line of code that opened the graph below this node, as "file:line"; None: `lifecycle` does not close it.
    opened_at: str | None = None
    #: Its graph: set when the node is opened, or when a root is placed on it or above it.
    graph: Graph | None = None
    #: Bytes of memory that it keeps for tables as long as it is open, as it booked them (`Opener.book`).
    kept_bytes = 0
    #: Whether another process opened it: this one was forked from that.
    foreign: bool = False
    _settled: bool = False
    #: What to do where a change is refused because the node is read-only.
    writable_hint: ClassVar[str] = "open it for writing (read_only=False; not -r)"

    def __init__(self, *, name: str | None = None, read_only: bool = False) -> None:
        self.name = name or f"{self.driver}#{next(_serial)}"
        self.read_only = read_only
        #: role -> edge; frozen while requests run.
        self.children: dict[str, Child] = {}
        #: Weak references to the edges to this node, and to some that were redirected; see `parents`.
        self._parents: set[ref[Edge]] = set()
        self.ranges = RangeLock()
        lifecycle.nodes.add(self)

    def __del__(self) -> None:
        if self.opened_at is not None:
            lifecycle.forget(self)

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
    def copyable(self) -> bool:
        """Whether reading through this node is the same as reading where `extents` says that bytes lie (`file`, `offset`), so
        that they may be copied from there (`copy_from`) while nobody writes to it. False where this node, or one below it,
        does anything else about reads: injects faults, counts, delays, verifies, holds newer bytes back."""
        return is_plain(type(self).read_into) and all(child.node.copyable for child in self.children.values())

    @property
    def faithful(self) -> bool:
        """Whether its disk follows from its driver and its children alone: no other option chooses what is read. Of a filter:
        whether bytes, offsets, lengths and layers are those of its child. Each class says so itself (see `is_faithful`)."""
        return False

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """The dirty bitmaps of this node by name. A filter that leaves bytes and offsets alone has those of its child."""
        return {}

    @property
    def pipelines(self) -> bool:
        """Whether a read or write that was started goes on by itself, so that several at once take no longer than one."""
        forwards = type(self).start_read is not self.starts_as.start_read
        return forwards and any(child.node.pipelines for child in self.children.values())

    @property
    def held(self) -> bool:
        """Whether this node, or one below, still holds what only `close` gives back: a descriptor, a connection."""
        return any(child.node.held for child in self.children.values())

    @property
    def allocated(self) -> int | None:
        """Bytes that it takes up on its device, where it is a file; else None."""
        return None

    @property
    def has_other_writer(self) -> bool:
        """Whether another program has it open for writing now, as far as that can be told: by its locks, of a file."""
        return False

    @property
    def filename(self) -> str:
        """How a person would name this node: a path where there is one."""
        for child in self.children.values():
            return child.node.filename
        return self.name

    def parents(self) -> list[Edge]:
        """The edges to this node, of nodes above it and of roots. The node is closed with the last one."""
        return [edge for known in tuple(self._parents) if (edge := known()) is not None and edge.node is self]

    def beneath(self) -> Iterator[Node]:
        """This node and all nodes below it, each once."""
        seen, line = {id(self)}, [self]
        for node in line:
            yield node
            for child in node.children.values():
                if id(child.node) not in seen:
                    seen.add(id(child.node))
                    line.append(child.node)

    # -- what it does

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`."""
        raise self.refuse("read")

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to `view`. `flags`: FUA, COMPRESS."""
        raise self.refuse("write")

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to those at `source_offset` of the host file `source` (`Extents.files`) without
        passing them through this process. `flags`: NO_FALLBACK: only by sharing the storage, no byte is copied.

        Raise NotSupported where that cannot be done, before a byte is touched as far as the system tells in time: the caller
        reads and writes the whole range instead. Nobody looks at the bytes on the way, so a node that must see what is
        written refuses."""
        raise self.refuse("copy from a file")

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
        """The exact status of these bytes: contiguous, covering each byte once, coalesced. Never rounded.

        An answer begins at `offset` and has at most `limits.MAX_ROWS` rows: it may end before the request does, wherever the
        node likes, but not before its first byte. The caller asks again from there (`Image.extents` and `jobs.windows`
        do). A node that lays several answers over one another cuts them where the shortest ends."""
        raise self.refuse("extents")

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are known to read as zero without reading them. May miss, never invents."""
        return False

    def event(self, name: str) -> None:
        """The node above is about to do what `name` says (`l2_load`, `write_aio`, ...), so that a test can make it fail
        right there. Nothing happens unless the driver overrides this (`blkdebug` does)."""

    def graph_changed(self) -> None:
        """A node below was exchanged; no request runs. What was derived from the children is derived again."""

    def settle(self) -> None:
        """Write what this node holds back; the first thing that `close` does. After an error the children are closed all the
        same, but not after an interrupt: what is held back would have no place to go, and `close` is called again."""

    def close(self) -> None:
        """Give everything back, children last. Called with no request running; called again only where an interrupt cut it
        short, and then it does the rest. Storage is closed even if an earlier step fails; the first error is raised."""
        first: BaseException | None = None
        if not self._settled:
            try:
                self.settle()
            except Exception as error:  # noqa: BLE001 - raised below, when everything was given back
                first = error
            self._settled = True
        for child in self.children.values():
            try:
                child.close()
            except Exception as error:  # noqa: BLE001 - every child is closed; the first error is raised below
                first = first or error
        self.children = {}
        if first is not None:
            raise first

    # -- after a fork

    def after_fork(self) -> None:
        """Called in a child process, which may read through this node from now on, and change nothing. Its locks are free
        again, also those that a thread held which only the parent has. (The methods are replaced in the child alone, so that
        no request asks in which process it runs.)"""
        self.foreign, self.read_only, self.opened_at = True, True, None
        for operation in ("write", "zero", "discard", "flush", "truncate", "copy_from"):
            setattr(self, operation, partial(_refuse_foreign, self, operation))
        self.close = self.forsake  # type: ignore[method-assign]
        lifecycle.renew_locks(self, set())

    def forsake(self) -> None:
        """What `close` does in a process that only inherited this node: give descriptors back, and nothing else."""
        for child in self.children.values():
            child.close()
        self.children = {}

    def refuse(self, operation: str) -> NotSupported:
        """The error that says that this driver cannot do `operation`."""
        return NotSupported(f"the driver {self.driver} has no {operation}", node=self.name, operation=operation)

    def warn(self, text: str, *values: object) -> None:
        """Log a failure that no request fails for, under `lamina.DRIVER`."""
        import logging

        logging.getLogger(f"lamina.{self.driver}").warning(text, *values)

    def __repr__(self) -> str:
        inside = ", ".join(f"{role}={child.node!r}" for role, child in self.children.items())
        return f"<{self.name}{': ' if inside else ''}{inside}>"


class StorageNode(Node):
    """Where bytes lie. It is its own host file; what is added when it grows reads as zero."""

    #: The path it was opened by, where it is a file: names inside images are relative to its directory.
    path: str | None = None
    #: (device, inode) where it is a file, so that a chain that contains itself is noticed.
    identity: tuple[int, int] | None = None
    #: Whether another program, or another machine, does the work: where that takes long, several requests at once take no
    #: longer than one.
    far: ClassVar[bool] = False
    #: Whether unflushed writes may be lost with a connection that is made anew: the next `flush` fails, later ones do not.
    reconnects: bool = False

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        return (self, 0)


class _OverImage(Node):
    """What both kinds of filters share: one child, `image`. A filter gives its `driver` and its `options`; where it has no
    `schema` of its own, one is made of them."""

    #: The options that it takes besides `image`.
    options: ClassVar[tuple[Option, ...]] = ()
    # The edge to the child does what the child cannot.
    supported_flags = FUA
    widens_zero = False

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.image = image
        self.children["image"] = image

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "driver" in cls.__dict__ and "schema" not in cls.__dict__:
            cls.schema = Schema(cls.driver, (IMAGE, *cls.options))

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Opens `image`; the other options become keyword arguments of the class."""
        rest = {key.replace("-", "_"): value for key, value in options.items() if key != "image"}
        image = opener.child("image", options["image"], grows=True)
        return cls(image, name=opener.name, read_only=opener.read_only, **rest)

    @property
    def limits(self) -> Limits:
        return self.image.node.limits

    def flush(self) -> None:
        self.image.flush()

    def reopen(self, read_only: bool) -> None:
        self.reopen_over(self.children.values(), read_only)


class FilterNode(_OverImage):
    """An *observer*: it leaves bytes, offsets and lengths alone. Everything passes to the child `image` unless overridden;
    an operation that it does not know may pass too, since passing cannot corrupt. (`copy_from` moves bytes that it would
    not see, and so passes only a filter that leaves `write` as it is.)"""

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self.supported_flags |= image.node.supported_flags & COMPRESS

    @property
    def limits(self) -> Limits:
        """The image's; but zeroing passes as it comes, for the edge to the image to align."""
        limits = self.image.node.limits
        return limits._replace(zero_alignment=limits.request_alignment)

    @property
    def size(self) -> int:
        return self.image.node.size

    @property
    def growable(self) -> bool:
        return self.image.node.growable

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        return self.image.node.host_base

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        return self.image.node.bitmaps

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(offset, view)

    @plain
    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Passes only where writes pass unseen. A filter with a `write` of its own would be got round: it refuses, unless it
        says here too what happens."""
        if not is_plain(type(self).write):
            raise self.refuse("copy from a file")
        self.image.copy_from(offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.image.discard(offset, length)

    def truncate(self, size: int) -> None:
        self.image.truncate(size)

    def extents(self, offset: int, length: int) -> Extents:
        return self.image.extents(offset, length)

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        return self.image.first_extents(offset, length, most)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.image.reads_zero(offset, length)

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self.image.start_read(offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return self.image.start_write(offset, view, flags)

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        return self.image.start_zero(offset, length, flags)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return self.image.zero_runs(offset, length)

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        return self.image.start_zero_runs(offset, length)


class TransformNode(_OverImage):
    """A filter that changes bytes, offsets or lengths. It refuses every operation that it does not implement: one that
    passed through unchanged would corrupt data. Only `flush` passes, and the limits are the image's."""


def is_faithful(node: Node) -> bool:
    """Whether the class of `node` itself says that it is `faithful`."""
    return "faithful" in vars(type(node)) and node.faithful


def bounded(found: Extents) -> Extents:
    """As much of `found` as one answer may hold (see `Node.extents`)."""
    most = limits.MAX_ROWS
    return found if len(found) <= most else found.clip(found.begin, int(found.start[most]))


def _refuse_foreign(node: Node, operation: str, *_: object, **__: object) -> NoReturn:
    raise foreign(node, operation)


def foreign(node: Node, operation: str) -> ReadOnly:
    """The error for an operation that only the process which opened `node` may do."""
    return ReadOnly(
        "another process opened it, and this one was forked from that: it can only read here",
        path=node.filename,
        operation=operation,
        hint="open it in this process, after the fork",
    )


def require_writable(node: Node, operation: str) -> None:
    """Raise ReadOnly if `node` was opened read-only, or by another process."""
    if node.foreign:
        raise foreign(node, operation)
    if node.read_only:
        raise ReadOnly("it was opened read-only", path=node.filename, operation=operation, hint=node.writable_hint)


def check_size(size: int) -> int:
    """`size` if a node can be that long, else ValueError."""
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is outside 0..{MAX_SIZE}")
    return size
