"""Extents: the status and location of the bytes of a disk, stored in columns, and the operations that compose them.

Maps, copies, commits and NBD block status all use `Extents`. A format returns one batch of columns per query; `over` puts it
on top of the extents of the backing layer, `clip` and `shift` convert it in filters, and `align` rounds it for a consumer
with a granularity. Extents are exact, in bytes, inside the library; only the consumer rounds them, once. Content (data,
zero, compressed, location) and ownership (present, depth) are independent.

All operations are pure functions of immutable values and therefore thread-safe. They are vectorised: a few passes over the
columns, never a Python loop over rows. Offsets and lengths are bytes, from 0 to 2**63 - 1. Base layer, without I/O; numpy is
the only other import.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeAlias, overload

from .errors import OutOfRange
from .limits import MAX_SIZE, is_power_of_two
from .numeric import ArrayLike, NDArray, np
from .rounding import follows, mixed_blocks

# Bits of the column `flags`, and one row as an object; see `status`.
from .status import COMPRESSED as COMPRESSED
from .status import DATA as DATA
from .status import PRESENT as PRESENT
from .status import ZERO as ZERO
from .status import Extent as Extent
from .status import HostFile as HostFile
from .status import HostPath as HostPath

if TYPE_CHECKING:
    from .json_forms import ExtentJson


#: The rows that iteration makes into objects at a time: few enough for the CPU cache, enough for the cost of a numpy call.
_CHUNK = 4096

#: The types of the columns.
Int64s: TypeAlias = NDArray[np.int64]
Int32s: TypeAlias = NDArray[np.int32]
Bytes: TypeAlias = NDArray[np.uint8]
Bools: TypeAlias = NDArray[np.bool_]


class Totals(NamedTuple):
    """How many bytes have each status (`Extents.totals`)."""

    length: int  #: the bytes of all extents
    data: int  #: bytes that are stored
    zero: int  #: bytes that are known to read as zeros
    present: int  #: bytes that a layer of the chain owns
    compressed: int  #: bytes that are stored compressed
    extents: int  #: the number of extents


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Extents:
    """An immutable, ordered sequence of extents that do not overlap: one row each, in columns of equal length.

    The result of a query is *contiguous*: each extent starts at the end of the previous one. Results of `where`, `intersect`
    and `diff` may have gaps; `over` and `align` raise ValueError for these. Adjacent rows may be equal until `coalesce`.
    Create instances with the class methods, since the constructor checks nothing.
    """

    begin: int
    """The start of the first extent in bytes; defined even without extents."""
    start: Int64s
    """The first byte of each extent on the disk, as its offset in bytes; increasing."""
    length: Int64s
    """The bytes of each extent, above 0."""
    flags: Bytes
    """The status of each extent, as the sum of DATA, ZERO, PRESENT and COMPRESSED (see `lamina.status`). The properties
    `data`, `zero`, `present` and `compressed` are its bits as columns of their own."""
    depth: Int32s
    """The number of layers above the one that decides: 0 is the top of the chain; the bottom layer if none owns the bytes."""
    file: Int32s
    """The index in `files` of the file that stores the bytes of each extent as they are, or -1 if none does."""
    offset: Int64s
    """The offset in bytes of each extent in that file, or -1."""
    files: tuple[HostFile, ...] = ()
    """The host files to which `file` refers, each once: nodes of the graph, or `HostPath`s after `pickle`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled extents have a `HostPath` in place of each node, so that they may go to another process."""
        paths = [HostPath(file.filename) for file in self.files]
        number = {path: index for index, path in enumerate(dict.fromkeys(paths))}  # two nodes may have one name
        file = np.array([*(number[path] for path in paths), -1], np.int32)[self.file]  # index -1 finds the -1
        columns = (self.start, self.length, self.flags, self.depth, file, self.offset)
        return type(self), (self.begin, *columns, tuple(number))

    def __deepcopy__(self, _: object = None) -> Extents:
        return self

    __copy__ = __deepcopy__

    def __post_init__(self) -> None:
        for column in (self.start, self.length, self.flags, self.depth, self.file, self.offset):
            column.setflags(write=False)

    @classmethod
    def single(
        cls,
        start: int,
        length: int,
        *,
        data: bool = False,
        zero: bool = False,
        present: bool = False,
        depth: int = 0,
        compressed: bool = False,
        file: HostFile | None = None,
        offset: int | None = None,
    ) -> Extents:
        """One extent of `length` > 0 bytes. `file` and `offset` are given together or not at all."""
        flags = DATA * data | ZERO * zero | PRESENT * present | COMPRESSED * compressed
        number, files = (-1, ()) if file is None else (0, (file,))
        column = None if offset is None else [offset]
        return cls.from_columns([start], length, flags, depth=depth, file=[number], offset=column, files=files)

    @classmethod
    def empty(cls, begin: int, files: tuple[HostFile, ...] = ()) -> Extents:
        """No extents, at `begin`: the result of a query of length 0."""
        _check_range(begin, begin)
        none, few = np.empty(0, np.int64), np.empty(0, np.int32)
        return cls(begin, none, none, np.empty(0, np.uint8), few, few, none, files)

    @classmethod
    def from_columns(
        cls,
        start: ArrayLike,
        length: ArrayLike,
        flags: ArrayLike,
        *,
        depth: ArrayLike | None = None,
        file: ArrayLike | None = None,
        offset: ArrayLike | None = None,
        files: tuple[HostFile, ...] = (),
    ) -> Extents:
        """Extents of columns with n rows. Columns of the right type are not copied, so do not change them afterwards.

        `start` has n rows; each other column may be one number for all rows. The default of `depth` is 0. An `offset` of -1
        means none. `file` as one number (default: 0) applies to the rows with an offset; as a column it must be -1 where
        `offset` is. Raises ValueError if the rows violate the rules of this class, OutOfRange for numbers out of range.
        """
        if len(set(files)) != len(files):
            raise ValueError("`files` contains a host file twice")
        starts: Int64s = _column(start, np.int64, np.size(start))
        count = len(starts)
        lengths: Int64s = _column(length, np.int64, count)
        bits: Bytes = _column(flags, np.uint8, count)
        depths: Int32s = _column(0 if depth is None else depth, np.int32, count)
        offsets: Int64s = _column(-1 if offset is None else offset, np.int64, count)
        indexes: Int32s = _column(0 if file is None else file, np.int32, count)
        if file is None or np.ndim(file) == 0:
            indexes[offsets < 0] = -1
        if not count:
            return cls.empty(0, files)
        # A sum above 2**63 - 1 wraps to a negative number, so the minimum reveals any overflow.
        ends = starts + lengths
        if starts[0] < 0 or lengths.min() < 1 or ends.min() < 1 or offsets.min() < -1 or (offsets + lengths).min() < 0:
            raise OutOfRange("an extent is empty or outside 0 to 2**63 - 1 (in the disk or its host file)")
        if (starts[1:] < ends[:-1]).any():
            raise ValueError("extents overlap or are not in order")
        if bits.max() >= 2 * COMPRESSED or depths.min() < 0 or indexes.min() < -1 or indexes.max() >= len(files):
            raise OutOfRange("an extent has unknown flags, a negative depth, or a file that is not in `files`")
        if ((indexes < 0) != (offsets < 0)).any():
            raise ValueError("an extent has a host file without an offset, or an offset without a file")
        return cls(int(starts[0]), starts, lengths, bits, depths, indexes, offsets, files)

    @classmethod
    def from_extents(cls, extents: Iterable[Extent]) -> Extents:
        """Extents with one row for each object, in order; `empty(0)` if there are no objects."""
        rows = list(extents)
        if not rows:
            return cls.empty(0)
        start, length, data, zero, present, depth, compressed, file, offset = zip(*rows, strict=True)
        known: dict[HostFile, int] = {}
        flags = np.packbits(np.array([data, zero, present, compressed], np.bool_), axis=0, bitorder="little")[0]
        indexes = [-1 if one is None else known.setdefault(one, len(known)) for one in file]
        offsets = [-1 if one is None else one for one in offset]
        return cls.from_columns(start, length, flags, depth=depth, file=indexes, offset=offsets, files=tuple(known))

    @classmethod
    def concat(cls, pieces: Sequence[Extents]) -> Extents:
        """Join one or more pieces, each of which begins at the end of the previous one. Equal rows are not coalesced."""
        if not pieces:
            raise ValueError("nothing to concatenate")
        if any(left.end != right.begin for left, right in itertools.pairwise(pieces)):
            raise ValueError("a piece does not begin at the end of the previous one")
        return pieces[0] if len(pieces) == 1 else cls._joined(pieces)

    @property
    def data(self) -> Bools:
        """Whether the bytes of each extent are stored."""
        return (self.flags & DATA).astype(np.bool_)

    @property
    def zero(self) -> Bools:
        """Whether the bytes of each extent are known to read as zeros."""
        return (self.flags & ZERO).astype(np.bool_)

    @property
    def present(self) -> Bools:
        """Whether a layer of the chain owns the bytes of each extent, so that no deeper layer matters."""
        return (self.flags & PRESENT).astype(np.bool_)

    @property
    def compressed(self) -> Bools:
        """Whether the bytes of each extent are stored compressed."""
        return (self.flags & COMPRESSED).astype(np.bool_)

    @property
    def end(self) -> int:
        """The end of the last extent; `begin` if there are no extents."""
        return int(self.start[-1]) + int(self.length[-1]) if len(self.start) else self.begin

    @property
    def contiguous(self) -> bool:
        """Whether every byte from `begin` to `end` is in exactly one extent."""
        return bool((self.start[1:] == self._ends()[:-1]).all())

    def __len__(self) -> int:
        return len(self.start)

    def __iter__(self) -> Iterator[Extent]:
        for first in range(0, len(self), _CHUNK):
            yield from self._objects(slice(first, first + _CHUNK))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Extent: ...

    @overload
    def __getitem__(self, index: slice) -> Extents: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Extent | Extents:
        """The extent with the number `index`; negative numbers count from the end. A slice gives these rows as `Extents`,
        with gaps if it has a step; ValueError for a negative step, since extents are in order."""
        if isinstance(index, slice):
            first, stop, step = index.indices(len(self))
            if step < 0:
                raise ValueError(f"the step of the slice is {step}, and extents stay in order; use a positive step")
            begin = int(self.start[first]) if first < len(self) else self.end
            return self._take(index) if first < stop else Extents.empty(begin, self.files)
        number = range(len(self))[operator.index(index)]
        return next(self._objects(slice(number, number + 1)))

    def at(self, position: int) -> Extent:
        """The extent that contains the byte at `position`; OutOfRange if there is none."""
        if self.begin <= position < self.end:
            extent = self[int(np.searchsorted(self.start, position, "right")) - 1]
            if position < extent.end:
                return extent
        raise OutOfRange("no extent contains this byte", offset=position)

    def totals(self) -> Totals:
        """The bytes of each status, and the number of extents."""
        masks = (self.data, self.zero, self.present, self.compressed)
        data, zero, present, compressed = (int(self.length[mask].sum()) for mask in masks)
        return Totals(int(self.length.sum()), data, zero, present, compressed, len(self))

    def to_json(self) -> list[ExtentJson]:
        """A dict for each extent, with the names of `lamina map --output=json`; see `Extent.to_json`."""
        return [extent.to_json() for extent in self]

    def __eq__(self, other: object) -> bool:
        """Whether both have the same rows in the same files: the same nodes, or paths of the same name. Rows that differ may
        have the same meaning: see `coalesce`."""
        if not isinstance(other, Extents):
            return NotImplemented
        if self.begin != other.begin or len(self) != len(other):
            return False
        files = tuple(dict.fromkeys(self.files + other.files))
        names = ("start", "length", "flags", "depth", "offset")
        columns = [(getattr(self, name), getattr(other, name)) for name in names]
        return all(np.array_equal(*pair) for pair in [*columns, (self._file_in(files), other._file_in(files))])

    def __repr__(self) -> str:
        more = len(self) - 8
        rows = ", ".join(map(repr, self._objects(slice(0, 8)))) + (f", and {more} more" if more > 0 else "")
        return f"<Extents [{self.begin}, {self.end}): {rows}>"

    def _repr_html_(self) -> str:
        """What notebooks show: a picture, and the first extents."""
        from .picture.notebook import of_extents
        from .picture.tables import guarded

        return guarded(lambda: of_extents(self))

    def clip(self, begin: int, end: int) -> Extents:
        """The part inside [begin, end), with adjusted host offsets. Without such a part: empty, at the nearest offset."""
        if begin > end:
            raise ValueError(f"the range ends at {end}, before it begins at {begin}")
        low, high = max(begin, self.begin), min(end, self.end)
        if low >= high:
            return Extents.empty(min(low, self.end), self.files)
        if (low, high) == (self.begin, self.end):
            return self
        first = int(np.searchsorted(self.start, low, "right")) - 1
        first += self[first].end <= low  # `low` is in a gap
        last = int(np.searchsorted(self.start, high, "left"))
        if first == last:
            return Extents.empty(low, self.files)
        start = self.start[first:last].copy()
        stop = start + self.length[first:last]
        start[0], stop[-1] = max(int(start[0]), low), min(int(stop[-1]), high)
        return self._cut(slice(first, last), start, stop)

    def shift(self, delta: int) -> Extents:
        """The same extents with `delta`, which may be negative, added to their starts; host offsets stay."""
        _check_range(self.begin + delta, self.end + delta)
        return replace(self, begin=self.begin + delta, start=self.start + delta)

    def deepen(self, layers: int) -> Extents:
        """The same extents with `layers` added to their depths, as seen from a higher layer of the chain."""
        return replace(self, depth=self.depth + np.int32(layers))

    def pad_zero(self, end: int, depth: int = 0) -> Extents:
        """Append zeros up to `end` that layer `depth` owns and does not store, as beyond the end of a short backing file."""
        return self._padded(end, ZERO | PRESENT, depth)

    def over(self, below: Extents) -> Extents:
        """The rows of self that are present, and the rows of `below`, the next layer of the chain, for the other bytes, one
        layer deeper. Bytes that no layer owns get the depth of the bottom layer."""
        return self.masking(below.deepen(1))

    def masking(self, below: Extents) -> Extents:
        """As `over`, but with `below` in the same layer: the rows of a filter that holds newer bytes than its child."""
        if self.begin != below.begin or self.end != below.end:
            raise ValueError(f"[{self.begin}, {self.end}) and [{below.begin}, {below.end}) are not the same range")
        self._need_contiguous()
        below._need_contiguous()
        own = self.where(present=True)
        if len(own) == len(self):
            return self
        return own._merge(below.intersect(self.where(present=False))) if own else below

    def coalesce(self) -> Extents:
        """Join adjacent rows of the same flags and depth, if both have no offset or are contiguous in one file."""
        last, this = slice(None, -1), slice(1, None)
        joins = self.flags[this] == self.flags[last]
        joins &= self.depth[this] == self.depth[last]
        joins &= self.start[this] == self._ends()[last]
        joins &= (self.file[this] < 0) & (self.file[last] < 0) | follows(self)
        if not joins.any():
            return self
        heads = np.flatnonzero(np.concatenate(([True], ~joins)))
        tails = np.append(heads[1:], len(self)) - 1
        return self._cut(heads, self.start[heads], self._ends()[tails])

    def align(self, alignment: int, end: int | None = None) -> Extents:
        """Round to blocks of `alignment` bytes, a power of two up to 2**62, and coalesce.

        Block boundaries are multiples of `alignment`. The first block begins at `begin`, the last ends at `end`, the end of
        the disk as the consumer sees it. An `end` beyond the last extent adds padding: zero, not data, not present, without
        an offset, at the depth of the last extent. A block that overlaps several extents is data, present or compressed if
        any of them is, and zero if all of them are. It has an offset only if the extents are contiguous in one file. Its
        depth is the minimum of the present extents, or of all if none is present. A block inside one extent is unchanged.

        To round a long disk in batches, split the batches at multiples of `alignment`. Raises ValueError for extents with
        gaps, for an invalid `alignment`, and for an `end` before the last extent or beyond 2**63 - 1.
        """
        if not is_power_of_two(alignment) or alignment > 1 << 62:
            raise ValueError(f"alignment {alignment} is not a power of two up to 2**62")
        self._need_contiguous()
        whole = self if end is None else self._padded(end, ZERO, int(self.depth[-1]) if self else 0)
        return whole._round(alignment).coalesce()

    def intersect(self, ranges: Extents) -> Extents:
        """The parts of self inside the extents of `ranges`, split at their boundaries. The status of `ranges` is ignored."""
        mine, _, start, stop = self._overlaps(ranges)
        return self._cut(mine, start, stop)

    def where(
        self,
        *,
        data: bool | None = None,
        zero: bool | None = None,
        present: bool | None = None,
        compressed: bool | None = None,
        depth: int | None = None,
    ) -> Extents:
        """The extents that match all given attributes; the others become gaps."""
        criteria = ((DATA, data), (ZERO, zero), (PRESENT, present), (COMPRESSED, compressed))
        mask = sum(bit for bit, wanted in criteria if wanted is not None)
        keep = (self.flags & mask) == sum(bit for bit, wanted in criteria if wanted)
        if depth is not None:
            keep &= self.depth == depth
        return self if keep.all() else self._take(np.flatnonzero(keep))

    def diff(self, other: Extents) -> Extents:
        """The parts of self, coalesced, whose content (data or zero) differs from that of `other`. Gaps are ignored."""
        mine, theirs, start, stop = self._overlaps(other)
        differs = ((self.flags[mine] ^ other.flags[theirs]) & (DATA | ZERO)) != 0
        return self._cut(mine[differs], start[differs], stop[differs]).coalesce()

    def _ends(self) -> Int64s:
        return self.start + self.length

    def _objects(self, rows: slice) -> Iterator[Extent]:
        flags = self.flags[rows, None] & np.array([DATA, ZERO, PRESENT, COMPRESSED], np.uint8)
        data, zero, present, compressed = flags.astype(np.bool_).T.tolist()
        start, length, depth = self.start[rows].tolist(), self.length[rows].tolist(), self.depth[rows].tolist()
        files = (*self.files, None)  # index -1 finds the None
        file = [files[index] for index in self.file[rows].tolist()]
        offset = [None if number < 0 else number for number in self.offset[rows].tolist()]
        columns = (start, length, data, zero, present, depth, compressed, file, offset)
        return map(Extent._make, zip(*columns, strict=True))

    def _need_contiguous(self) -> None:
        if not self.contiguous:
            raise ValueError(f"the extents from {self.begin} to {self.end} have gaps")

    def _take(self, rows: Any) -> Extents:
        """The given rows: a slice, or increasing numbers."""
        start = self.start[rows]
        begin = int(start[0]) if len(start) else self.begin
        length, flags, depth = self.length[rows], self.flags[rows], self.depth[rows]
        return Extents(begin, start, length, flags, depth, self.file[rows], self.offset[rows], self.files)

    def _cut(self, rows: Any, start: Int64s, stop: Int64s) -> Extents:
        """The given rows with new bounds and adjusted host offsets."""
        file, offset = self.file[rows], self.offset[rows] + (start - self.start[rows])
        offset[file < 0] = -1
        begin = int(start[0]) if len(start) else self.begin
        return Extents(begin, start, stop - start, self.flags[rows], self.depth[rows], file, offset, self.files)

    def _file_in(self, files: tuple[HostFile, ...]) -> Int32s:
        """The column `file` as indexes into `files`, a superset of `self.files`."""
        if self.files == files[: len(self.files)]:
            return self.file
        number = {file: index for index, file in enumerate(files)}
        table = np.array([*(number[file] for file in self.files), -1], np.int32)  # index -1 finds the -1
        return table[self.file]

    @classmethod
    def _joined(cls, pieces: Sequence[Extents]) -> Extents:
        """The rows of all pieces, one piece after the other, with one tuple of files."""
        files = tuple(dict.fromkeys(itertools.chain.from_iterable(dict.fromkeys(piece.files for piece in pieces))))

        def joined(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(piece, name) for piece in pieces])

        file: Int32s = np.concatenate([piece._file_in(files) for piece in pieces])
        start, length, flags, depth, offset = map(joined, ("start", "length", "flags", "depth", "offset"))
        return cls(pieces[0].begin, start, length, flags, depth, file, offset, files)

    def _merge(self, other: Extents) -> Extents:
        """The rows of both, which must not overlap, in order."""
        both = Extents._joined([self, other])
        return both._take(np.argsort(both.start, kind="stable"))  # two sorted runs: the stable sort merges them

    def _padded(self, end: int, flags: int, depth: int) -> Extents:
        if end < self.end:
            raise ValueError(f"cannot pad to {end}: the extents end at {self.end} (clip them first)")
        _check_range(self.begin, end)
        if end == self.end:
            return self
        return Extents._joined([self, Extents.from_columns([self.end], end - self.end, flags, depth=depth)])

    def _overlaps(self, other: Extents) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """The pairs of overlapping rows (of self, of `other`), in order, with begin and end of the overlap."""
        ends, other_ends = self._ends(), other._ends()
        first = np.searchsorted(other_ends, self.start, "right")
        count = np.searchsorted(other.start, ends, "left") - first
        mine = np.repeat(np.arange(len(self)), count)
        theirs = np.arange(len(mine)) + np.repeat(first - (np.cumsum(count) - count), count)
        begin = np.maximum(self.start[mine], other.start[theirs])
        return mine, theirs, begin, np.minimum(ends[mine], other_ends[theirs])

    def _round(self, alignment: int) -> Extents:
        """`align` without its checks."""
        found = mixed_blocks(self, alignment)
        if found is None:
            return self
        start, stop, flags, depth, file, offset, rest_start, rest_stop = found
        mixed = Extents(int(start[0]), start, stop - start, flags, depth, file, offset, self.files)
        rows = np.flatnonzero(rest_stop > rest_start)
        return mixed._merge(self._cut(rows, rest_start[rows], rest_stop[rows])) if len(rows) else mixed


def _column(values: ArrayLike, dtype: Any, count: int) -> NDArray[Any]:
    """`values` as a new column (a view where the type fits); a single number is repeated `count` times."""
    try:
        column = np.asarray(values, dtype)
    except OverflowError as error:
        raise OutOfRange(f"a number does not fit into a column of {np.dtype(dtype)}") from error
    if column.ndim == 0:
        return np.full(count, column, dtype)
    if column.shape != (count,):
        raise ValueError(f"a column has the shape {column.shape}, not {(count,)}")
    return column.view()


def _check_range(begin: int, end: int) -> None:
    if begin < 0 or end > MAX_SIZE:
        raise OutOfRange("extents lie between 0 and 2**63 - 1", offset=begin, length=end - begin)
