"""The transfer of a conversion: a thread reads what the plan says and searches it for zeros; the thread of the caller writes.

Reading, writing and comparing release the GIL, so the threads run in parallel. If the source or the target is remote, several
buffers are read or written at once (see `requests`). The number of buffers is fixed. Only `convert` uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from ..limits import align_down
from ..node import MAY_UNMAP
from ..workers import Task, Workers
from ..zeros import between, stored_parts
from .beneath import differing, stored
from .convert_plan import BUFFER, FILE_RANGES, IN_BACKING, OVER_ZERO, ZERO, Plan
from .output import OutputLimit
from .progress import Monitor
from .requests import Failed, Requests, in_order

if TYPE_CHECKING:
    from ..pending import Pending

#: Buffers in addition to those of requests in flight.
_SPARE = 2
#: The most ranges to zero of one batch.
_MANY = 4096


class Result(NamedTuple):
    """What a conversion did, in bytes: `read` from the source, `written` to the target, `zeroed` there without
    writing, and `copied` there without reading. `unreadable` ones could not be read (`salvage`)."""

    read: int
    written: int
    zeroed: int
    copied: int = 0
    unreadable: int = 0


class _Batch:
    """A buffer that the reading thread fills and the writing thread empties. `reads`: the ranges to read into it; `writes`
    and `zeros`: the requests to the target that follow from them. `end`: the job is done with the source up to this offset.
    `error`: the reason why no further batch follows."""

    __slots__ = ("buffer", "end", "error", "last", "reads", "writes", "zeros")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.reads: list[tuple[int, int, memoryview]] = []  # kind, offset, where to
        self.writes: list[tuple[int, memoryview]] = []
        self.zeros: list[tuple[int, int]] = []
        self.end = 0
        self.last = False
        self.error: BaseException | None = None


class Transfer:
    """One copy, by `plan`. `output` counts what is written; `watch` gets the progress."""

    def __init__(self, plan: Plan, output: OutputLimit, watch: Monitor) -> None:
        self._plan = plan
        self._size = plan.source.size
        self._output = output
        self._watch = watch
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        #: So many buffers are made when they are needed: of four, three would only cost the start of a small conversion.
        self._unmade = 0
        self._full: SimpleQueue[_Batch] = SimpleQueue()
        #: The job has come to its end, and whether it has written all.
        self._stopped = self._complete = False
        self._bytes_read = self._bytes_written = self._bytes_zeroed = 0

    def run(self, reading: Requests, writing: Requests) -> Result:
        self._unmade = reading.count + writing.count + _SPARE
        planning, planner = Task(self._read_all, reading), Workers(1, "lamina-convert")
        try:
            try:
                planner.start(planning)
                self._write_all(writing)
                self._complete = True
            finally:
                self._end(planning, planner, reading, writing)
        finally:
            # An interrupt that struck the first time finds the second.
            self._end(planning, planner, reading, writing)
        self._watch.update(self._size, self._size)
        copied = self._plan.offloader.done if self._plan.offloader else 0
        return Result(self._bytes_read, self._bytes_written, self._bytes_zeroed, copied)

    def _end(self, planning: Task[None], planner: Workers, reading: Requests, writing: Requests) -> None:
        """No other thread does anything when this returns. May be called again."""
        self._stopped = True
        if not self._complete:
            self._watch.cancel()  # what the reading thread waits for
        self._free.put(None)
        planning.cancel()
        planner.close()
        reading.close()
        writing.close()

    def _write_all(self, writing: Requests) -> None:
        def begin(batch: _Batch) -> list[Pending]:
            requests: list[Pending] = []
            for offset, view in batch.writes:
                requests.append(writing.start_write(offset, view))
                if isinstance(requests[-1], Failed):
                    return requests
            return requests + [writing.start_zero(offset, length, MAY_UNMAP) for offset, length in batch.zeros]

        with closing(in_order(self._sorted(), begin, writing.count)) as batches:
            for batch in batches:
                self._free.put(batch.buffer)
                self._written(batch)

    def _sorted(self) -> Iterator[_Batch]:
        """The batches that were read, as they come."""
        last = False
        while not last:
            batch = self._full.get()
            if batch.error is not None:
                raise batch.error
            last = batch.last
            self._output.add(sum(len(view) for _, view in batch.writes))
            yield batch

    def _written(self, batch: _Batch) -> None:
        self._bytes_read += sum(len(view) for kind, _, view in batch.reads if kind != IN_BACKING)
        self._bytes_written += sum(len(view) for _, view in batch.writes)
        self._bytes_zeroed += sum(length for _, length in batch.zeros)
        if not batch.last:
            self._watch.update(min(batch.end, self._size), self._size)

    # -- in the thread that reads

    def _read_all(self, reading: Requests) -> None:
        def begin(batch: _Batch) -> list[Pending]:
            return [reading.start_read(at, view) for kind, at, view in batch.reads if kind != IN_BACKING]

        try:
            with closing(in_order(self._batches(), begin, reading.count)) as batches:
                for batch in batches:
                    self._sort_all(batch)
                    self._full.put(batch)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits for this one
            failed = _Batch(memoryview(b""))
            failed.error = error
            self._full.put(failed)

    def _batches(self) -> Iterator[_Batch]:
        """What is to be read, a buffer at a time, in the order of the disk."""
        batch, used = self._next(), 0
        for kind, start, length in self._plan.ranges():
            if batch is None:
                return
            if kind == ZERO:
                batch.zeros.append((start, length))
                batch.end = start + length
                if len(batch.zeros) == _MANY:
                    yield batch
                    batch, used = self._next(), 0
                continue
            at = start
            if kind >= FILE_RANGES and self._plan.offloader is not None:
                for at in self._plan.offloader.copy(self._plan.file_ranges[kind - FILE_RANGES]):
                    self._output.set_offloaded(self._plan.offloader.done)
                    batch.end = at
                    yield batch  # so that its progress is told, and a wish to stop is heard
                    batch, used = self._next(), 0
                    if batch is None:
                        return
            while at < start + length:
                # Cut at multiples of the buffer, so that no cluster of the target is written in two halves.
                count = min(start + length, align_down(at, BUFFER) + BUFFER) - at
                if used + count > BUFFER:
                    yield batch
                    batch, used = self._next(), 0
                    if batch is None:
                        return
                batch.reads.append((kind, at, batch.buffer[used : used + count]))
                used += count
                at += count
                batch.end = at
        if batch is not None:
            batch.last = True
            yield batch

    def _next(self) -> _Batch | None:
        if self._unmade and self._free.empty():
            self._unmade -= 1
            self._free.put(memoryview(bytearray(BUFFER)))
        buffer = self._free.get()
        return None if buffer is None or self._stopped else _Batch(buffer)

    def _sort_all(self, batch: _Batch) -> None:
        """What was read becomes what is to be written."""
        base = self._plan.below.image if self._plan.below is not None else None
        for kind, at, view in batch.reads:
            if base is None or kind == OVER_ZERO:
                self._sort(batch, at, view, blank=self._plan.blank or kind == OVER_ZERO)
            elif kind == IN_BACKING:
                batch.zeros += [(at + lo, hi - lo) for lo, hi in stored(base, at, len(view), self._plan.block)]
            else:
                for lo, hi in differing(base, at, view, self._plan.block):
                    self._sort(batch, at + lo, view[lo:hi], blank=self._plan.blank)

    def _sort(self, batch: _Batch, at: int, view: memoryview, *, blank: bool) -> None:
        """What of these bytes is written, and what is zero."""
        runs = stored_parts(view, at, self._plan.granule, self._plan.hole)
        batch.writes += [(at + lo, view[lo:hi]) for lo, hi in runs]
        if not blank:
            batch.zeros += [(at + lo, hi - lo) for lo, hi in between(runs, len(view))]
