"""The contract of a format: it tells a mapping of the disk, and all its input and output derives from that mapping.

A driver implements the hooks of `FormatNode`. Which of them run at the same time, and under which lock:

- `map`, `map_columns` and `load` may be called at any moment, by any number of threads, while any other hook runs. A read
  holds its range of the disk (see `Node.serialise`), so nobody writes, zeroes or drops those bytes meanwhile; a question for
  the status holds nothing, and its answer may be out of date when it arrives.
- `reserve`, `store`, `commit`, `abandon` and `drop` are called by a thread that holds the range of its request, rounded out
  to `serialise` bytes, alone. Threads that hold other ranges call them at the same time: a driver locks what these share, its
  tables, by itself, and does not hold that lock while bytes of the disk are read or written.
- `flush` and `truncate`: a flush may come at any moment, also between `reserve` and `commit`; `truncate` holds the whole
  disk.

The requests of a driver are inside the disk, and none is empty: `length` is at least 1 wherever it is a parameter.
KeyboardInterrupt may strike at the entry of every function and at the return of every call. What is left then must be whole:
storage that belongs to nobody is allowed, a mapping of storage that belongs to somebody else is not.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

from . import limits
from .format import Format
from .holes import lies_in_hole, runs_with_holes, stored, with_holes
from .limits import MIB
from .node import MAY_UNMAP, bounded, fill_zero, is_plain, plain
from .status import DATA, PRESENT, ZERO, Status

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .request import Child

#: What a disk writes at once.
_SECTOR = 512
#: A question for the status of so many bytes that few rows answer is answered in plain Python, in a fourth of the time.
_SMALL, _FEW = MIB, 4


class Mapping(NamedTuple):
    """What the first `length` bytes that were asked about are.

    ======================  ============================================================================================
    flags                   meaning
    ======================  ============================================================================================
    0                       this layer does not own them: the layer below answers, or they are zero where there is none
    ZERO | PRESENT          they read as zero; with an offset, storage is kept for them there
    DATA | PRESENT          they are stored in `child`; with an offset, they lie there as they read
    ... | COMPRESSED        stored compressed, without an offset
    PRESENT                 they lie at an offset of `child` as they read, and the child says whether they are stored or zero:
                            a flat layout, which keeps no table of what is stored
    ======================  ============================================================================================

    An offset is a promise: the bytes at `offset` of `child` are the bytes of the disk, so a reader may fetch them from there,
    and where the child has a hole they read as zero (`holes` says so in the status). What is stored in any other way
    (compressed, encrypted) has no offset, and `FormatNode.load` fetches it; `token` is for `load` alone, so that it need not
    look the stretch up again."""

    flags: int  #: the bits of `status`
    length: int  #: bytes, 1 to what was asked for
    offset: int = -1  #: where in `child`, -1: nowhere
    child: Child | None = None  #: the edge to the child that holds the bytes, or storage for them
    token: Any = None  #: the driver's own


class Columns(NamedTuple):
    """What a stretch of the disk is: the rows of `Mapping` as columns, contiguous, equal and contiguous neighbours joined."""

    start: Any  #: int64, increasing
    length: Any  #: int64, above 0
    flags: Any  #: uint8
    offset: Any  #: int64, -1: none
    children: tuple[Child, ...]  #: the children in which the offsets count
    child: Any = None  #: int32, indexes into `children`; None: all offsets count in the first


class Reservation:
    """Storage for a write that no reader can see yet: `length` bytes of the request, from `offset` of the disk on, go to
    `host` in `child`.

    Where `new` is true the storage is fresh: the `head` bytes before and the `tail` bytes after the request's own lie in the
    same clusters, and are filled with what they read as before. `blank`: fresh storage that is known to read as zero, so that
    zeros need not be written there. `token` is the driver's own.
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
        self.offset = offset
        self.length = length
        self.host = host
        self.child = child
        self.new = new
        self.head = head
        self.tail = tail
        self.blank = blank
        self.token = token


class To(enum.Enum):
    """How a stretch reads after `FormatNode.drop`."""

    ZERO = enum.auto()  #: as zero
    BELOW = enum.auto()  #: as the layer below, or as zero where there is none
    #: As zero, or as before; the caller needs the bytes no more, and wants the storage back. Never as the layer below,
    #: whose bytes are older.
    ANY = enum.auto()


class FormatNode(Format):
    """A layout of a disk in the child `file` (and in others where the format has them), over the child `backing` where there
    is one.

    A format implements a *mapping*, not I/O. Reads, status and copy-on-write all derive from it, here, so that they cannot
    disagree: `map` for one small request, `map_columns` for a whole stretch (a conformance test holds them equal). To write:
    `reserve`, then the bytes are stored, then `commit`, or `abandon` where that failed. To zero and to discard: `drop`.
    """

    #: The edge to the storage that holds the format's own structures; also among the children.
    file: Child

    # -- the hooks of a driver

    def map(self, offset: int, length: int) -> Mapping:
        """What the byte at `offset` is, and for how many bytes from there, up to `length`, the answer stays the same and
        contiguous (or for fewer: the caller asks again). Changes nothing. Plain Python: it is the path of small reads. Raises
        CorruptImage where the tables say what cannot be."""
        raise NotImplementedError

    def map_columns(self, offset: int, length: int) -> Columns:
        """The same for the whole stretch, or for as much of it, from its beginning, as `limits.MAX_ROWS` rows tell.
        `block_runs` makes columns of the entries of a table."""
        raise NotImplementedError

    def load(self, mapping: Mapping, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes of the disk from `offset` on, all of which `mapping`, whose flags include DATA, holds;
        called where it has no offset (otherwise the bytes are read from there). A compressed or encrypted format decodes
        here. The lock of the tables is not held, nor needed: the range is."""
        raise self.refuse("read of encoded data")

    def reserve(self, offset: int, length: int) -> Reservation:
        """Storage for the first bytes of a write: at least 1, at most `length`. What the driver changes here (counts, free
        lists) may be on disk before `commit`; what `map` answers stays. It is the last hook before the bytes are stored that
        may fail for want of space, or since the tables are corrupt: whatever `commit` will need is there when this returns.
        After an error nothing is reserved."""
        raise self.refuse("write")

    @plain
    def store(self, reservation: Reservation, offset: int, view: memoryview, event: str = "write_aio") -> None:
        """Write `view` to the storage that was reserved, at the place of byte `offset` of the disk: inside the request, or in
        the head or tail around it. An encrypting format encodes a copy here and hands it to `super().store`.

        Where that makes the child longer, zeros follow up to the end of a sector: otherwise a later write of that whole
        sector could be torn, if the power goes and the new length is lost. `event` is told to the child (see `Node.event`).
        After an error the storage holds anything, and `abandon` follows."""
        child = reservation.child
        host = reservation.host + offset - reservation.offset
        if child.event is not None:
            child.event(event)
        end = host + len(view)
        if end % _SECTOR and end > child.node.size and child.node.growable:
            view = memoryview(b"".join((view, bytes(-end % _SECTOR))))
        child.write(host, view)

    def commit(self, reservation: Reservation) -> None:
        """The bytes are stored: from now on `map` answers with them. Called once for each reservation that was stored in
        full, also for one that is not `new` (whose mapping stands already). A mapping that points to bytes reaches the disk
        after them: at the next flush, or at once if the driver flushes in between. After an error, which only a corrupt image
        is a reason for, the old mapping holds, or the new one."""

    def abandon(self, reservation: Reservation) -> None:
        """The bytes were not stored, or not all of them: fresh storage is free again, and no reader saw it. Called once, in
        place of `commit`, also after an interrupt; where the interrupt strikes first, nothing is called, and storage that
        belongs to nobody is left."""

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        """Give up what the stretch holds; from now on it reads as `to` says. The stretch begins and ends on multiples of
        `limits.zero_alignment` (for ANY `discard_alignment`) or at the end of the disk, and is no longer than the limits say.
        `keep`: storage that it has stays reserved for later writes, where the format can do so.

        References go first: storage is free for others only when no table, in memory or on disk, names it. Raises
        NotSupported, before anything is changed, where the format cannot say that; the request path then writes zeros, or
        drops a discard. After any other error each block of the stretch reads as before, or as `to` says."""
        raise self.refuse("discard" if to is To.ANY else "zero")

    @property
    def given_back(self) -> int:
        """How often storage that a mapping named was given back to a child (discarded, cut off), so that it became a hole. A
        driver that does so counts before each time: an answer for the status that was under way takes no hole of then for
        what its mapping of before reads as."""
        return 0

    # -- what derives from the mapping

    @property
    def backing(self) -> Child | None:
        return self.children.get("backing")

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
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
                self.load(mapping, offset, part)
            else:
                self.read_below(offset, part)
            if part is view:
                return
            offset += length
            view = view[length:]

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
        end = offset + len(view)
        at = offset
        while at < end:
            room = self.reserve(at, end - at)
            try:
                part = view[at - offset : at - offset + room.length]
                if room.new:
                    self._fill(room, part)
                else:
                    self.store(room, at, part)
            except BaseException:
                self.abandon(room)
                raise
            self.commit(room)
            at += room.length

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Whole clusters (`serialise`), whose places are reserved and published as those of a write. Refused before anything
        is reserved where the file hears of each write, and where the driver encodes what it stores."""
        unit, end = self.serialise or 1, offset + length
        if offset % unit or end % unit or self.file.event is not None or not is_plain(type(self).store):
            raise self.refuse("copy from a file here")
        at = offset
        while at < end:
            room = self.reserve(at, end - at)
            try:
                if room.head or room.tail:
                    raise self.refuse("copy of a part of a cluster")
                room.child.copy_from(room.host, source, source_offset + at - offset, room.length, flags)
            except BaseException:
                self.abandon(room)
                raise
            self.commit(room)
            at += room.length

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.drop(offset, length, To.ZERO, keep=not flags & MAY_UNMAP)

    def discard(self, offset: int, length: int) -> None:
        self.drop(offset, length, To.ANY)

    def _fill(self, room: Reservation, part: memoryview) -> None:
        """Write the request's bytes into fresh storage, and around them what was there before (copy-on-write)."""
        head, tail = room.head, room.tail
        before, after = room.offset - head, room.offset + room.length
        # Storage that is known to be blank need not be filled with zeros.
        if head and room.blank and self.reads_zero(before, head):
            head, before = 0, room.offset
        if tail and room.blank and self.reads_zero(after, min(tail, max(self.size - after, 0))):
            tail = 0
        if not head and not tail:
            self.store(room, room.offset, part)
            return
        room.child.tell("cow_read")
        # One buffer, one write: a reader of the child never finds the cluster half filled.
        whole = memoryview(bytearray(head + room.length + tail))
        if head:
            self.read_into(before, whole[:head])
        whole[head : head + room.length] = part
        inside = min(tail, max(self.size - after, 0))  # the last cluster may pass the end of the disk: zeros there
        if inside:
            self.read_into(after, whole[head + room.length : head + room.length + inside])
        room.child.tell("write_aio")
        self.store(room, before, whole, "cow_write")

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
        """The same; without `holes` the children are not asked for theirs."""
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
                file, place = (None, -1) if base is None else (base[0], base[1] + host)
                runs = [(flags, run)] if flags & ZERO else [(flags | DATA, run)]
                if holes and not flags & ZERO:
                    runs = runs_with_holes(flags, child, host, run, most - len(found))
                run = 0
                for told, size in runs:
                    found.append(Status(told, size, 0, file, place))
                    run += size
                    place += size if base is not None else 0
            offset += run
        return found

    def _first_below(self, offset: int, length: int, most: int, found: list[Status]) -> None:
        """Append what the layers below answer for a stretch that this layer does not own, up to `most` rows in all."""
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
        """By the mapping alone: data that lies in a hole counts as data. The request path asks this before it makes a whole
        cluster zero where a part of one was asked for, and a cluster that stores data stays one."""
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
    """The columns of one layer as an answer, whose offsets count in host files. It takes the columns over, and does not check
    them again."""
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
        file = (offset >> 63).astype(np.int32)  # 0, the only one, or -1
        files = () if base is None else (base[0],)
        alike = base is None
    else:
        files = tuple(dict.fromkeys(base[0] for base in bases if base is not None))
        # The last of each is for rows without a child, whose index is -1.
        number = np.array([*(-1 if base is None else files.index(base[0]) for base in bases), -1], np.int32)
        shift = np.array([*(0 if base is None else base[1] for base in bases), 0], np.int64)
        child = np.zeros(len(start), np.int32) if child is None else child
        file = np.where(offset >= 0, number[child], np.int32(-1))
        offset = np.where(file >= 0, offset + shift[child], -1)
        alike = True
    found = Extents(int(start[0]), start, length, flags, np.zeros(len(start), np.int32), file, offset, files)
    # Rows that only their offset told apart may have lost it.
    return found.coalesce() if alike else found


def _extents_of_few(begin: int, rows: list[Status]) -> Extents:
    """These few rows as columns. Neighbours that are alike and contiguous become one row."""
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
    """The status of the bottom layer: what it does not own reads as zero, and nobody owns it."""
    from .extents import Extents
    from .numeric import np

    flags = np.where(own.flags, own.flags, np.uint8(ZERO))
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
