"""Salvaging: reads of a damaged source go on after errors, and blocks that cannot be read become zeros.

A filter over the source does this, so that all jobs read through it in the usual way. It narrows a failed request down to the
smallest ones that fail. An error that says that a connection is lost is raised as ever: nothing of the disk could be read
after it, and all the rest would become zeros.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..descriptors import opening
from ..errors import BlockIOError, CorruptImage, LaminaError, NotSupported, printable
from ..image import Image
from ..limits import KIB, MAX_SIZE, align_down
from ..node import FilterNode, fill_zero
from ..pending import DONE, Pending
from ..request import Child
from .progress import Monitor
from .requests import is_far

if TYPE_CHECKING:
    from ..extents import Extents

#: A read of a part of such a block fails as a whole.
_SECTOR = 512
#: The shortest query of the status after one that failed. Where it fails the bytes are read, so that none is lost for it.
_STATUS = 64 * KIB
_LOST = (
    "ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EPIPE ESHUTDOWN ENETDOWN ENETRESET ENETUNREACH EHOSTUNREACH EPROTO"
)


class Unreadable:
    """Records the bytes that could not be read. `monitor` is told of each range at its end. Thread-safe."""

    def __init__(self, path: str, monitor: Monitor) -> None:
        #: Bytes so far.
        self.length = 0
        self._path = path
        self._monitor = monitor
        self._mutex = threading.Lock()
        self._last: tuple[str, int, int, str] | None = None  # what failed, from, to, why

    def add(self, what: str, offset: int, length: int, error: LaminaError) -> None:
        """`length` bytes at `offset` of the disk could not be read ("read"), or their status not queried ("status")."""
        with self._mutex:
            last = self._last
            if last is not None and last[0] == what and last[2] == offset and last[3] == error.message:
                self._last = (what, last[1], offset + length, error.message)
            else:
                self._tell()
                self._last = (what, offset, offset + length, error.message)
            self.length += length if what == "read" else 0

    def end(self) -> None:
        """Tell of the last range."""
        with self._mutex:
            self._tell()

    def _tell(self) -> None:
        if self._last is not None:
            what, begin, end, why = self._last
            self._last = None
            how = "could not be read, and become zeros" if what == "read" else "have an unknown status, and are read"
            self._monitor.warn(
                f"{printable(self._path)}: {end - begin} bytes at offset {begin} {how} ({printable(why)})"
            )


class Salvage(FilterNode):
    """Reads of `image` that fail return zeros in place of the bytes that cannot be read, and `unreadable` records them."""

    driver = "salvage"
    faithful = True

    def __init__(self, image: Child, unreadable: Unreadable, monitor: Monitor) -> None:
        super().__init__(image, read_only=True)
        self._unreadable = unreadable
        self._monitor = monitor
        self._unit = max(_SECTOR, image.node.limits.request_alignment)
        self._lost = {getattr(errno, name) for name in _LOST.split()}
        if is_far(image.node):
            self._lost.add(errno.ETIMEDOUT)
        #: The length of the next query of the status: short after one that failed.
        self._reach = MAX_SIZE

    def read_into(self, offset: int, view: memoryview) -> None:
        try:
            self.image.read_into(offset, view)
        except (BlockIOError, CorruptImage) as error:
            self.rescue(offset, view, error)

    def start_read(self, offset: int, view: memoryview) -> Pending:
        try:
            request = self.image.start_read(offset, view)
        except (BlockIOError, CorruptImage) as error:
            self.rescue(offset, view, error)
            return DONE
        return request if request is DONE else _Salvaging(self, request, offset, view)

    def rescue(self, offset: int, view: memoryview, error: LaminaError) -> None:
        """A read of these bytes failed with `error`: read what can be read of them."""
        if error.errno in self._lost or isinstance(error, NotSupported):
            raise error
        self._monitor.check()
        length = len(view)
        middle = align_down(offset + length // 2, self._unit)
        middle = middle if middle > offset else align_down(offset, self._unit) + self._unit
        if middle < offset + length:
            self.read_into(offset, view[: middle - offset])
            self.read_into(middle, view[middle - offset :])
        else:
            fill_zero(view)
            self._unreadable.add("read", offset, length, error)

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import Extents

        length = min(length, self._reach)
        while True:
            try:
                found = self.image.extents(offset, length)
            except (BlockIOError, CorruptImage) as error:
                if error.errno in self._lost:
                    raise
                self._monitor.check()
                shorter = align_down(offset + length // 2, _STATUS)
                if shorter <= offset:
                    shorter = align_down(offset, _STATUS) + _STATUS
                if shorter < offset + length:
                    length = shorter - offset
                    continue
                self._unreadable.add("status", offset, length, error)
                found = Extents.single(offset, length, data=True, present=True)
                self._reach = _STATUS
                return found
            self._reach = min(max(self._reach, length) * 2, MAX_SIZE) if self._reach < MAX_SIZE else MAX_SIZE
            return found

    def reads_zero(self, offset: int, length: int) -> bool:
        return False


class _Salvaging:
    """A started read of a `Salvage`."""

    __slots__ = ("_arguments", "_done", "_mutex", "_node", "_request")

    def __init__(self, node: Salvage, request: Pending, offset: int, view: memoryview) -> None:
        self._node, self._request, self._arguments = node, request, (offset, view)
        self._mutex = threading.Lock()
        self._done = False

    def wait(self) -> Any:
        with self._mutex:
            if self._done:
                return
            try:
                self._request.wait()
            except (BlockIOError, CorruptImage) as error:
                self._node.rescue(*self._arguments, error)
            self._done = True

    def leave(self) -> None:
        self._request.leave()


@contextmanager
def salvaging(source: Image, monitor: Monitor) -> Iterator[tuple[Image, Unreadable]]:
    """While the block runs: another image of the disk of `source`, which reads zeros where the disk cannot be read, and the
    record of these bytes. `monitor` is told of them, and ends the search for them when it is cancelled."""
    unreadable = Unreadable(source.filename, monitor)
    try:
        node = Salvage(Child(source.node, "image", read_only=True), unreadable, monitor)
        with opening(Image, node, budget=source.budget) as image:
            yield image, unreadable
    finally:
        unreadable.end()
