"""The filter `stats`: counts and times requests, with histograms of duration, size and alignment.

Each thread has its own counters, so counting needs no lock; `snapshot` adds them up. The classes of a histogram are powers of
two: the class 4096 contains the values from 4096 to 8191. Sizes are in bytes, durations in nanoseconds.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LaminaError
from ..node import FilterNode
from ..own_files import refuse_own
from ..pending import DONE, Pending
from ..request import Child
from ..schema import Option
from ..side_file import SideFile

if TYPE_CHECKING:
    from ..extents import Extents

KINDS = ("read", "write", "zero", "discard", "flush", "truncate", "extents")
READ, WRITE, ZERO, DISCARD, FLUSH, TRUNCATE, EXTENTS = range(len(KINDS))

# The counters of one kind of operation: four sums, then three histograms, indexed by the number of bits of the value.
_DONE, _FAILED, _BYTES, _TIME, _LATENCY, _SIZE, _ALIGNMENT, _WIDTH = 0, 1, 2, 3, 4, 70, 136, 202
_HISTOGRAMS = {"latency_ns": _LATENCY, "size": _SIZE, "alignment": _ALIGNMENT}

_FAILURE = "the report cannot be written"

Rows = list[list[int]]


class Stats(FilterNode):
    """Counts the requests to `image`. `report`: a file that is written when the node is closed (under the rules of
    `side_file`), as JSON if its name ends with `.json`, otherwise as a table. `clock` has `perf_counter_ns()`.

    The alignment of a request is the largest power of two that divides its offset and its length. A failed request counts
    only as failed. Raises BlockIOError if the report cannot be written, and OptionError if it is a file of the image, already
    when the node is opened.
    """

    driver = "stats"
    faithful = True
    options: ClassVar[tuple[Option, ...]] = (
        Option("report", "str", "the file of the report: JSON if it ends with .json, otherwise a table"),
    )

    def __init__(self, image: Child, report: str | None = None, *, clock: Any = time, **common: Any) -> None:
        super().__init__(image, **common)
        self._now = clock.perf_counter_ns
        self._begin: int = self._now()
        self._mine = threading.local()
        self._mutex = threading.Lock()
        self._ended = _blank()  # the counters of threads that have ended
        self._counting: list[tuple[weakref.ref[threading.Thread], Rows]] = []
        self._report = report
        #: An open FIFO or terminal. A regular file is opened again when it is written.
        self._opened: SideFile | None = None
        if report is not None:
            refuse_own(image.node, report, what="image")
            opened = SideFile(report, failure=_FAILURE)  # raises errors at the start rather than after the work
            if opened.regular:
                opened.close()
            else:
                self._opened = opened

    # -- operations. `AroundNode`, with one method for all of them, would add 0.3 us to a read of 1.8 us.

    def read_into(self, offset: int, view: memoryview) -> None:
        start = self._now()
        try:
            self.image.read_into(offset, view)
        except BaseException:
            self._rows()[READ][_FAILED] += 1
            raise
        self._count(READ, offset, len(view), start)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        start = self._now()
        try:
            self.image.write(offset, view, flags)
        except BaseException:
            self._rows()[WRITE][_FAILED] += 1
            raise
        self._count(WRITE, offset, len(view), start)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        start = self._now()
        try:
            self.image.zero(offset, length, flags)
        except BaseException:
            self._rows()[ZERO][_FAILED] += 1
            raise
        self._count(ZERO, offset, length, start)

    def discard(self, offset: int, length: int) -> None:
        start = self._now()
        try:
            self.image.discard(offset, length)
        except BaseException:
            self._rows()[DISCARD][_FAILED] += 1
            raise
        self._count(DISCARD, offset, length, start)

    def flush(self) -> None:
        start = self._now()
        try:
            self.image.flush()
        except BaseException:
            self._rows()[FLUSH][_FAILED] += 1
            raise
        self._count(FLUSH, 0, 0, start)

    def truncate(self, size: int) -> None:
        start = self._now()
        try:
            self.image.truncate(size)
        except BaseException:
            self._rows()[TRUNCATE][_FAILED] += 1
            raise
        self._count(TRUNCATE, 0, 0, start)

    def extents(self, offset: int, length: int) -> Extents:
        start = self._now()
        try:
            found = self.image.extents(offset, length)
        except BaseException:
            self._rows()[EXTENTS][_FAILED] += 1
            raise
        self._count(EXTENTS, offset, length, start)
        return found

    # A request that is started is counted when it is done, and timed from its start to then.

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self._start(READ, offset, len(view), self.image.start_read, offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return self._start(WRITE, offset, len(view), self.image.start_write, offset, view, flags)

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        return self._start(ZERO, offset, length, self.image.start_zero, offset, length, flags)

    def _start(self, kind: int, offset: int, length: int, start: Callable[..., Pending], *arguments: Any) -> Pending:
        begin = self._now()
        try:
            request = start(*arguments)
        except BaseException:
            self._rows()[kind][_FAILED] += 1
            raise
        if request is DONE:
            self._count(kind, offset, length, begin)
            return DONE
        return _Counted(self, request, kind, offset, length, begin)

    def settle(self) -> None:
        if self._report is not None:
            as_json = self._report.endswith(".json")
            if self._opened is None or self._opened.closed:
                self._opened = SideFile(self._report, failure=_FAILURE)
            with self._opened as file:
                file.write(json.dumps(self.snapshot(), indent=2) + "\n" if as_json else self.table())
            self._report = None

    def forsake(self) -> None:
        super().forsake()
        if self._opened is not None:
            self._opened.close()

    # -- results

    def snapshot(self) -> dict[str, Any]:
        """The counters as a dict for JSON: `seconds` since the node was opened, and `operations`, which contains for each
        kind of operation that occurred `done`, `failed`, `bytes`, `total_ns`, and the histograms `latency_ns`, `size` and
        `alignment` (the lower bound of a class, as text, to its count). A request that ends during the call may be included
        in some of these values only."""
        total = _blank()
        with self._mutex:
            for rows in (self._ended, *(rows for _, rows in self._counting)):
                _add(total, rows)
        operations = {}
        for kind, row in zip(KINDS, total, strict=True):
            if row[_DONE] or row[_FAILED]:
                operations[kind] = {
                    "done": row[_DONE],
                    "failed": row[_FAILED],
                    "bytes": row[_BYTES],
                    "total_ns": row[_TIME],
                    **{name: _classes(row, first) for name, first in _HISTOGRAMS.items()},
                }
        return {"seconds": (self._now() - self._begin) / 1e9, "operations": operations}

    def table(self) -> str:
        """The counters as a table: a line for each operation, then its histograms. The columns `half < us` and `99% < us` are
        the powers of two below which 50 % and 99 % of the durations are."""
        snapshot = self.snapshot()
        head = (
            f"{'operation':<10}{'done':>12}{'failed':>8}{'bytes':>16}{'mean us':>12}{'half < us':>12}{'99% < us':>12}"
        )
        lines = [f"{snapshot['seconds']:.3f} seconds", "", head]
        for kind, row in snapshot["operations"].items():
            mean = row["total_ns"] / max(row["done"], 1) / 1000
            half, most = (_below(row["latency_ns"], share) / 1000 for share in (0.5, 0.99))
            lines.append(
                f"{kind:<10}{row['done']:>12}{row['failed']:>8}{row['bytes']:>16}{mean:>12.1f}{half:>12.1f}{most:>12.1f}"
            )
        for kind, row in snapshot["operations"].items():
            for name in _HISTOGRAMS:
                if row[name]:
                    lines += ["", f"{kind}, {name} from"]
                    lines += [f"{lower:>20}{count:>12}" for lower, count in row[name].items()]
        return "\n".join(lines) + "\n"

    # -- counting

    def _count(self, kind: int, offset: int, length: int, start: int) -> None:
        took = self._now() - start
        row = self._rows()[kind]
        row[_DONE] += 1
        row[_TIME] += took
        row[_LATENCY + took.bit_length()] += 1
        if length:
            edges = offset | length
            row[_BYTES] += length
            row[_SIZE + length.bit_length()] += 1
            row[_ALIGNMENT + (edges & -edges).bit_length()] += 1

    def _rows(self) -> Rows:
        """The counters of this thread, which no other thread changes."""
        try:
            mine: Rows = self._mine.rows
        except AttributeError:
            mine = self._mine.rows = _blank()
            with self._mutex:
                # The counters of ended threads are added up, since a server may create a thread for each client.
                alive = []
                for reference, rows in self._counting:
                    if (thread := reference()) is not None and thread.is_alive():
                        alive.append((reference, rows))
                    else:
                        _add(self._ended, rows)
                self._counting = [*alive, (weakref.ref(threading.current_thread()), mine)]
        return mine


def _blank() -> Rows:
    return [[0] * _WIDTH for _ in KINDS]


def _add(total: Rows, rows: Rows) -> None:
    for sums, row in zip(total, rows, strict=True):
        for at, value in enumerate(row):
            if value:
                sums[at] += value


def _classes(row: list[int], first: int) -> dict[str, int]:
    """The histogram whose first counter is `first`: the lower bound and the count of each class that is not empty."""
    return {str(1 << bits >> 1): row[first + bits] for bits in range(66) if row[first + bits]}


def _below(classes: dict[str, int], share: float) -> int:
    """The upper bound of the first class up to which at least `share` of all values are; 0 without values."""
    wanted = share * sum(classes.values())
    upper = 0
    for lower, count in classes.items():
        if wanted <= 0:
            break
        wanted -= count
        upper = max(2 * int(lower), 1)
    return upper


class _Counted:
    """A started request, which is counted by the first thread that waits for it."""

    __slots__ = ("_begin", "_filter", "_kind", "_length", "_offset", "_request", "_uncounted")

    def __init__(self, by: Stats, request: Pending, kind: int, offset: int, length: int, begin: int) -> None:
        self._filter, self._request = by, request
        self._kind, self._offset, self._length, self._begin = kind, offset, length, begin
        self._uncounted = [True]

    def wait(self) -> Any:
        try:
            result = self._request.wait()
        except LaminaError:
            if self._take():
                self._filter._rows()[self._kind][_FAILED] += 1
            raise
        if self._take():
            self._filter._count(self._kind, self._offset, self._length, self._begin)
        return result

    def leave(self) -> None:
        self._request.leave()

    def _take(self) -> bool:
        try:
            return self._uncounted.pop()
        except IndexError:
            return False
