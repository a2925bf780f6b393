"""Copy bytes unchanged, fast: between files, devices, pipes and remote storage.

One thread has many requests in flight (`requests.in_two_steps`): reads, and the writes of what was read, both finished in the
order of the disk. So everything before the oldest unfinished request is copied: this is the position of the copy, which the
journal records after a flush, and from which an interrupted copy is resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BlockIOError, LaminaError, OptionError
from ..limits import KIB, is_power_of_two
from ..pending import DONE, Pending
from ..zeros import stored_parts
from .copy_ends import MOST_ZERO, Part, PipeSource, Source, Target, on_grid
from .output import OutputLimit
from .progress import Monitor
from .requests import NEAR, in_two_steps

if TYPE_CHECKING:
    from .copy_journal import Journal
    from .rate import RateLimit

#: The block size of the search for zeros, in bytes; larger if the target's blocks are.
_GRANULE = 4 * KIB
#: Seconds between two checkpoints.
_BETWEEN = 10.0
#: How often the job writes the same range again after a lost connection.
_ATTEMPTS = 3


class Copied(NamedTuple):
    """The result of a copy, in bytes: `size` of the source; `read` from it; `written` to the target; `zeroed` there without
    data; `skipped` because the target read as zero already; `resumed`: the offset at which this run began."""

    size: int
    read: int
    written: int
    zeroed: int
    skipped: int
    resumed: int


class Plan:
    """The parameters of a copy. `request`: the longest read, in bytes; `requests`: the number in flight. Their product
    is the memory that a copy takes. (Twice as many requests of half the length took a tenth more time.) `smallest_hole`:
    shorter runs of zeros are written as data; 0: all are. `flush`: the copy is on stable storage when `run` returns.
    `max_output`: the most bytes that are written, without zeros that are skipped or made without data. `rate`: the most bytes
    per second that are read, and the most that are written; 0: no limit."""

    __slots__ = ("flush", "max_output", "rate", "request", "requests", "smallest_hole")

    def __init__(
        self,
        request: int = 512 * KIB,
        requests: int = 32,
        smallest_hole: int = 4096,
        flush: bool = False,
        max_output: int | None = None,
        rate: int = 0,
    ) -> None:
        if not (is_power_of_two(request) and 4096 <= request <= 32 << 20):
            raise OptionError("the size of a request is a power of two from 4k to 32M")
        if not 1 <= requests <= 1024:
            raise OptionError("a copy has 1 to 1024 requests in flight")
        self.request = request
        self.requests = requests
        self.smallest_hole = smallest_hole
        self.flush = flush
        self.max_output = max_output
        self.rate = rate


class _Piece(NamedTuple):
    """A range of the source that one request reads, or (without a `buffer`) zeros that are not read."""

    offset: int
    length: int
    buffer: memoryview | None


class Copy:
    """One copy: the first bytes of `target` become those of `source`; its bytes beyond them stay. Both stay open.

    With a `journal`, the job flushes the target every ten seconds, and records the position; the copy begins at the position
    of the journal. It also flushes a target that `forgets`, and repeats writes that were lost with a connection. Raises
    OptionError if the target is too small, or the copy cannot have a journal.
    """

    def __init__(
        self,
        source: Source | PipeSource,
        target: Target,
        plan: Plan,
        *,
        journal: Journal | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        piped = isinstance(source, PipeSource)
        self._size = None if isinstance(source, PipeSource) else source.size
        if self._size is not None and target.size is not None and target.size < self._size:
            raise OptionError(
                f"the target has {target.size} bytes and the source {self._size}",
                path=target.name,
                hint="make a target that is large enough",
            )
        if journal is not None and (piped or target.ordered):
            raise OptionError("a copy through a pipe cannot be resumed", hint="leave the journal out")
        self._source = source
        self._target = target
        self._journal = journal
        self._watch = monitor or Monitor()
        self._rate: RateLimit | None = None
        if plan.rate:
            from .rate import RateLimit

            self._rate = RateLimit(plan.rate, self._watch)
        self._request = max(plan.request, target.block)
        self._limit = plan.requests
        self._granule = max(_GRANULE, target.block)
        # A pipe takes zeros only as data.
        self._hole = 0 if target.ordered else plan.smallest_hole
        self._output = OutputLimit(plan.max_output, source.name)
        self._output_durable = 0
        self._flushes = plan.flush or journal is not None or target.forgets
        self._checkpoints = journal is not None or (target.forgets and not piped)
        self._free: list[memoryview] = []
        self._begin = journal.position if journal is not None else 0
        self._position = self._durable = self._begin
        self._next = monotonic() + _BETWEEN
        #: The next checkpoint is due; and a flush began that has not succeeded.
        self._due = self._flushing = False
        self._read = self._written = self._zeroed = self._skipped = 0

    @property
    def position(self) -> int:
        """The offset up to which everything is copied: read, and written to the target."""
        return self._position

    def run(self) -> Copied:
        """Copy. Raises the errors of reading and writing, and Cancelled. Afterwards `position` tells how much is copied, and
        the journal, if there is one, how much of that is durable."""
        try:
            if self._size is not None:
                self._target.resize(self._size)
            if isinstance(self._source, PipeSource):
                self._copy_pipe(self._source)
                self._target.resize(self._position)
                self._end()
            else:
                self._copy_all(self._source)
        except BaseException:
            if self._journal is not None and not self._flushing:
                # The error is raised below. If this record fails too, the journal keeps its old position, which is also true.
                # (A failed flush is not repeated: the second one could succeed although data was lost.)
                with contextlib.suppress(LaminaError):
                    self._record()
            raise
        return Copied(self._position, self._read, self._written, self._zeroed, self._skipped, self._begin)

    def _copy_all(self, source: Source) -> None:
        attempts = 0
        while True:
            before = self._durable
            try:
                self._copy_from(source, before)
                return
            except BlockIOError:
                attempts = attempts + 1 if self._durable == before else 1
                if not (self._flushing and self._target.forgets) or attempts >= _ATTEMPTS:
                    raise
            self._flushing = False
            self._target.forget()
            self._output.added = self._output_durable
            self._position = self._durable

    def _copy_from(self, source: Source, begin: int) -> None:
        near = NEAR if self._hole else 0
        zeros = self._request if self._target.ordered else MOST_ZERO
        parts = on_grid(source.parts(begin), begin, self._target.block, self._request, near, zeros)

        def start_read(piece: _Piece) -> list[Pending]:
            offset, length, buffer = piece
            if buffer is None:
                return []
            if self._rate is not None:
                self._rate.before_read(length)
            return [source.start_read(offset, buffer[:length])]

        self._due = True
        while self._due:
            self._due = False
            self._copy_pieces(self._pieces(parts), start_read)
            if self._due:
                self._checkpoint()
        self._end()

    def _pieces(self, parts: Iterator[Part]) -> Iterator[_Piece]:
        """The next pieces, up to the end or the next checkpoint."""
        for offset, length, zero in parts:
            yield _Piece(offset, length, None if zero else self._buffer())
            if self._checkpoints and monotonic() >= self._next:
                self._due = True
                return

    def _copy_pipe(self, source: PipeSource) -> None:
        def pieces() -> Iterator[_Piece]:
            offset = 0
            while True:
                view = self._buffer()
                count = source.fill(view)
                if count:
                    if self._rate is not None:
                        self._rate.before_read(count)
                    yield _Piece(offset, count, view)
                offset += count
                if count < len(view):
                    return

        self._copy_pieces(pieces(), lambda piece: [])

    def _copy_pieces(self, pieces: Iterator[_Piece], start_read: Callable[[_Piece], list[Pending]]) -> None:
        """Copy these. No request is in flight on return."""
        with contextlib.closing(in_two_steps(pieces, start_read, self._start_write, self._limit)) as finished:
            for offset, length, buffer in finished:
                if buffer is not None:
                    self._free.append(buffer)
                self._position = offset + length
                # The length of what comes through a pipe is not known.
                self._watch.update(self._position, self._size or self._position + 1)

    def _end(self) -> None:
        if self._flushes:
            self._checkpoint()

    def _buffer(self) -> memoryview:
        return self._free.pop() if self._free else memoryview(bytearray(self._request))

    # -- writing

    def _start_write(self, piece: _Piece) -> list[Pending]:
        """Start the writes for a piece that was read."""
        offset, length, buffer = piece
        if buffer is None:
            requests = self._zero(offset, length)
        else:
            self._read += length
            requests = self._store(offset, buffer[:length])
        return [request for request in requests if request is not DONE]

    def _store(self, offset: int, view: memoryview) -> list[Pending]:
        """Write the parts that are not zero, and zero the others."""
        if not self._hole:
            return [self._start_data(offset, view)]
        waits: list[Pending] = []
        at = 0
        for lo, hi in stored_parts(view, offset, self._granule, self._hole):
            if at < lo:
                waits += self._zero(offset + at, lo - at)
            waits.append(self._start_data(offset + lo, view[lo:hi]))
            at = hi
        if at < len(view):
            waits += self._zero(offset + at, len(view) - at)
        return waits

    def _start_data(self, offset: int, view: memoryview) -> Pending:
        self._output.add(len(view))
        self._written += len(view)
        if self._rate is not None:
            self._rate.before_write(len(view))
        return self._target.start_write(offset, view)

    def _zero(self, offset: int, length: int) -> list[Pending]:
        if self._target.blank:
            self._skipped += length
            return []
        parts = self._target.to_zero(offset, length)
        changed = sum(length for _, length in parts)
        if self._target.ordered:  # they are written as data
            self._output.add(changed)
            if self._rate is not None:
                self._rate.before_write(changed)
        self._zeroed += changed
        self._skipped += length - changed
        return [self._target.start_zero(at, length) for at, length in parts]

    # -- checkpoints

    def _checkpoint(self) -> None:
        """Make all that is copied durable, and record it. No request is in flight."""
        self._record()
        self._next = monotonic() + _BETWEEN

    def _record(self) -> None:
        self._flushing = True
        self._target.flush()
        self._flushing = False
        self._durable, self._output_durable = self._position, self._output.added
        if self._journal is not None:
            self._journal.record(self._position)
