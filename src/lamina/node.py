"""The contract of a node: the interface of every storage, format and filter, and the guarantees of the request path.

A disk image is a graph of nodes. *Storage* nodes store bytes; *format* nodes map a disk to storage; *filter* nodes observe or
change requests. Each node implements the operations below. A node never calls another node directly: it holds its children as
edges (`request.Child`), and each edge applies the rules of the request path. A driver may rely on these rules:

- Every request is inside the node: `0 <= offset` and `offset + length <= size`. The exception is growable storage
  (`growable`): it also receives writes past its size, since a format allocates space there.
- No request is empty, and a node that was opened read-only receives no change.
- Offset and end are multiples of the alignments in `limits`; the end of the node (`size`) always counts as aligned. No
  request is longer than the declared maximum.
- Overlapping requests, rounded out to `serialise` bytes, are ordered: reads share a range, all other requests exclude.
- Buffers are C-contiguous `memoryview`s of format "B". A driver keeps no reference to a buffer after it returns.

In return a driver completes each request, or raises a `LaminaError`; after an error the bytes of that request, and no other
bytes, are undefined. Any number of threads may call all operations at the same time. All offsets and lengths are in bytes.

A caller can also start a read, write or zero request, and wait for it later (`start_read`, ...; the contract is in
`pending.py`). By default a request completes when it is started. Far storage returns a request that continues by itself, and
filters that only observe pass it on. A request owns its buffer and its range until it is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar
from weakref import ref

from . import lifecycle, limits
from .errors import Hint, NotSupported, ReadOnly
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
FUA = 1  #: the operation returns when its bytes are on stable storage
MAY_UNMAP = 2  #: `zero` may deallocate the storage
NO_FALLBACK = 4  #: `zero` and `copy_from` must be fast, or raise NotSupported before they change a byte
#: `write` compresses whole blocks of `limits.compress_alignment` where that makes them smaller. All other bytes, and all
#: bytes of a node that cannot compress, are stored uncompressed; a reader sees no difference.
COMPRESS = 8

_Method = TypeVar("_Method", bound=Callable[..., None])
_plain: set[Any] = set()


def plain(method: _Method) -> _Method:
    """Mark a `read_into` or `write` that passes bytes on and does nothing else, so that the bytes may also take another path
    (`Node.copyable`, `Node.copy_from`). The mark belongs to the method: an override that counts, delays, changes or fails
    requests has no mark, and sees every byte."""
    _plain.add(method)
    return method


def is_plain(method: Callable[..., None]) -> bool:
    """Whether this `read_into` or `write`, as found in a class, has the mark of `plain`."""
    return method in _plain


class Node(Startable, Reopenable):
    """One node of the graph. Derive from `StorageNode`, `FilterNode`, `TransformNode` or `FormatNode` instead of this."""

    #: The driver's name in options and in the registry.
    driver: ClassVar[str]
    #: The options that `open` accepts, with types and documentation.
    schema: ClassVar[Schema]
    #: The options `detect-zeroes` and `discard`, for the request path (see `request.py`): with flags, writes of zeros become
    #: `zero` requests with these flags, with None they do not; `discards`: whether discards are passed to the driver.
    zero_detected: int | None = None
    discards: bool = True
    #: Flags that `write` and `zero` implement. The request path emulates a missing FUA by a flush, and removes a missing
    #: COMPRESS.
    supported_flags: int = 0
    #: Whether the request path may zero a whole block of `limits.zero_alignment` for a request that covers a part of it, if
    #: the other bytes read as zero. Storage and formats do not tell the two apart; a filter that observes requests does.
    widens_zero: ClassVar[bool] = True
    #: The line of code that opened the graph below this node, as "file:line"; None: `lifecycle` does not close it.
    opened_at: str | None = None
    graph: Graph | None = None  #: set when the node is opened, or when a root on it or above it is created
    #: Bytes of memory for its loaded tables, as the driver booked them (`Opener.book`), and the limit for its whole graph.
    kept_bytes: int = 0
    memory_limit: int = MAX_SIZE
    given: Mapping[str, str] = {}  #: the options that differ from their defaults, as text (`Schema.told`)
    transient: ClassVar[bool] = False  #: what is written to this node itself is gone when it is closed
    foreign: bool = False  #: another process opened the node, and this one was forked from it
    _settled: bool = False
    #: The hint of the error for a change of a read-only node.
    writable_hint: ClassVar[str] = Hint("open it for writing (read_only=False)", command="open it for writing (no -r)")

    def __init__(self, *, name: str | None = None, read_only: bool = False) -> None:
        self.name: str = name or f"{self.driver}#{lifecycle.next_number()}"
        self.read_only: bool = read_only
        #: role -> edge; frozen while requests run.
        self.children: dict[str, Child] = {}
        #: Weak references to the edges to this node; some of these edges may have been redirected. See `parents`.
        self._parents: set[ref[Edge]] = set()
        self.ranges: RangeLock = RangeLock()
        lifecycle.nodes.add(self)

    def __del__(self) -> None:
        if self.opened_at is not None:
            lifecycle.forget(self)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """The node that `options` (parsed by `schema`) describe; `opener` opens the children."""
        raise NotImplementedError

    # -- properties

    @property
    def size(self) -> int:
        """The exact length of the node in bytes."""
        raise NotImplementedError

    @property
    def growable(self) -> bool:
        """Whether a write past the end extends the node (storage for formats)."""
        return False

    @property
    def limits(self) -> Limits:
        """The limits of requests to this node. An edge reads them when it is created."""
        return Limits()

    @property
    def serialise(self) -> int:
        """The granularity in which the request path orders overlapping requests; 0: the driver needs no order."""
        return 0

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        """(file, shift): byte `x` of this node is byte `x + shift` of that file. None if no single shift describes it."""
        return None

    @property
    def copyable(self) -> bool:
        """Whether a read through this node returns the bytes at the location in `extents` (`file`, `offset`), so that a job
        may copy them from there (`copy_from`) while nothing writes to the node. False where this node, or a node below it,
        treats reads in another way: it injects faults, counts, delays, verifies, or holds newer bytes in memory."""
        return is_plain(type(self).read_into) and all(child.node.copyable for child in self.children.values())

    @property
    def faithful(self) -> bool:
        """Whether its driver and its children alone determine its disk: no other option has an effect on reads. For a filter:
        whether bytes, offsets, lengths and depths are those of its child. Each class declares this itself (see
        `is_faithful`)."""
        return False

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """The dirty bitmaps of this node by name. A filter that leaves bytes and offsets alone has those of its child."""
        return {}

    @property
    def pipelines(self) -> bool:
        """Whether started reads and writes continue by themselves, so that several at once take no longer than one."""
        forwards = type(self).start_read is not self.starts_as.start_read
        return forwards and any(child.node.pipelines for child in self.children.values())

    @property
    def held(self) -> bool:
        """Whether this node, or a node below it, still has a descriptor or a connection, which only `close` releases."""
        return any(child.node.held for child in self.children.values())

    @property
    def allocated(self) -> int | None:
        """The allocated bytes of its device, if it is a file; otherwise None."""
        return None

    @property
    def has_other_writer(self) -> bool:
        """Whether another program has the node open for writing now, as far as the locks of a file show that."""
        return False

    @property
    def filename(self) -> str:
        """The name of this node in messages: a path if there is one."""
        for child in self.children.values():
            return child.node.filename
        return self.name

    def parents(self) -> list[Edge]:
        """The edges to this node, from nodes above it and from roots. The node is closed with the last one."""
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

    # -- operations

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`."""
        raise self.refuse("read")

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to `view`. `flags`: FUA, COMPRESS."""
        raise self.refuse("write")

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to those at `source_offset` of the host file `source` (`Extents.files`) without
        reading them into this process. `flags`: NO_FALLBACK: share the storage, and copy no byte.

        Raises NotSupported if that is impossible, before a byte changes, as far as the system reports it in time; the caller
        then reads and writes the whole range. No node sees the bytes, so a node that must see what is written refuses."""
        raise self.refuse("copy from a file")

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes read as zero without a transfer of zeros. Raise NotSupported, before a byte changes, if there is no
        fast way: the request path then writes zeros. `flags`: FUA, MAY_UNMAP, NO_FALLBACK."""
        raise self.refuse("zero")

    def discard(self, offset: int, length: int) -> None:
        """The caller no longer needs these bytes; the driver may free their storage. NotSupported is not a failure."""
        raise self.refuse("discard")

    def flush(self) -> None:
        """Return when all bytes of earlier writes are on stable storage."""

    def truncate(self, size: int) -> None:
        """Make the node `size` bytes long; added bytes read as zero."""
        raise self.refuse("truncate")

    def extents(self, offset: int, length: int) -> Extents:
        """The exact status of these bytes: contiguous, each byte once, coalesced, never rounded.

        A result begins at `offset` and has at most `limits.MAX_ROWS` rows. It may end before the range does, at any byte
        after the first; the caller continues from there (`Image.extents` and `jobs.windows` do). A node that combines several
        results cuts them at the end of the shortest one."""
        raise self.refuse("extents")

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are known to read as zero, without reading them. False is always allowed."""
        return False

    def event(self, name: str) -> None:
        """The node above is about to do the step `name` (`l2_load`, `write_aio`, ...); a test can make that step fail. By
        default nothing happens (`blkdebug` overrides this)."""

    def graph_changed(self) -> None:
        """An edit replaced a node below; no request runs. The node updates all state that depends on its children."""

    def settle(self) -> None:
        """Write out buffered data; the first step of `close`. After an error `close` still closes the children. After an
        interrupt it does not, since the buffered data still needs them; `close` is then called again."""

    def close(self) -> None:
        """Release all resources, children last. No request runs meanwhile. A second call only follows an interrupted one, and
        completes it. Storage is closed even if an earlier step fails; the first error is raised."""
        first: BaseException | None = None
        if not self._settled:
            try:
                self.settle()
            except Exception as error:  # noqa: BLE001 - raised below, after the children are closed
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
        """Called in a child process, which may read through this node from now on but change nothing. Its locks become free,
        including those that a thread of the parent held. (The methods are replaced in the child process alone, so no request
        checks in which process it runs.)"""
        self.foreign, self.read_only, self.opened_at = True, True, None
        for operation in ("write", "zero", "discard", "flush", "truncate", "copy_from"):
            setattr(self, operation, partial(_refuse_foreign, self, operation))
        self.close = self.forsake  # type: ignore[method-assign]
        lifecycle.renew_locks(self, set())

    def forsake(self) -> None:
        """The `close` of a process that inherited this node: close descriptors, and do nothing else."""
        for child in self.children.values():
            child.close()
        self.children = {}

    def refuse(self, operation: str) -> NotSupported:
        """The error for an operation that this driver does not have."""
        return NotSupported(f"the driver {self.driver} has no {operation}", node=self.name, operation=operation)

    def warn(self, text: str, *values: object) -> None:
        """Log a failure that fails no request, under `lamina.DRIVER`. Without a handler it goes to standard error."""
        import logging

        logger = logging.getLogger(f"lamina.{self.driver}")
        logger.warning(text if logger.hasHandlers() else f"lamina: {text}", *values)

    def __repr__(self) -> str:
        inside = ", ".join(f"{role}={child.node!r}" for role, child in self.children.items())
        return f"<{self.name}{': ' if inside else ''}{inside}>"


class StorageNode(Node):
    """A node that stores bytes. It is its own host file; bytes that are added when it grows read as zero."""

    #: The path by which it was opened, if it is a file: names inside images are relative to its directory.
    path: str | None = None
    #: (device, inode) if it is a file; a chain that contains itself is detected by it.
    identity: tuple[int, int] | None = None
    #: Whether another program or another machine executes the requests. Several concurrent requests to far storage take no
    #: longer than one.
    far: ClassVar[bool] = False
    #: Whether a reconnection can lose unflushed writes: the next `flush` then fails, and later ones do not.
    reconnects: bool = False

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        return (self, 0)


class _ImageFilter(Node):
    """The common part of both kinds of filters: one child, `image`. A filter sets its `driver` and its `options`; these make
    its schema, unless it has a `schema` of its own."""

    schema: ClassVar[Schema]
    options: ClassVar[tuple[Option, ...]] = ()  #: besides `image`
    supported_flags = FUA  # the edge to the child emulates what the child does not implement
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
        """Open `image`; the other options become keyword arguments of the class."""
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


class FilterNode(_ImageFilter):
    """An *observer*: it leaves bytes, offsets and lengths alone. Every operation that it does not override passes to the
    child `image`. That includes operations that the filter does not know, since a request that passes corrupts nothing.
    (`copy_from` moves bytes that the filter would not see, so it passes only if the filter does not override `write`.)"""

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self.supported_flags: int = self.supported_flags | (image.node.supported_flags & COMPRESS)

    @property
    def limits(self) -> Limits:
        """Those of the image, but zero requests pass unaligned: the edge to the image aligns them."""
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
        """Passes if writes pass unchanged. A filter with a `write` of its own would be bypassed, so it refuses unless it
        overrides this, too."""
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


class TransformNode(_ImageFilter):
    """A filter that changes bytes, offsets or lengths. It refuses every operation that it does not implement, since a request
    that passed through unchanged would corrupt data. Only `flush` passes, and the limits are those of the image."""


def is_faithful(node: Node) -> bool:
    """Whether the class of `node` itself declares that it is `faithful`."""
    return "faithful" in vars(type(node)) and node.faithful


def bounded(found: Extents) -> Extents:
    """The first rows of `found`, as many as one result may have (see `Node.extents`)."""
    most = limits.MAX_ROWS
    return found if len(found) <= most else found.clip(found.begin, int(found.start[most]))


def _refuse_foreign(node: Node, operation: str, *_: object, **__: object) -> NoReturn:
    raise foreign(node, operation)


def foreign(node: Node, operation: str) -> ReadOnly:
    """The error for an operation that is reserved to the process which opened `node`."""
    return ReadOnly(
        "another process opened it; this process, a fork of that one, can only read it",
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
    """`size` if a node can have that length, else ValueError."""
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is outside 0..{MAX_SIZE}")
    return size
