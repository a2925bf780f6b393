"""What every format is: a layout of a disk in storage, told as a mapping from which all its input and output derives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import LaminaError
from .format import Format
from .node import COMPRESS, bounded, fill_zero, plain

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .request import Child

#: What a disk writes at once.
_SECTOR = 512

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


class FormatNode(Format):
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
        """The same for the whole stretch, as columns made by `columns`, or for as much of it as `limits.MAX_ROWS` rows tell;
        stretches of kind BELOW are not present."""
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

    #: Whether the thread that holds the lock of the tables is in the middle of changing them.
    changes = False

    def require_outside_changes(self) -> None:
        """Raise LaminaError where this thread, which holds the lock of the tables, is changing them already: a signal handler
        or a finalizer asks for something. It would find half a change, and make it a wrong one."""
        if self.changes:
            raise LaminaError(
                "this thread is inside a request of this image, and cannot make another before that is done",
                path=self.filename,
                hint="do it after the request (not in a signal handler), or in another thread",
            )

    def after_fork(self) -> None:
        super().after_fork()
        self.changes = False  # the thread that did is the parent's

    def write_packed(self, offset: int, view: memoryview) -> None:
        """A write that asks for COMPRESS: as `write`, packing what can be packed."""
        self.write(offset, view)

    #: The edge to the storage; also among the children.
    file: Child

    # -- what derives from the mapping

    @property
    def backing(self) -> Child | None:
        return self.children.get("backing")

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        at = offset
        while at < end:
            mapping = self.map(at, end - at)
            kind, length, host = mapping
            part = view if length == len(view) else view[at - offset : at - offset + length]
            if kind == DATA:
                file = self.file
                if file.event is not None:
                    file.event("read_aio")
                file.read_into(host, part)
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
                self.file.tell("read_backing_aio")
                backing.read_into(offset, view[:inside])
        if inside < len(view):
            fill_zero(view[inside:])

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if flags & COMPRESS:
            self.write_packed(offset, view)
            return
        end = offset + len(view)
        at = offset
        while at < end:
            room = self.reserve(at, end - at)
            try:
                part = view[at - offset : at - offset + room.length]
                if room.new:
                    self._fill(room, part)
                else:
                    self._store(room.host, part)
            except BaseException:
                self.abandon(room)
                raise
            self.commit(room)
            at += room.length

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Whole clusters (`serialise`), whose places are reserved and published as those of a write. Refused before anything
        is reserved where the file hears of each write."""
        unit, end = self.serialise or 1, offset + length
        if offset % unit or end % unit or self.file.event is not None:
            raise self.refuse("copy from a file here")
        at = offset
        while at < end:
            room = self.reserve(at, end - at)
            try:
                if room.head or room.tail:
                    raise self.refuse("copy of a part of a cluster")
                self.file.copy_from(room.host, source, source_offset + at - offset, room.length, flags)
            except BaseException:
                self.abandon(room)
                raise
            self.commit(room)
            at += room.length

    def _store(self, host: int, part: memoryview, event: str = "write_aio") -> None:
        """Write bytes to their place in the file. Where that makes the file longer it ends on a sector: otherwise a later
        write of that whole sector could be torn, if the power goes and the new length is lost."""
        self.file.tell(event)
        end = host + len(part)
        if end % _SECTOR and end > self.file.node.size and self.file.node.growable:
            part = memoryview(b"".join((part, bytes(-end % _SECTOR))))
        self.file.write(host, part)

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
            self._store(room.host, part)
            return
        self.file.tell("cow_read")
        # One buffer, one write: a reader of the file never finds the cluster half filled.
        whole = memoryview(bytearray(head + room.length + tail))
        if head:
            self.read_into(before, whole[:head])
        whole[head : head + room.length] = part
        inside = min(tail, max(self.size - after, 0))  # the last cluster may pass the end of the disk: zeros there
        if inside:
            self.read_into(after, whole[head + room.length : head + room.length + inside])
        self.file.tell("write_aio")
        self._store(room.host - head, whole, "cow_write")

    def extents(self, offset: int, length: int) -> Extents:
        own = self.map_columns(offset, length)
        if own.present.all():
            return own
        if self.backing is None:
            return _nobody_below(own)
        below = _status_below(self.backing, offset, own.end - offset)
        return bounded(own.clip(offset, below.end).over(below))

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
    if inside == length or below.end < offset + inside:
        return below
    # What is added may be like what the layer below ends with.
    return below.pad_zero(offset + length).coalesce()
