"""Copy a disk into another image: the job reads only allocated data, and writes only data that is not zero.

The plan comes from the exact extents of the source. A thread of the job's own reads and searches for zeros; the caller's
thread writes: reading, writing and comparing release the GIL, so the threads run in parallel. If the source or the target is
remote, several buffers are read or written at once (see `requests`). The number of buffers is fixed. Ranges that the
operating system copies, or that both files share, pass through neither thread (see `sharing`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..api import open as open_image
from ..creation import create_driver, made_beside, new_file, open_new, write_image
from ..errors import OptionError
from ..extents import Extents
from ..format_node import FormatNode
from ..limits import KIB, MAX_SIZE, MIB, align_down, is_power_of_two
from ..node import MAY_UNMAP
from ..numeric import np
from ..options import path_in
from ..own_files import refuse_own, refuse_shared
from ..policy import Policy
from ..workers import Task, Workers
from ..zeros import between, stored_parts
from .beneath import Backing, differing, layers_above, stored
from .bitmaps import Chosen, copied, require_bitmaps
from .output import OutputLimit
from .progress import Monitor
from .requests import NEAR, Failed, Requests, in_order, is_far, requests_for
from .sharing import FileRange, Offloader, without
from .windows import pairs, stretches, windows

if TYPE_CHECKING:
    from ..atomic_file import AtomicFile
    from ..image import Image
    from ..limits import Budget
    from ..numeric import NDArray
    from ..pending import Pending

_BUFFER = 2 * MIB
#: Buffers in addition to those of requests in flight.
_SPARE = 2
#: The most ranges to zero of one batch.
_MANY = 4096
#: The block size of the search for zeros, in bytes; smaller if shorter runs are to become holes.
_GRANULE = 4 * KIB

#: Which copies are left to the operating system: none, those that share blocks, or all that it can do.
Offload = Literal["", "share", "copy"]

# What to do with a range of the disk. _ZERO: zero the target. _STORED: read the source. _OVER_ZERO: the same, and the target
# reads as zero already. _COMPARED: read the source and the backing file. _IN_BACKING: read the backing file, and zero the
# target where it is not zero. From _FILE_RANGES on: offload the copy of one file range.
_STORED, _ZERO, _OVER_ZERO, _COMPARED, _IN_BACKING, _FILE_RANGES = range(6)


class Result(NamedTuple):
    """What a conversion did, in bytes: `read` from the source, `written` to the target, `zeroed` there without
    writing, and `copied` there without reading."""

    read: int
    written: int
    zeroed: int
    copied: int = 0


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


def convert(
    source: Image,
    target: Image,
    *,
    blank: bool = False,
    smallest_hole: int = 4096,
    below: Backing | None = None,
    offload: Offload = "",
    parallel: int | None = None,
    in_order: bool | None = None,
    bitmaps: Chosen = "",
    max_output: int | None = None,
    monitor: Monitor | None = None,
) -> Result:
    """Make the first `source.size` bytes of `target` read as `source` does.

    `blank`: the target reads as zero, so the job skips zeros of the source. Runs of zeros of at least `smallest_hole` bytes
    are not written as data; with 0 there is no search for zeros, and the whole target is allocated. `below`: the backing
    file of the target, which owns no clusters yet; the job writes only what differs from it.

    `offload`: the operating system copies ranges of the source's file, without a search for zeros: "share": only by sharing
    blocks of the file system; "copy": also by copying. The source must be open read-only. On btrfs and xfs, sharing 1 GiB
    takes 0.01 s instead of 1.1 and 0.16; on ext4, which shares nothing, the copy of the operating system takes 0.30 s instead
    of 0.16: hence the default is neither.

    `parallel`: the number of buffers of 2 MiB to read at once, 1 to 16; None: one, or 8 if the source is remote. The job
    writes them one after the other, or with `in_order` False in any order and as many at once; None: in order unless the
    target is remote. With 20 ms for each request, 512 MiB take 0.9 s with 8, and 3.1 with one.

    `bitmaps`: the target gets the dirty bitmaps of the source, with what they have recorded: "all" (OptionError for one that
    is inconsistent), or "usable" ones.

    `max_output`: the most bytes of data that the job writes or copies, before compression; None: the limit of the source's
    budget. Zeros that are skipped, or that the target makes without a write, do not count.

    Both images may be used, edited and closed meanwhile: the job has roots of its own.

    Raises LimitExceeded if there are more; OptionError if the target is too small, or shares a file with the source; the
    errors of reading and writing; and Cancelled. The content of the target is then undefined.
    """
    refuse_shared(source.node, target.node)
    if target.size < source.size:
        raise OptionError(
            f"the target has {target.size} bytes and the source {source.size}",
            path=target.filename,
            hint="make a target that is large enough",
        )
    with source.share() as own_source, target.share() as own_target, copied(source, target, bitmaps):
        # What is compared must be read.
        reads = not offload or (below is not None and below.image is not None)
        offloader = None if reads else Offloader(own_source, own_target, only_share=offload == "share")
        reading = requests_for(own_source, asked=parallel, name="lamina-convert-read")
        if in_order is None:
            in_order = not is_far(own_target.node)
        writing = Requests(own_target, 1, "")
        if not in_order:
            writing = requests_for(own_target, own_source.node, asked=parallel, name="lamina-convert-write")
        output = OutputLimit(source.budget.max_output if max_output is None else max_output, source.filename)
        job = _Copy(own_source, own_target, blank, smallest_hole, below, offloader, output, monitor or Monitor())
        return job.run(reading, writing)


def convert_to_file(
    source: Image,
    path: str | os.PathLike[str],
    format: str,
    options: Mapping[str, Any],
    *,
    smallest_hole: int = 4096,
    backing: str | None = None,
    backing_format: str | None = None,
    references: Policy | None = None,
    offload: Offload = "",
    compress: bool = False,
    parallel: int | None = None,
    in_order: bool | None = None,
    bitmaps: Chosen = "",
    durable: bool = False,
    max_output: int | None = None,
    monitor: Monitor | None = None,
) -> Result:
    """Make a new image at `path` that reads as `source` does. It appears under its name when it is whole; if anything
    goes wrong, nothing is left of it. `options` are those of `create`; a `size` among them may make the disk longer.
    `durable`: it is on stable storage when this returns; where a file is replaced it is in any case (see `AtomicFile`).

    With `backing`, the new image is an overlay over that file, and owns only what differs from it. Where the source is
    itself built on that file, that is what the layers above it own; else both are read and compared. `compress`: all is
    stored packed, as far as that is smaller; UnsupportedFeature where the format cannot. The backing file and the new image
    are opened within the budget of `source` each.
    """
    path = path_in(path)
    refuse_own(source.node, path)
    kind = create_driver(format)
    require_bitmaps(source, kind, bitmaps)
    given = {"size": source.size, **options}
    if backing is not None:
        if backing_format is None:
            raise OptionError("the format of the backing file is not given", path=backing, hint="give it (-F)")
        given |= {"backing_file": backing, "backing_fmt": backing_format}
    values = kind.creation_schema().parse(given)
    kind.prepare_create(values, path, source.budget)
    how: Any = {"smallest_hole": smallest_hole, "offload": offload, "parallel": parallel, "in_order": in_order}
    how |= {"bitmaps": bitmaps, "max_output": max_output}
    below: Backing | None = None
    given = kind.options_to_open(values)
    with ExitStack() as stack:
        if backing is not None:
            # Names inside the target are relative to its directory; what the user named is opened as such.
            name = os.path.join(os.path.dirname(os.path.realpath(path)), values["backing_file"])
            given["backing"] = {"driver": backing_format, "file": {"driver": "file", "filename": name}}
            image = stack.enter_context(open_image(given["backing"], references=references, budget=source.budget))
            refuse_own(image.node, path, what="backing file")
            depth = layers_above(source.node, image.node)
            below = Backing(image) if depth is None else Backing(depth=depth)
        stack.enter_context(made_beside(kind, values, path))
        file = stack.enter_context(new_file(path, durable=durable))
        write_image(kind, file, values)
        with _open_made(file, format, given, references, source.budget, compress) as target:
            # A device keeps what was on it; a format above it knows what it has written and what it has not.
            blank = backing is None and (not file.is_device or isinstance(target.node, FormatNode))
            result = convert(source, target, blank=blank, below=below, monitor=monitor, **how)
            if kind.side_files(values):  # at the end `file` flushes itself alone, and may replace an image
                target.flush()
            return result


def _open_made(
    file: AtomicFile, format: str, options: Mapping[str, Any], references: Policy | None, budget: Budget, compress: bool
) -> Image:
    """The image that is being made in `file`, for writing."""
    storage = open_new(file)
    made: dict[str, Any] = {"driver": format, "file": storage, **options}
    if compress:
        made = {"driver": "compress", "image": made}
    try:
        return open_image(made, read_only=False, references=references, budget=budget)
    except BaseException:
        storage.close()
        raise


class _Copy:
    def __init__(
        self,
        source: Image,
        target: Image,
        blank: bool,
        smallest_hole: int,
        below: Backing | None,
        offloader: Offloader | None,
        output: OutputLimit,
        watch: Monitor,
    ) -> None:
        self._source = source
        self._target = target
        self._blank = blank
        self._hole = smallest_hole
        self._granule = min(_GRANULE, 1 << max(smallest_hole.bit_length() - 1, 3)) if smallest_hole else 0
        # Of a target that takes whole blocks (one that packs them, say) none is written in two halves.
        self._block = min(target.alignment, _BUFFER) if offloader is None else 1
        if below is not None and below.image is not None:
            # What differs is found, and written, in whole clusters of the target.
            self._block = max(self._block, _unit(target))
        if smallest_hole and self._block > 1:
            self._hole, self._granule = max(smallest_hole, self._block), max(self._granule, self._block)
        self._below = below
        self._offloader = offloader
        self._file_ranges: list[FileRange] = []
        self._output = output
        self._watch = watch
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        #: So many buffers are made when they are needed: of four, three would only cost the start of a small conversion.
        self._unmade = 0
        self._full: SimpleQueue[_Batch] = SimpleQueue()
        self._stopped = False
        self._bytes_read = self._bytes_written = self._bytes_zeroed = 0

    def run(self, reading: Requests, writing: Requests) -> Result:
        self._unmade = reading.count + writing.count + _SPARE
        planning, planner = Task(self._read_all, reading), Workers(1, "lamina-convert")
        try:
            try:
                planner.start(planning)
                self._write_all(writing)
            finally:
                self._end(planning, planner, reading, writing)
        finally:
            # An interrupt that struck the first time finds the second.
            self._end(planning, planner, reading, writing)
        self._watch.update(self._source.size, self._source.size)
        copied = self._offloader.done if self._offloader else 0
        return Result(self._bytes_read, self._bytes_written, self._bytes_zeroed, copied)

    def _end(self, planning: Task[None], planner: Workers, reading: Requests, writing: Requests) -> None:
        """No other thread does anything when this returns. May be called again."""
        self._stopped = True
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
        self._bytes_read += sum(len(view) for kind, _, view in batch.reads if kind != _IN_BACKING)
        self._bytes_written += sum(len(view) for _, view in batch.writes)
        self._bytes_zeroed += sum(length for _, length in batch.zeros)
        if not batch.last:
            self._watch.update(min(batch.end, self._source.size), self._source.size)

    # -- in the thread that reads

    def _read_all(self, reading: Requests) -> None:
        def begin(batch: _Batch) -> list[Pending]:
            return [reading.start_read(at, view) for kind, at, view in batch.reads if kind != _IN_BACKING]

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
        for kind, start, length in self._plan():
            if batch is None:
                return
            if kind == _ZERO:
                batch.zeros.append((start, length))
                batch.end = start + length
                if len(batch.zeros) == _MANY:
                    yield batch
                    batch, used = self._next(), 0
                continue
            at = start
            if kind >= _FILE_RANGES and self._offloader is not None:
                for at in self._offloader.copy(self._file_ranges[kind - _FILE_RANGES]):
                    self._output.set_offloaded(self._offloader.done)
                    batch.end = at
                    yield batch  # so that its progress is told, and a wish to stop is heard
                    batch, used = self._next(), 0
                    if batch is None:
                        return
            while at < start + length:
                # Cut at multiples of the buffer, so that no cluster of the target is written in two halves.
                count = min(start + length, align_down(at, _BUFFER) + _BUFFER) - at
                if used + count > _BUFFER:
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
            self._free.put(memoryview(bytearray(_BUFFER)))
        buffer = self._free.get()
        return None if buffer is None or self._stopped else _Batch(buffer)

    def _sort_all(self, batch: _Batch) -> None:
        """What was read becomes what is to be written."""
        base = self._below.image if self._below is not None else None
        for kind, at, view in batch.reads:
            if base is None or kind == _OVER_ZERO:
                self._sort(batch, at, view, blank=self._blank or kind == _OVER_ZERO)
            elif kind == _IN_BACKING:
                batch.zeros += [(at + lo, hi - lo) for lo, hi in stored(base, at, len(view), self._block)]
            else:
                for lo, hi in differing(base, at, view, self._block):
                    self._sort(batch, at + lo, view[lo:hi], blank=self._blank)

    def _sort(self, batch: _Batch, at: int, view: memoryview, *, blank: bool) -> None:
        """What of these bytes is written, and what is zero."""
        runs = stored_parts(view, at, self._granule, self._hole)
        batch.writes += [(at + lo, view[lo:hi]) for lo, hi in runs]
        if not blank:
            batch.zeros += [(at + lo, hi - lo) for lo, hi in between(runs, len(view))]

    def _plan(self) -> Iterator[tuple[int, int, int]]:
        """(kind, start, length) of all that is to be done, in order."""
        compared = self._below is not None and self._below.image is not None
        for exact, there in self._pieces(compared):
            found = exact.align(self._block) if self._block > 1 else exact
            yield from self._over_content(found, there) if compared else self._over_layers(found, there)
        if self._below is not None:
            # Where the new disk is longer than the source, what a longer backing file has there is hidden.
            for rest in windows(self._target, self._source.size, self._target.size):
                shown = rest.where(zero=False)
                kinds = np.full(len(shown), _IN_BACKING if compared else _ZERO)
                yield from stretches(kinds, shown.start, shown.length)

    def _pieces(self, compared: bool) -> Iterator[tuple[Extents, Extents | None]]:
        """What the source says, and the target of the same bytes where that matters, piece by piece."""
        size = self._source.size
        if self._hole and (compared or not self._blank):
            yield from pairs(self._source, self._target, 0, size, grid=self._block)
            return
        for exact in windows(self._source, 0, size, grid=self._block):
            yield exact, None

    def _over_layers(self, found: Extents, there: Extents | None) -> Iterator[tuple[int, int, int]]:
        """The same for a part of the disk, of which the target has what the layers beneath the first `depth` own."""
        below = self._below
        layers = MAX_SIZE if below is None or below.depth is None or not self._hole else below.depth
        held = found.where(zero=False) if self._hole else found
        zero = over_zero = Extents.empty(found.begin)
        if there is not None:
            # What reads as zero there already need not be made so.
            zero = found.where(zero=True).intersect(there.where(zero=False))
            if self._offloader is None and below is None:
                blocks = there.align(_BUFFER)  # so that no read becomes shorter for it
                over_zero = held.intersect(blocks.where(zero=True))
                held = held.intersect(blocks.where(zero=False))
        wanted, owned = held.depth < layers, zero.depth < layers
        near: tuple[int, ...] = ()
        if self._hole and self._offloader is None and below is None:
            near = (_STORED, _OVER_ZERO)
            owned &= _apart(zero, held)
        self._file_ranges = file_ranges = (
            self._offloader.file_ranges(held, wanted) if self._offloader is not None else []
        )
        start, length = without(file_ranges, held.start[wanted], held.length[wanted])
        # Each file range has a kind of its own, so that it is not joined with a neighbour.
        kinds = (
            np.full(len(start), _STORED),
            np.full(len(over_zero), _OVER_ZERO),
            np.full(np.count_nonzero(owned), _ZERO),
            np.arange(len(file_ranges)) + _FILE_RANGES,
        )
        starts = (
            start,
            over_zero.start,
            zero.start[owned],
            np.array([file_range.start for file_range in file_ranges], np.int64),
        )
        lengths = (
            length,
            over_zero.length,
            zero.length[owned],
            np.array([file_range.length for file_range in file_ranges], np.int64),
        )
        return stretches(*map(np.concatenate, (kinds, starts, lengths)), near=near)

    def _over_content(self, found: Extents, there: Extents | None) -> Iterator[tuple[int, int, int]]:
        """The same where the target has what the backing file holds, whose bytes are compared where they are not known."""
        if there is None:
            return stretches(np.full(len(found), _COMPARED), found.start, found.length)
        there = there.align(self._block)
        mine, theirs = found.where(zero=False), there.where(zero=False)
        parts = {
            _COMPARED: mine.intersect(theirs),
            _OVER_ZERO: mine.intersect(there.where(zero=True)),
            _IN_BACKING: theirs.intersect(found.where(zero=True)),
        }
        kinds = np.repeat(list(parts), [len(part) for part in parts.values()])
        start = np.concatenate([part.start for part in parts.values()])
        return stretches(kinds, start, np.concatenate([part.length for part in parts.values()]))


def _apart(zero: Extents, stored: Extents) -> NDArray[np.bool_]:
    """Which parts of `zero` do not lie between two parts of `stored` that are read together, and so are found again."""
    start, end = stored.start, stored.start + stored.length
    together = np.append(start[1:] - end[:-1] <= NEAR, False)  # no part lies behind the last one
    before = np.searchsorted(start, zero.start) - 1
    found: NDArray[np.bool_] = (before < 0) | ~together[before]
    return found


def _unit(target: Image) -> int:
    """In what an overlay allocates, as far as one buffer holds it."""
    limits = target.node.limits
    unit = max(limits.zero_alignment, limits.request_alignment, 512)
    return min(unit, _BUFFER) if is_power_of_two(unit) else 64 * KIB
