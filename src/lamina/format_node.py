"""The contract of a format that maps its disk: reads, writes, block status and copy-on-write all derive from the mapping.

A driver implements the hooks of `FormatNode`. Threads call them as follows:

- Any number of threads may call `map`, `map_columns` and `load` at any moment, while any other hook runs. A read locks its
  range of the disk (see `Node.serialise`), so no thread writes, zeroes or drops those bytes meanwhile. A status query locks
  nothing, and its result may be out of date when it returns.
- The thread that calls `reserve`, `store`, `commit`, `abandon` or `drop` has exclusive use of the range of its request,
  rounded out to `serialise` bytes. Threads with other ranges call them at the same time. The driver has a lock of its own for
  the tables that these ranges share, and does not hold it while bytes of the disk are read or written.
- A `flush` may come at any moment, even between `reserve` and `commit`. A `truncate` has exclusive use of the whole disk.

Requests of a driver are inside the disk and not empty: every parameter `length` is at least 1.
KeyboardInterrupt may strike at the entry of every function and at the return of every call. The image must be consistent
then: a leaked cluster is allowed, a mapping to a cluster that has another use is not.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

from . import limits
from .coding import Encoded, load_all
from .format import Format
from .holes import lies_in_hole, runs_with_holes, stored, with_holes
from .limits import MIB
from .node import MAY_UNMAP, bounded, fill_zero, is_plain, plain
from .pending import DONE, Pending
from .status import DATA, PRESENT, ZERO, Status

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .request import Child

#: A disk writes a sector atomically.
_SECTOR = 512
#: The status of up to `_SMALL` bytes with up to `_FEW` rows is determined in plain Python, in a fourth of the time.
_SMALL, _FEW = MIB, 4


class Mapping(NamedTuple):
    """The status and location of the first `length` bytes of a range.

    ======================  ============================================================================================
    flags                   meaning
    ======================  ============================================================================================
    0                       not in this layer: the bytes are those of the layer below, or zeros if there is none
    ZERO | PRESENT          the bytes read as zero; with an offset, storage is reserved for them there
    DATA | PRESENT          the bytes are stored in `child`; with an offset, they are stored there as they read
    ... | COMPRESSED        the bytes are stored compressed; no offset
    PRESENT                 the bytes are stored at an offset of `child` as they read, and the child knows whether they are
                            data or zero: a flat range, which no table maps
    ======================  ============================================================================================

    An offset is a promise: the bytes at `offset` of `child` are the bytes of the disk. A reader may read them there, and
    where the child has a hole they read as zero (`holes` adds that to the status). Bytes that are stored in another way
    (compressed, encrypted) have no offset, and `FormatNode.load` reads them; `token` saves it a second lookup."""

    flags: int  #: the bits of `status`
    length: int  #: bytes, from 1 to the length of the query
    offset: int = -1  #: the offset in `child`; -1: none
    child: Child | None = None  #: the edge to the child that stores the bytes, or has storage reserved for them
    token: Any = None  #: a value for the driver's own use


class Columns(NamedTuple):
    """The mapping of a range as columns, a row for each `Mapping`: contiguous, with equal neighbours merged."""

    start: Any  #: int64, increasing
    length: Any  #: int64, above 0
    flags: Any  #: uint8
    offset: Any  #: int64, -1: none
    children: tuple[Child, ...]  #: the children to which the offsets refer
    child: Any = None  #: int32, indexes into `children`; None: all offsets refer to the first


class Reservation:
    """Storage for a write that no reader can see yet: `length` bytes of the request, from `offset` of the disk, go to `host`
    in `child`.

    `new`: the storage is newly allocated. The `head` bytes before and the `tail` bytes after the bytes of the request are in
    the same clusters, and are filled with their previous content. `blank`: the new storage is known to read as zero, so zeros
    need not be written to it. `token` is a value for the driver's own use.
    """

    __slots__ = ("blank", "child", "head", "host", "length", "new", "offset", "tail", "token")

    def __init__(
        self,
        offset: int,
        length: int,
        host: int,
        child: Child,
        *,
        new: bool = False,
        head: int = 0,
        tail: int = 0,
        blank: bool = False,
        token: Any = None,
    ) -> None:
        self.offset: int = offset
        self.length: int = length
        self.host: int = host
        self.child: Child = child
        self.new: bool = new
        self.head: int = head
        self.tail: int = tail
        self.blank: bool = blank
        self.token: Any = token


class To(enum.Enum):
    """How a range reads after `FormatNode.drop`."""

    ZERO = enum.auto()  #: as zero
    BELOW = enum.auto()  #: as the layer below, or as zero if there is none
    #: As zero, or as before: the caller no longer needs the bytes, and wants the storage to be freed. Never as the layer
    #: below, whose bytes are older.
    ANY = enum.auto()


class FormatNode(Format):
    """A format that maps its disk to the child `file` (and to other children, for some formats), with an optional child
    `backing` below.

    A driver implements a *mapping*, not I/O. This class derives reads, status and copy-on-write from it, so they always
    agree: `map` serves one small request, and `map_columns` a whole range (a conformance test compares the two). A write
    calls `reserve`, stores the bytes, and calls `commit`, or `abandon` after a failure. Zero requests and discards call
    `drop`.
    """

    #: The edge to the storage of the format's own structures; it is also one of the children.
    file: Child

    # -- the hooks of a driver

    def map(self, offset: int, length: int) -> Mapping:
        """The status and location of the byte at `offset`, and the number of bytes from there, at most `length`, with the
        same status and contiguous locations (or a smaller number: the caller then calls again). Changes nothing. Written in
        plain Python, since small reads call it. Raises CorruptImage for impossible entries of the tables."""
        raise NotImplementedError

    def map_columns(self, offset: int, length: int) -> Columns:
        """The same for the whole range, or for its beginning where it has more than `limits.MAX_ROWS` rows. `block_runs`
        turns the entries of a table into columns."""
        raise NotImplementedError

    def load(self, mapping: Mapping, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes of the disk from `offset`. All of them belong to `mapping`, which has the flag DATA and
        no offset (bytes with an offset are read there). A compressed or encrypted format decodes here. The caller has locked
        the range, not the tables; the range is enough."""
        raise self.refuse("read of encoded data")

    def load_parts(self, parts: list[Encoded]) -> None:
        """`load` of each part of one read. A driver overrides it where several parts cost less than each by itself."""
        for part in parts:
            self.load(*part)

    def reserve(self, offset: int, length: int) -> Reservation:
        """Storage for the first bytes of a write: at least 1 byte, at most `length`. Changes of counts and free lists may
        reach the disk before `commit`; the result of `map` stays the same. This is the last hook that may fail for lack of
        space, or because of corrupt tables: everything that `commit` needs is allocated when this returns. After an error
        nothing is reserved."""
        raise self.refuse("write")

    @plain
    def store(self, reservation: Reservation, offset: int, view: memoryview, event: str = "write_aio") -> None:
        """Write `view` to the reserved storage, at the location of byte `offset` of the disk, which is in the request or in
        the head or tail around it. An encrypting format encodes a copy and passes it to `super().store`.

        If the write extends the child, zeros follow up to the end of the sector. Without them, a power cut that loses the new
        length could tear a later write of that sector. The child receives `event` (see `Node.event`). After an error the
        content of the storage is undefined, and `abandon` follows."""
        child = reservation.child
        host = reservation.host + offset - reservation.offset
        if child.event is not None:
            child.event(event)
        end = host + len(view)
        if end % _SECTOR and end > child.node.size and child.node.growable:
            view = memoryview(b"".join((view, bytes(-end % _SECTOR))))
        child.write(host, view)

    def commit(self, reservation: Reservation) -> None:
        """The bytes are stored; from now on `map` returns their location. Called once for each reservation that was stored
        completely, including one that is not `new` (whose mapping exists already). A mapping reaches the disk after the bytes
        that it points to: at the next flush, or at once if the driver flushes in between. Only a corrupt image is a reason
        for an error; afterwards either the old or the new mapping is in effect."""

    def abandon(self, reservation: Reservation) -> None:
        """The bytes were not stored, or not all of them: free new storage, which no reader has seen. Called once instead of
        `commit`, also after an interrupt. An interrupt that strikes before the call leaves a leaked cluster."""

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        """Remove the content of a range; from now on it reads as `to` says. The range begins and ends at multiples of
        `limits.zero_alignment` (for ANY: of `discard_alignment`) or at the end of the disk, and is not longer than the limits
        allow. `keep`: allocated storage stays reserved for later writes, if the format supports that.

        References are removed first: storage becomes free when no table, in memory or on disk, refers to it. Raises
        NotSupported before any change if the format cannot represent the result; the request path then writes zeros, or
        ignores the discard. After any other error each block of the range reads as before, or as `to` says."""
        raise self.refuse("discard" if to is To.ANY else "zero")

    @property
    def immutable(self) -> bool:
        return self.read_only and all(child.node.immutable for child in self.children.values())

    @property
    def given_back(self) -> int:
        """A count of the occasions on which mapped storage became a hole of a child again (by a discard or a truncation). The
        driver increments it before each of them. A status query compares it before and after: a new hole does not belong to
        an old mapping."""
        return 0

    # -- derived from the mapping

    @property
    def backing(self) -> Child | None:
        """The edge to the backing node; None if there is none."""
        return self.children.get("backing")

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        encoded: list[Encoded] = []
        while True:
            mapping = self.map(offset, len(view))
            flags, length, host, child, _ = mapping
            part = view if length == len(view) else view[:length]
            if flags & ZERO:
                fill_zero(part)
            elif host >= 0:
                assert child is not None
                if child.event is not None:
                    child.event("read_aio")
                child.read_into(host, part)
            elif flags:
                encoded.append(Encoded(mapping, offset, part))
            else:
                self.read_below(offset, part)
            if part is view:
                if encoded:
                    load_all(self, encoded)
                return
            offset += length
            view = view[length:]

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Start the read in the child, if one mapping covers the range; else read at once. The caller holds the range of the
        disk until the request is finished, so the mapping stays."""
        flags, length, host, child, _ = self.map(offset, len(view))
        if length == len(view) and self.file.event is None:
            if not flags:
                child, host = self.backing, offset
            if child is not None and host >= 0 and not flags & ZERO and host + length <= child.size:
                return child.start_read(host, view)
        self.read_into(offset, view)
        return DONE

    def read_below(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes of the layers below, and with zeros past their end."""
        backing = self.backing
        inside = 0 if backing is None else min(max(backing.node.size - offset, 0), len(view))
        if backing is not None and inside:
            self.file.tell("read_backing_aio")
            backing.read_into(offset, view[:inside])
        if inside < len(view):
            fill_zero(view[inside:])

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        end = offset + len(view)
        at = offset
        while at < end:
            reserved = self.reserve(at, end - at)
            try:
                part = view[at - offset : at - offset + reserved.length]
                if reserved.new:
                    self._fill(reserved, part)
                else:
                    self.store(reserved, at, part)
            except BaseException:
                self.abandon(reserved)
                raise
            self.commit(reserved)
            at += reserved.length

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Copy whole clusters (`serialise`), which are reserved and committed like those of a write. Refused, before anything
        is reserved, if the file observes each write or the driver encodes the bytes that it stores."""
        unit, end = self.serialise or 1, offset + length
        if offset % unit or end % unit or self.file.event is not None or not is_plain(type(self).store):
            raise self.refuse("copy from a file here")
        at = offset
        while at < end:
            reserved = self.reserve(at, end - at)
            try:
                if reserved.head or reserved.tail:
                    raise self.refuse("copy of a part of a cluster")
                reserved.child.copy_from(reserved.host, source, source_offset + at - offset, reserved.length, flags)
            except BaseException:
                self.abandon(reserved)
                raise
            self.commit(reserved)
            at += reserved.length

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.drop(offset, length, To.ZERO, keep=not flags & MAY_UNMAP)

    def discard(self, offset: int, length: int) -> None:
        self.drop(offset, length, To.ANY)

    def _fill(self, reserved: Reservation, part: memoryview) -> None:
        """Write the bytes of the request to new storage, and around them the previous content (copy-on-write)."""
        head, tail = reserved.head, reserved.tail
        before, after = reserved.offset - head, reserved.offset + reserved.length
        # Storage that is known to read as zero needs no zeros.
        if head and reserved.blank and self.reads_zero(before, head):
            head, before = 0, reserved.offset
        if tail and reserved.blank and self.reads_zero(after, min(tail, max(self.size - after, 0))):
            tail = 0
        if not head and not tail:
            self.store(reserved, reserved.offset, part)
            return
        reserved.child.tell("cow_read")
        # One buffer, one write: a reader of the child never finds a half-filled cluster.
        whole = memoryview(bytearray(head + reserved.length + tail))
        if head:
            self.read_into(before, whole[:head])
        whole[head : head + reserved.length] = part
        inside = min(
            tail, max(self.size - after, 0)
        )  # the last cluster may extend past the end of the disk, with zeros
        if inside:
            self.read_into(after, whole[head + reserved.length : head + reserved.length + inside])
        reserved.child.tell("write_aio")
        self.store(reserved, before, whole, "cow_write")

    def extents(self, offset: int, length: int) -> Extents:
        if length <= _SMALL:
            rows = FormatNode.first_extents(self, offset, length, min(_FEW, limits.MAX_ROWS))
            if sum([row[1] for row in rows]) == length:
                return _extents_of_few(offset, rows)
        given_back = self.given_back
        mapped = with_holes(self.map_columns(offset, length))
        if self.given_back != given_back:
            mapped = stored(self.map_columns(offset, length))
        own = bounded(_extents_of(mapped))
        if 0 not in own.flags.tobytes():  # this layer owns all of it
            return own
        if self.backing is None:
            return _nobody_below(own)
        below = _status_below(self.backing, offset, own.end - offset)
        return bounded(own.clip(offset, below.end).over(below))

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        given_back = self.given_back
        found = self._first_extents(offset, length, most, True)
        return found if self.given_back == given_back else self._first_extents(offset, length, most, False)

    def _first_extents(self, offset: int, length: int, most: int, holes: bool) -> list[Status]:
        """As `first_extents`; without `holes` the children are not asked for their holes."""
        found: list[Status] = []
        end = offset + length
        while offset < end and len(found) < most:
            flags, run, host, child, _ = self.map(offset, end - offset)
            if not flags:
                self._first_below(offset, run, most, found)
            elif host < 0 or child is None:
                found.append(Status(flags, run))
            else:
                base = child.node.host_base
                file, host_offset = (None, -1) if base is None else (base[0], base[1] + host)
                runs = [(flags, run)] if flags & ZERO else [(flags | DATA, run)]
                if holes and not flags & ZERO:
                    runs = runs_with_holes(flags, child, host, run, most - len(found))
                run = 0
                for told, size in runs:
                    found.append(Status(told, size, 0, file, host_offset))
                    run += size
                    host_offset += size if base is not None else 0
            offset += run
        return found

    def _first_below(self, offset: int, length: int, most: int, found: list[Status]) -> None:
        """Append the status of a range that is not in this layer, up to `most` rows in total."""
        backing = self.backing
        if backing is None:
            found.append(Status(ZERO, length))
            return
        end = offset + length
        inside = min(end, backing.node.size)
        while offset < end and len(found) < most:
            if offset >= inside:
                found.append(Status(ZERO | PRESENT, end - offset, 1))
                return
            for flags, run, depth, file, host in backing.first_extents(offset, inside - offset, most - len(found)):
                found.append(Status(flags, run, depth + 1, file, host))
                offset += run

    def reads_zero(self, offset: int, length: int) -> bool:
        """From the mapping alone: data in a hole counts as data. The request path asks this before it zeroes a whole cluster
        for a request that covers a part of it, and a cluster that stores data remains one."""
        end = offset + length
        while offset < end:
            flags, run, host, child, _ = self.map(offset, end - offset)
            if not flags:
                backing = self.backing
                if backing is not None:
                    inside = min(max(backing.node.size - offset, 0), run)
                    if inside and not backing.reads_zero(offset, inside):
                        return False
            elif flags == PRESENT:
                if child is None or not lies_in_hole(child, host, run):
                    return False
            elif not flags & ZERO:
                return False
            offset += run
        return True


def _extents_of(own: Columns) -> Extents:
    """The columns of one layer as Extents, whose offsets refer to host files. It takes ownership of the columns, and does not
    validate them again."""
    from .extents import Extents
    from .numeric import np

    files: tuple[HostFile, ...]
    start, length, flags, offset, children, child = own
    bases = [edge.node.host_base for edge in children]
    if child is None and len(bases) == 1:
        base = bases[0]
        if base is None:
            offset = np.full(len(start), -1, dtype=np.int64)
        elif base[1]:
            offset = np.where(offset >= 0, offset + base[1], -1)
        file = (offset >> 63).astype(np.int32)  # 0, the only index, or -1
        files = () if base is None else (base[0],)
        alike = base is None
    else:
        files = tuple(dict.fromkeys(base[0] for base in bases if base is not None))
        # The last item of each is for rows without a child, whose index is -1.
        number = np.array([*(-1 if base is None else files.index(base[0]) for base in bases), -1], np.int32)
        shift = np.array([*(0 if base is None else base[1] for base in bases), 0], np.int64)
        child = np.zeros(len(start), np.int32) if child is None else child
        file = np.where(offset >= 0, number[child], np.int32(-1))
        offset = np.where(file >= 0, offset + shift[child], -1)
        alike = True
    found = Extents(int(start[0]), start, length, flags, np.zeros(len(start), np.int32), file, offset, files)
    # Rows that differed in their offset alone may be equal now.
    return found.coalesce() if alike else found


def _extents_of_few(begin: int, rows: list[Status]) -> Extents:
    """These few rows as Extents. Adjacent rows that are equal and contiguous are joined."""
    from .extents import Extents
    from .numeric import np

    files: list[HostFile] = []
    found: list[tuple[int, int, int, int, int, int]] = []
    at = begin
    for flags, length, depth, file, offset in rows:
        number = -1
        if file is not None:
            if file not in files:
                files.append(file)
            number = files.index(file)
        row = (at, length, flags, depth, number, offset)
        if found:
            start, before, *alike, follows = found[-1]
            if alike == [flags, depth, number] and (number < 0 or follows + before == offset):
                row = (start, before + length, flags, depth, number, follows)
                del found[-1]
        found.append(row)
        at += length
    start, length, flags, depth, number, offset = np.array(found, np.int64).T.copy()
    small = (flags.astype(np.uint8), depth.astype(np.int32), number.astype(np.int32))
    return Extents(begin, start, length, *small, offset, tuple(files))


def _nobody_below(own: Extents) -> Extents:
    """The status of the bottom layer: bytes that are not in it read as zero, and belong to no layer."""
    from .extents import Extents
    from .numeric import np

    flags = np.where(own.flags, own.flags, np.uint8(ZERO))
    return Extents(own.begin, own.start, own.length, flags, own.depth, own.file, own.offset, own.files)


def _status_below(backing: Child, offset: int, length: int) -> Extents:
    """The status of the layers below for a range. Bytes past the end of a shorter backing node read as zero, and belong to
    the layer whose end they are past."""
    from .extents import Extents

    inside = min(max(backing.node.size - offset, 0), length)
    if not inside:
        return Extents.single(offset, length, zero=True, present=True)
    below = backing.extents(offset, inside)
    if inside == length or below.end < offset + inside:
        return below
    # The added row may equal the last row of the layer below.
    return below.pad_zero(offset + length).coalesce()
