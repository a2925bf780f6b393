"""Readahead of BLOCK_STATUS: the extents that a client asks about next are known when it does.

A client that walks over a disk asks for one extent, and then for the one that follows it. The thread of the connection
reads ahead after it has sent a reply, while the client works on that. Only of an export that no request can change
(`Node.immutable`); an edit of the graph, a reopening or a truncation in the meantime makes what was read ahead void, and a
hole of a file is verified there before it is told. So a reply from here is what the image would answer at that moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ...errors import LaminaError
from ...limits import MIB, align_up
from ...node import StorageNode
from ...status import ZERO, HostFile, Status
from .. import wire

if TYPE_CHECKING:
    from ...extents import Extents
    from .contexts import Context
    from .export import Export
    from .transmission import Request

#: A hole that is verified before it is told: file, offset, length.
Hole = tuple[HostFile, int, int]

#: Rows of the image that are read ahead first, and then at once while the client goes on: from columns, which cost less for
#: each row (0.5 us in place of 5), and more to begin with.
_FIRST: Final = 16
_MOST: Final = 512
#: Rows that are read ahead one by one before columns are used: a client that walks less far does not wait for the import of
#: numpy (0.1 s).
_WITHOUT_COLUMNS = 4096
#: The most bytes to look at for these: however small their extents are, the client's next request does not wait long.
_LONGEST: Final = 16 * MIB


class StatusReadahead:
    """What follows the extent that a client was told of last, in its only context. For the thread of its connection."""

    def __init__(self, export: Export, context: Context) -> None:
        self._export = export
        self._context = context
        self._mask = export.minimum - 1
        #: Whether the client asked for several extents, each where the one before it ended, and where the last one ended.
        self.walks, self._next = False, -1
        #: (begin, end, status, and the holes to verify) of extents from `_next` on.
        self.known: deque[tuple[int, int, int, list[Hole]]] = deque()
        self._still: Callable[[], bool] = lambda: False
        #: Bytes to look at next; None: the next rows are read one by one.
        self._window: int | None = None
        #: Rows that were read ahead.
        self._rows = 0

    def told(self, offset: int, end: int) -> None:
        """The client asked for the extent at `offset`, and was told of one up to `end`, which was not read ahead."""
        self.walks = offset == self._next
        self._next = end
        if self.known:
            self.known.clear()
        self._window = None

    def reply(self, request: Request) -> tuple[int, int] | None:
        """(length, status) of the first extent that `request` asks for; None where that was not read ahead."""
        known = self.known
        kind, flags, _, offset, length, payload = request
        if not known or kind != wire.CMD_BLOCK_STATUS or flags != wire.CMD_FLAG_REQ_ONE or payload is not None:
            return None
        while known and known[0][1] <= offset:
            known.popleft()  # the client knows it from before
        if not known or known[0][0] > offset:
            return None
        _, end, status, holes = known[0]
        size = end - offset
        if size > length or offset & self._mask or not self._still():
            return None
        if holes and not all(map(_is_hole, holes)):
            return None
        known.popleft()
        self._next = end
        return size, status

    def fetch(self) -> None:
        """Read ahead, where the client `walks` and nothing is `known`. An error is raised when the client asks."""
        still = self._export.unchanged() if self._next < self._export.size else None
        if still is not None:
            self._still = still
            try:
                self._fetch()
            except LaminaError:
                self.known.clear()
        self.walks = bool(self.known)

    def _fetch(self) -> None:
        export, begin = self._export, self._next
        if self._window is None:
            rows = export.first_rows(begin, export.size - begin, _FIRST)
            self._learn(rows)
            count = len(rows)
        else:
            found = export.root.extents(begin, min(self._window, export.size - begin))
            self._learn_columns(found)
            count = len(found)
        # As many bytes as hold _MOST rows, if what follows is like this; where many bytes hold few rows: one by one.
        span = self.known[-1][1] - begin if self.known else 0
        window = align_up(span * _MOST // count, self._mask + 1)
        self._rows += count
        columns = self._rows >= _WITHOUT_COLUMNS and 0 < window <= _FIRST * _LONGEST
        self._window = min(window, _LONGEST) if columns else None

    def _learn(self, rows: list[Status]) -> None:
        """Keep the extents that `rows` tell of in full: those that another status follows, or the end of the disk."""
        status, known = self._context.status, self.known
        at = begin = self._next
        last = -1
        holes: list[Hole] = []
        for flags, length, depth, file, offset in rows:
            number = status(flags, depth)
            if number != last:
                if at & self._mask:
                    break
                if last >= 0:
                    known.append((begin, at, last, holes))
                begin, last, holes = at, number, []
            if flags & ZERO and file is not None:
                holes.append((file, offset, length))
            at += length
        else:
            if at == self._export.size:
                known.append((begin, at, last, holes))

    def _learn_columns(self, found: Extents) -> None:
        """The same of columns."""
        from ...numeric import np

        numbers = self._context.answers(found)
        first = np.concatenate(([0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1))  # the first row of each extent
        edges = np.append(found.start[first], found.end)
        count = len(first) if found.end == self._export.size else len(first) - 1
        if self._mask and (unaligned := np.flatnonzero(edges[: count + 1] & self._mask)).size:
            count = max(int(unaligned[0]) - 1, 0)
        holes: list[list[Hole]] = [[] for _ in range(count)]
        rows = np.flatnonzero(((found.flags & ZERO) != 0) & (found.file >= 0))
        which = np.searchsorted(first, rows, "right") - 1
        columns = (which, found.file[rows], found.offset[rows], found.length[rows])
        for extent, file, offset, length in zip(*(column.tolist() for column in columns), strict=True):
            if extent < count:
                holes[extent].append((found.files[file], offset, length))
        begins, ends = edges[:count].tolist(), edges[1 : count + 1].tolist()
        self.known.extend(zip(begins, ends, numbers[first[:count]].tolist(), holes, strict=True))


def _is_hole(hole: Hole) -> bool:
    """Whether the file has a hole there, or ends."""
    file, offset, length = hole
    return isinstance(file, StorageNode) and file.reads_zero(offset, length)
