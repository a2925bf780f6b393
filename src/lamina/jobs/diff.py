"""The ranges in which two images differ, or that were written since a dirty bitmap was added.

The exact extents of both decide what must be read: bytes that are zero in both, that come from a layer which both chains
share, or that lie at the same offset of the same file are equal, and are not read. The other bytes are compared, block by
block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from ..descriptors import opening
from ..errors import Hint, OptionError
from ..extents import ZERO, Extents
from ..image import Image
from ..limits import KIB, MIB, align_down, align_up, is_power_of_two
from ..node import StorageNode
from ..numeric import np
from ..options import shown
from .beneath import Layer, shared_layers, unlike
from .progress import Monitor
from .requests import NEAR, Requests, in_order, requests_for
from .windows import windows

if TYPE_CHECKING:
    from ..bitmap import DirtyBitmap
    from ..json_forms import RangeJson
    from ..numeric import NDArray
    from ..pending import Pending
    from ..status import HostFile

#: The most that is read from each image at a time, if blocks are not larger; the second size if one image is far away.
_PIECE, _FAR_PIECE = 512 * KIB, 2 * MIB
#: The largest block of a comparison.
MAX_GRANULARITY = 64 * MIB


class Range(NamedTuple):
    """A range of a disk, in bytes."""

    offset: int
    length: int

    def to_json(self) -> RangeJson:
        """By the names of the container storage interface, as `lamina diff --output=json` prints it."""
        return {"byte_offset": self.offset, "size_bytes": self.length}


def diff(
    first: Image,
    second: Image,
    *,
    granularity: int = 4096,
    content: bool = True,
    parallel: int | None = None,
    monitor: Monitor | None = None,
) -> Iterator[Range]:
    """Yield the ranges of `second` whose bytes differ from those of `first`, in order and not adjacent.

    The disk is divided into blocks of `granularity` bytes, a power of two (the last block may be shorter). Each block of a
    range has at least one byte that differs; all other blocks are equal. Without `content` nothing is read: the ranges are
    those not known to be equal, rounded to blocks, and never leave out a byte that differs. Past its end `first` reads as
    zero; what it has past the end of `second` is not part of the result.

    `parallel`: so many pieces are read at once, 1 to 16; None: one, or 8 if an image is remote. No other user may write to
    the images meanwhile. Raises OptionError, the errors of reading, and Cancelled.
    """
    require_granularity(granularity)
    return _diff(first, second, granularity, content, parallel, monitor or Monitor())


def bitmap_of(image: Image, name: str) -> DirtyBitmap:
    """The dirty bitmap of this name. OptionError if there is none, or if it is inconsistent."""
    if name not in image.bitmaps:
        raise OptionError(
            f"the image has no consistent dirty bitmap {shown(name)}",
            path=image.filename,
            hint=Hint(
                "lamina.info lists them; after a crash, make a full backup and a new bitmap",
                command="lamina info lists them; after a crash, make a full backup and a new bitmap",
            ),
        )
    return image.bitmaps[name]


def changed_since(image: Image, bitmap: str, *, granularity: int = 1) -> Iterator[Range]:
    """Yield the ranges of `image` that were written since its dirty bitmap of this name was added or cleared, in order and
    not adjacent, rounded to blocks of `granularity` bytes. Nothing is read; written bytes may have been equal. Raises
    OptionError if there is no such bitmap, or if it is inconsistent."""
    require_granularity(granularity)
    size = image.size
    found = bitmap_of(image, bitmap).dirty(0, size)
    blocks = ((align_down(lo, granularity), min(align_up(hi, granularity), size)) for lo, hi in found)
    return _joined(blocks)


def require_granularity(granularity: int) -> None:
    """Raise OptionError unless blocks can have so many bytes."""
    if not is_power_of_two(granularity) or granularity > MAX_GRANULARITY:
        raise OptionError(
            f"the granularity {granularity} is not a power of two up to {MAX_GRANULARITY}", hint="use 4k or 64k"
        )


def _diff(
    first: Image, second: Image, granularity: int, content: bool, parallel: int | None, watch: Monitor
) -> Iterator[Range]:
    with opening(first.share, read_only=True) as mine, opening(second.share, read_only=True) as theirs:
        plan = _Plan(mine, theirs, granularity)
        if not content:
            yield from _joined((lo, hi) for part in plan.parts() for lo, hi in plan.blocks(part, 0))
            return
        ends = (
            requests_for(mine, theirs.node, asked=parallel, name="lamina-diff"),
            requests_for(theirs, mine.node, asked=parallel, name="lamina-diff"),
        )
        piece = max(_PIECE if ends[0].count == 1 else _FAR_PIECE, granularity)
        reader = _Reader(ends, mine.size, piece, granularity)
        try:
            try:
                with closing(in_order(plan.steps(piece), reader.begin, ends[0].count)) as steps:
                    yield from _joined(reader.differing(steps, watch, theirs.size))
            finally:
                reader.close()
        finally:
            reader.close()  # an interrupt that struck the first time finds the second


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[Range]:
    """Ranges (start, stop), in order, with those that touch made one."""
    start = stop = -1
    for lo, hi in ranges:
        if lo > stop:
            if start >= 0:
                yield Range(start, stop - start)
            start = lo
        stop = max(stop, hi)
    if start >= 0:
        yield Range(start, stop - start)


class _Part(NamedTuple):
    """A part of the disk up to `end`, divided where the status of either image changes: `start` of each row, whether its
    bytes are known to be equal, and whether those of each image may be something else than zero."""

    end: int
    start: NDArray[np.int64]
    equal: NDArray[np.bool_]
    stored: tuple[NDArray[np.bool_], NDArray[np.bool_]]


class _Step(NamedTuple):
    """A range to compare, and which images must be read for it: an image that is not reads as zero there. With neither, all
    before `end` is done."""

    begin: int
    end: int
    read: tuple[bool, bool] = (False, False)


class _Plan:
    """What must be compared, from the extents of both images."""

    def __init__(self, first: Image, second: Image, granularity: int) -> None:
        self._images = (first, second)
        self._granularity = granularity
        layers = shared_layers(first.node, second.node) or (None, None)
        self._layers = Layer(first, layers[0]), Layer(second, layers[1])
        #: Whether both return the bytes at the host offsets that they tell.
        self._located = first.node.copyable and second.node.copyable

    def steps(self, piece: int) -> Iterator[_Step]:
        """What must be compared, in order, each time at most `piece` bytes: whole blocks, but for the last."""
        for part in self.parts():
            yield from self._pieces(part, piece)
            yield _Step(part.end, part.end)

    def parts(self) -> Iterator[_Part]:
        first, second = self._images
        for theirs in windows(second, 0, second.size, grid=self._granularity):
            for mine in _padded(first, theirs.begin, theirs.end, self._granularity):
                yield self._part(mine, theirs.clip(mine.begin, mine.end))

    def blocks(self, part: _Part, near: int) -> list[tuple[int, int]]:
        """The blocks (start, stop) of this part that are not known to be equal; those at most `near` bytes apart are one."""
        rows = np.flatnonzero(~part.equal)
        if not len(rows):
            return []
        unit = self._granularity
        stop = np.append(part.start[1:], part.end)[rows]
        lo, hi = part.start[rows] // unit * unit, np.minimum(-(-stop // unit) * unit, part.end)
        heads = np.flatnonzero(np.append(True, lo[1:] - hi[:-1] > near))
        tails = np.append(heads[1:], len(lo)) - 1
        return list(zip(lo[heads].tolist(), hi[tails].tolist(), strict=True))

    def _part(self, mine: Extents, theirs: Extents) -> _Part:
        start = np.union1d(mine.start, theirs.start)
        rows = np.searchsorted(mine.start, start, "right") - 1, np.searchsorted(theirs.start, start, "right") - 1
        both = (mine, rows[0]), (theirs, rows[1])
        stored = tuple((found.flags[row] & ZERO) == 0 for found, row in both)
        equal = ~stored[0] & ~stored[1]
        deep = [found.depth[row] >= layer.above() for (found, row), layer in zip(both, self._layers, strict=True)]
        equal |= deep[0] & deep[1]
        if self._located:
            files: dict[Any, int] = {}
            file = [_numbers(found.files, files)[found.file[row]] for found, row in both]
            offset = [found.offset[row] + start - found.start[row] for found, row in both]
            # Where bytes are known to be zero, an offset is only storage that is reserved for them.
            equal |= stored[0] & stored[1] & (file[0] >= 0) & (file[0] == file[1]) & (offset[0] == offset[1])
        return _Part(mine.end, start, equal, (stored[0], stored[1]))

    def _pieces(self, part: _Part, piece: int) -> Iterator[_Step]:
        runs = self.blocks(part, NEAR)
        if not runs:
            return
        lo, hi = np.array(runs, np.int64).T
        count = -(-(hi - lo) // piece)
        last = np.cumsum(count)
        begin = np.repeat(lo, count) + (np.arange(last[-1]) - np.repeat(last - count, count)) * piece
        end = np.minimum(begin + piece, np.repeat(hi, count))
        # The rows of the part that each piece touches.
        low = np.searchsorted(part.start, begin, "right") - 1
        high = np.searchsorted(part.start, end, "left")
        read = []
        for stored in part.stored:
            before = np.concatenate(([0], np.cumsum(stored)))
            read.append((before[high] > before[low]).tolist())
        for lower, upper, *which in zip(begin.tolist(), end.tolist(), *read, strict=True):
            if any(which):
                yield _Step(lower, upper, (which[0], which[1]))


def _padded(image: Image, begin: int, end: int, grid: int) -> Iterator[Extents]:
    """As `windows`; past the end of the image all is zero."""
    inside = min(end, image.size)
    if begin >= inside:
        yield Extents.single(begin, end - begin, zero=True, present=True)
        return
    for found in windows(image, begin, inside, grid=grid):
        yield found.pad_zero(end) if found.end == inside < end else found


def _numbers(files: tuple[HostFile, ...], known: dict[Any, int]) -> NDArray[np.int64]:
    """A number for each of `files`, the same for nodes over the same file; the last item is for the index -1."""
    keys = [file.identity if isinstance(file, StorageNode) and file.identity is not None else file for file in files]
    return np.array([*(known.setdefault(key, len(known)) for key in keys), -1], np.int64)


class _Reader:
    """Reads what a step compares into buffers that are used again."""

    def __init__(self, ends: tuple[Requests, Requests], size: int, piece: int, granularity: int) -> None:
        """`size`: that of the first image, which reads as zero past its end."""
        self._ends = ends
        self._size = size
        self._piece = piece
        self._granularity = granularity
        self._zeros = bytearray(piece)
        self._free: list[bytearray] = []
        self._taken: deque[tuple[bytearray, bytearray]] = deque()  # of the steps that were begun, in their order

    def begin(self, step: _Step) -> list[Pending]:
        """Start to read what the step compares."""
        buffers = [self._zeros if not read else self._buffer() for read in step.read]
        self._taken.append((buffers[0], buffers[1]))
        requests: list[Pending] = []
        for which, end in enumerate(self._ends):
            if step.read[which]:
                view = memoryview(buffers[which])[: step.end - step.begin]
                inside = len(view) if which else min(self._size - step.begin, len(view))
                view[inside:] = bytes(len(view) - inside)
                requests.append(end.start_read(step.begin, view[:inside]))
        return requests

    def _buffer(self) -> bytearray:
        return self._free.pop() if self._free else bytearray(self._piece)

    def differing(self, steps: Iterable[_Step], watch: Monitor, size: int) -> Iterator[tuple[int, int]]:
        """The ranges (start, stop) of these steps, whose reads are finished, that differ."""
        for step in steps:
            mine, theirs = self._taken.popleft()
            if any(step.read):
                view = memoryview(theirs)[: step.end - step.begin]
                for lo, hi in unlike(mine, view, self._granularity):
                    yield step.begin + lo, step.begin + hi
                self._free += [buffer for buffer in (mine, theirs) if buffer is not self._zeros]
            watch.update(step.end, size)

    def close(self) -> None:
        for end in self._ends:
            end.close()
