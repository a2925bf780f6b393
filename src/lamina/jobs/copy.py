"""Copy bytes unchanged, fast: between files, devices, pipes and remote storage.

One thread has many requests in flight: started reads are in one queue, the writes of their data in a second, both in the
order of the disk. So everything before the oldest unfinished request is copied: this is the position of the copy, which the
journal records after a flush, and from which an interrupted copy is resumed.
"""

from __future__ import annotations

import contextlib
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BlockIOError, LaminaError, OptionError
from ..limits import KIB, is_power_of_two
from ..pending import DONE, Pending
from ..zeros import stored_parts
from .copy_ends import PipeSource, Source, Target, on_grid
from .output import OutputLimit
from .progress import Monitor
from .requests import NEAR

if TYPE_CHECKING:
    from .copy_journal import Journal

#: The block size of the search for zeros, in bytes; larger if the target's blocks are.
_GRANULE = 4 * KIB
#: Seconds between two checkpoints.
_BETWEEN = 10.0
#: How often the job writes the same range again after a lost connection.
_ATTEMPTS = 3


class Copied(NamedTuple):
    """What a copy did, in bytes: `size` of the source; `read` from it; `written` to the target; `zeroed` there without
    writing; `skipped` because the target read as zero already; `resumed`: where this run began."""

    size: int
    read: int
    written: int
    zeroed: int
    skipped: int
    resumed: int


class Plan:
    """How to copy. `request`: the longest read, in bytes; `requests`: so many are on their way at once, so that their
    product is the memory this takes (twice as many of half that length cost a tenth more time); `smallest_hole`: shorter
    runs of zeros that were read are written, 0: all are; `flush`: the copy is on stable storage when it is done;
    `max_output`: the most bytes that are written, not counting zeros that are left out or made without being written."""

    __slots__ = ("flush", "max_output", "request", "requests", "smallest_hole")

    def __init__(
        self,
        request: int = 512 * KIB,
        requests: int = 32,
        smallest_hole: int = 4096,
        flush: bool = False,
        max_output: int | None = None,
    ) -> None:
        if not (is_power_of_two(request) and 4096 <= request <= 32 << 20):
            raise OptionError("the size of a request is a power of two from 4k to 32M")
        if not 1 <= requests <= 1024:
            raise OptionError("there are 1 to 1024 requests on their way")
        self.request = request
        self.requests = requests
        self.smallest_hole = smallest_hole
        self.flush = flush
        self.max_output = max_output


class _Reading(NamedTuple):
    """A read on its way, or (without a `buffer`) zeros that need not be read."""

    offset: int
    length: int
    buffer: memoryview | None
    wait: Pending


class _Writing(NamedTuple):
    """What is to be done before everything up to `end` is copied; then `buffer` is free."""

    end: int
    buffer: memoryview | None
    waits: list[Pending]


class Copy:
    """One copy: the first bytes of `target` become those of `source`; what the target has beyond them stays. Both stay open.

    With a `journal`, the target is flushed every ten seconds, and how far it is recorded; the copy begins where the journal
    says. A target that `forgets` is flushed as well: what a lost connection may have taken along is written again.
    Raises OptionError if the target is too small, or the copy cannot have a journal.
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
            raise OptionError("a copy through a pipe cannot be taken up again", hint="leave the journal out")
        self._source = source
        self._target = target
        self._journal = journal
        self._watch = monitor or Monitor()
        self._request = max(plan.request, target.block)
        self._limit = plan.requests
        self._granule = max(_GRANULE, target.block)
        # Zeros go through a pipe as any other bytes.
        self._hole = 0 if target.ordered else plan.smallest_hole
        self._output = OutputLimit(plan.max_output, source.name)
        self._output_durable = 0
        self._flushes = plan.flush or journal is not None or target.forgets
        self._checkpoints = journal is not None or (target.forgets and not piped)
        self._free: list[memoryview] = []
        self._reads: deque[_Reading] = deque()
        self._writes: deque[_Writing] = deque()
        self._begin = journal.position if journal is not None else 0
        self._position = self._durable = self._begin
        self._next = monotonic() + _BETWEEN
        #: A flush was asked for, and did not succeed.
        self._flushing = False
        self._read = self._written = self._zeroed = self._skipped = 0

    @property
    def position(self) -> int:
        """Everything before this offset is copied: it was read, and the target answered that it has it."""
        return self._position

    def run(self) -> Copied:
        """Copy. Raises what reading and writing raise, and Cancelled; `position` then says how far it came, and the journal,
        if there is one, how much of that is durable."""
        try:
            if self._size is not None:
                self._target.resize(self._size)
            if isinstance(self._source, PipeSource):
                self._copy_pipe(self._source)
                self._target.resize(self._position)
                self._end()
            else:
                self._copy_all(self._source)
        except BaseException as error:
            if isinstance(error, LaminaError):
                self._settle_rest()
            if self._journal is not None and not self._flushing:
                # The error is what matters. If this fails too, the journal holds what it held before, which is true as well.
                # (After a flush that failed there is no second try: it could succeed, and cover nothing.)
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
        for offset, length, zero in on_grid(
            source.parts(begin), begin, self._target.block, self._request, NEAR if self._hole else 0
        ):
            self._make_room()
            if zero:
                self._reads.append(_Reading(offset, length, None, DONE))
            else:
                view = self._buffer()
                self._reads.append(_Reading(offset, length, view, source.start_read(offset, view[:length])))
            # What is there already (a file answers at once) goes on at once.
            while self._reads and self._reads[0].wait is DONE:
                self._advance()
            if self._checkpoints and monotonic() >= self._next:
                self._drain()
                self._checkpoint()
        self._end()

    def _copy_pipe(self, source: PipeSource) -> None:
        offset = 0
        while True:
            self._make_room()
            view = self._buffer()
            count = source.fill(view)
            if count:
                self._reads.append(_Reading(offset, count, view, DONE))
                self._advance()
            offset += count
            if count < len(view):
                self._drain()
                return

    def _end(self) -> None:
        self._drain()
        if self._flushes:
            self._checkpoint()

    # -- the two queues

    def _buffer(self) -> memoryview:
        return self._free.pop() if self._free else memoryview(bytearray(self._request))

    def _make_room(self) -> None:
        """Until one more request may be started. Reads and writes get half of the requests each, where both take time."""
        while len(self._reads) + len(self._writes) >= self._limit:
            if self._writes and len(self._reads) <= self._limit // 2:
                self._settle()
            else:
                self._advance()

    def _drain(self) -> None:
        while self._reads:
            self._advance()
        while self._writes:
            self._settle()

    def _advance(self) -> None:
        """The oldest read becomes writes."""
        offset, length, buffer, wait = self._reads[0]
        wait.wait()
        self._reads.popleft()
        if buffer is None:
            waits = self._zero(offset, length)
        else:
            self._read += length
            waits = self._store(offset, buffer[:length])
        self._writes.append(_Writing(offset + length, buffer, [wait for wait in waits if wait is not DONE]))
        while self._writes and not self._writes[0].waits:
            self._settle()

    def _store(self, offset: int, view: memoryview) -> list[Pending]:
        """Write what holds something of these bytes, and make the rest zero."""
        if not self._hole:
            self._output.add(len(view))
            self._written += len(view)
            return [self._target.start_write(offset, view)]
        waits: list[Pending] = []
        at = 0
        for lo, hi in stored_parts(view, offset, self._granule, self._hole):
            if at < lo:
                waits += self._zero(offset + at, lo - at)
            self._output.add(hi - lo)
            self._written += hi - lo
            waits.append(self._target.start_write(offset + lo, view[lo:hi]))
            at = hi
        if at < len(view):
            waits += self._zero(offset + at, len(view) - at)
        return waits

    def _zero(self, offset: int, length: int) -> list[Pending]:
        if self._target.blank:
            self._skipped += length
            return []
        parts = self._target.to_zero(offset, length)
        changed = sum(length for _, length in parts)
        if self._target.ordered:
            self._output.add(changed)
        self._zeroed += changed
        self._skipped += length - changed
        return [self._target.start_zero(at, length) for at, length in parts]

    def _settle(self) -> None:
        """The oldest write is waited for."""
        end, buffer, waits = self._writes[0]
        for wait in waits:
            wait.wait()
        self._writes.popleft()
        if buffer is not None:
            self._free.append(buffer)
        self._position = end
        # Of a pipe nobody knows how much is to come.
        self._watch.update(end, self._size or end + 1)

    def _settle_rest(self) -> None:
        """After an error, which is raised later: wait for what was on its way, up to the first write that failed, so that
        `position` says all that is copied."""
        with contextlib.suppress(LaminaError):
            while self._writes:
                self._settle()

    # -- what is durable

    def _checkpoint(self) -> None:
        """Nothing is on its way: all that is copied becomes durable, and is recorded."""
        self._record()
        self._next = monotonic() + _BETWEEN

    def _record(self) -> None:
        self._flushing = True
        self._target.flush()
        self._flushing = False
        self._durable, self._output_durable = self._position, self._output.added
        if self._journal is not None:
            self._journal.record(self._position)
