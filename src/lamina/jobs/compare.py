"""Compare two images. The job reads only ranges that are not zero in both; a longer image may be longer by zeros."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from ..extents import COMPRESSED, DATA, PRESENT, ZERO
from ..limits import KIB, MIB
from ..numeric import np
from ..workers import Task, Workers
from ..zeros import is_zero
from .progress import Monitor
from .requests import Requests, Threaded, in_order, requests_for
from .windows import pairs, stretches, windows

if TYPE_CHECKING:
    from ..extents import Extents
    from ..image import Image
    from ..pending import Pending

#: What a thread reads from both at a time: small enough that its cache still holds the first when the second is compared with
#: it, and large enough for two threads, which alternate. (4.3 GB each of raw and qcow2: 0.70 s; 0.95 with 256 KiB, 0.85 with
#: 1 MiB, and 1.10 with one thread.)
_PIECE = 512 * KIB
#: Threads that each read both images and compare. (Two that read one image each, for a third that compares, take longer than
#: one thread does.)
_THREADS = 2
#: What is looked at in one step: by a thread, piece by piece, or read at once where an image is far away.
_STEP = 2 * MIB

#: What a strict comparison looks at, by flags: whether a byte is stored, zero without being stored, and owned. (Which stored
#: zeros lie in a hole is the business of the file system: a copy of a file may have other holes.)
_STATUS = np.array([flags & (DATA | PRESENT) | (0 if flags & DATA else flags & ZERO) for flags in range(16)], np.uint8)
#: How strictly two images are compared: by content alone, by size and status, or by compression too.
Strict = Literal["", "status", "compression"]

_Pair: TypeAlias = tuple[bytearray, bytearray]

# Which of the two images must be read, because it is not known to be zero there; or nothing is read: they are unlike by their
# status, or it is only said how far we are.
_BOTH, _FIRST, _SECOND, _UNLIKE, _NEITHER = 0, 1, 2, 3, 4


class Difference(NamedTuple):
    """The first thing in which two images differ: their size, the status of a byte (strict only), or a byte."""

    kind: Literal["size", "status", "content"]
    offset: int


def compare(
    first: Image,
    second: Image,
    *,
    strict: Strict | bool = "",
    parallel: int | None = None,
    monitor: Monitor | None = None,
) -> Difference | None:
    """The first difference between two disks, or None.

    What one has beyond the end of the other must read as zero. With `strict` "status" (or True) the sizes must be equal too,
    and so must be, for each byte, whether it is stored, is zero without being stored, and is owned by any layer; with
    "compression" also whether it is stored compressed. `parallel`: so many pieces are read at once, 1 to 16; None: two
    threads read and compare, or 8 requests are in flight if an image is remote. Raises the errors of reading, and Cancelled.
    """
    watch = monitor or Monitor()
    total = max(first.size, second.size)
    if strict and first.size != second.size:
        return Difference("size", min(first.size, second.size))
    mine = requests_for(first, second.node, asked=parallel, name="lamina-compare")
    theirs = requests_for(second, first.node, asked=parallel, name="lamina-compare")
    near = parallel is None and mine.count == 1
    reader = _Comparers(first, second) if near else _Reader(mine, theirs)
    try:
        try:
            with closing(in_order(_steps(first, second, strict), reader.begin, reader.count)) as steps:
                for step in steps:
                    if (found := reader.look(step)) is not None:
                        return found
                    watch.update(step.end, total)
        finally:
            reader.close()
    finally:
        reader.close()  # an interrupt that struck the first time finds the second
    return None


class _Step(NamedTuple):
    """Something to look at; all before `begin` is equal when that before it is."""

    what: int
    begin: int
    end: int


def _steps(first: Image, second: Image, strict: Strict | bool) -> Iterator[_Step]:
    """What must be looked at, in order, in steps of at most `_STEP` bytes."""
    shared = min(first.size, second.size)
    for mine, theirs in pairs(first, second, 0, shared):
        status = _first_status(mine, theirs, compression=strict == "compression") if strict else None
        end = mine.end if status is None else status
        for which, begin, length in _unequal(mine.clip(mine.begin, end), theirs.clip(mine.begin, end)):
            yield from _pieces(which, begin, length)
        if status is not None:
            yield _Step(_UNLIKE, status, status)
            return
        yield _Step(_NEITHER, end, end)
    longer, which = (first, _FIRST) if first.size > second.size else (second, _SECOND)
    for rest in windows(longer, shared, longer.size):
        stored = rest.where(zero=False)
        for begin, length in zip(stored.start.tolist(), stored.length.tolist(), strict=True):
            yield from _pieces(which, begin, length)
        yield _Step(_NEITHER, rest.end, rest.end)


def _pieces(which: int, begin: int, length: int) -> Iterator[_Step]:
    end = begin + length
    for at in range(begin, end, _STEP):
        yield _Step(which, at, min(at + _STEP, end))


def _unequal(mine: Extents, theirs: Extents) -> Iterator[tuple[int, int, int]]:
    """(which, start, length) of what must be read, in order: all but what is zero in both."""
    stored, other = mine.where(zero=False), theirs.where(zero=False)
    parts = (
        stored.intersect(other),
        stored.intersect(theirs.where(zero=True)),
        other.intersect(mine.where(zero=True)),
    )
    which = np.repeat((_BOTH, _FIRST, _SECOND), [len(part) for part in parts])
    start = np.concatenate([part.start for part in parts])
    length = np.concatenate([part.length for part in parts])
    return stretches(which, start, length, near=(_BOTH, _FIRST, _SECOND))


def _first_status(mine: Extents, theirs: Extents, *, compression: bool) -> int | None:
    """Where the flags of the two first differ (not where the bytes lie, nor in which layer)."""
    edges = np.union1d(mine.start, theirs.start)
    flags = [one.flags[np.searchsorted(one.start, edges, "right") - 1] for one in (mine, theirs)]
    status = [_STATUS[one] | (one & COMPRESSED if compression else np.uint8(0)) for one in flags]
    differs = np.flatnonzero(status[0] != status[1])
    return int(edges[differs[0]]) if len(differs) else None


class _Comparers:
    """Threads that read the same stretch of both images and compare it."""

    count = 2 * _THREADS  # no thread waits for its next step

    def __init__(self, first: Image, second: Image) -> None:
        self._roots = (first.root, second.root)
        self._workers = Workers(_THREADS, "lamina-compare")
        self._free = _Buffers(_PIECE)
        self._tasks: deque[Task[int | None]] = deque()  # of the steps that were begun, in their order

    def begin(self, step: _Step) -> list[Pending]:
        """Start to compare what the step looks at."""
        if step.what in (_NEITHER, _UNLIKE):
            return []
        task = Task(self._compared, step)
        self._tasks.append(task)
        self._workers.start(task)
        return [Threaded(task)]

    def _compared(self, step: _Step) -> int | None:
        buffers = self._free.taken()
        try:
            for begin in range(step.begin, step.end, _PIECE):
                piece = _Step(step.what, begin, min(begin + _PIECE, step.end))
                for one in _read_for(step):
                    self._roots[one].read_into(begin, memoryview(buffers[one])[: piece.end - begin])
                if (found := _differs(piece, buffers)) is not None:
                    return begin + found
            return None
        finally:
            self._free.give_back(buffers)

    def look(self, step: _Step) -> Difference | None:
        """The first difference of the step; what `begin` started is finished."""
        if step.what == _NEITHER:
            return None
        if step.what == _UNLIKE:
            return Difference("status", step.begin)
        found = self._tasks.popleft().result()
        return None if found is None else Difference("content", found)

    def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        self._workers.close()


class _Reader:
    """Reads the same stretch of both images, of which one is far away, with several requests in flight."""

    def __init__(self, mine: Requests, theirs: Requests) -> None:
        self.count = mine.count
        self._requests = (mine, theirs)
        self._free = _Buffers(_STEP)
        self._taken: deque[_Pair] = deque()  # of the steps that were begun, in their order

    def begin(self, step: _Step) -> list[Pending]:
        """Start to read what the step looks at."""
        if step.what in (_NEITHER, _UNLIKE):
            return []
        buffers = self._free.taken()
        self._taken.append(buffers)
        count = step.end - step.begin
        return [self._requests[one].start_read(step.begin, memoryview(buffers[one])[:count]) for one in _read_for(step)]

    def look(self, step: _Step) -> Difference | None:
        """The first difference of the step; what `begin` started is finished."""
        if step.what == _NEITHER:
            return None
        if step.what == _UNLIKE:
            return Difference("status", step.begin)
        buffers = self._taken.popleft()
        found = _differs(step, buffers)
        self._free.give_back(buffers)
        return None if found is None else Difference("content", step.begin + found)

    def close(self) -> None:
        for requests in self._requests:
            requests.close()


class _Buffers:
    """Pairs of buffers that are used again. Thread-safe."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._free: list[_Pair] = []

    def taken(self) -> _Pair:
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(self._length), bytearray(self._length)

    def give_back(self, pair: _Pair) -> None:
        self._free.append(pair)


def _read_for(step: _Step) -> tuple[int, ...]:
    """Which of the two images are read."""
    return (0, 1) if step.what == _BOTH else (step.what - 1,)


def _differs(step: _Step, buffers: _Pair) -> int | None:
    """Where the first byte differs, or is not zero where only one image is read, from the beginning of the step."""
    views = [memoryview(buffer)[: step.end - step.begin] for buffer in buffers]
    return _first_unlike(buffers[0], *views) if step.what == _BOTH else _first_stored(views[step.what - 1])


def _first_unlike(buffer: bytearray, mine: memoryview, theirs: memoryview) -> int | None:
    # Comparing views goes item by item; this is one memcmp, and copies nothing.
    if buffer.startswith(theirs):
        return None
    return int(np.flatnonzero(np.frombuffer(mine, np.uint8) != np.frombuffer(theirs, np.uint8))[0])


def _first_stored(view: memoryview) -> int | None:
    return None if is_zero(view) else int(np.flatnonzero(np.frombuffer(view, np.uint8))[0])
