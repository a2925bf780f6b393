"""Data in a hole is zero: if a format maps a range to a hole of its file, or past its end, the status says that it is zero.

This rule applies to the mapping of every format (`format_node`), to small ranges and to columns alike. Such a range has the
flags ZERO and DATA, and keeps its offset: readers and copies treat it as zero, and counts of allocated storage include it.

One query per result asks a child for its status, and the columns of both are intersected. Separate queries are made only for
ranges that are far apart in the child.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from . import limits
from .limits import MIB
from .status import DATA, PRESENT, ZERO

if TYPE_CHECKING:
    from .format_node import Columns
    from .request import Child

#: Ranges of a child with a larger distance than this are far apart: the bytes between them are not queried.
_GAP = MIB
#: Rows of the first query, which finds out whether there is a hole at all.
_QUICK = 4
#: The most separate queries. For more ranges, one query covers everything from the first to the last.
_MOST_APART = 1 << 10


def lies_in_hole(child: Child, offset: int, length: int) -> bool:
    """Whether these bytes of a child are known to read as zero, including bytes past its end if the edge permits reading
    them."""
    return (child.grows or offset + length <= child.size) and child.reads_zero(offset, length)


def runs_with_holes(flags: int, child: Child, offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """(flags, length) of the first runs, at most `most`, of a range that a format maps to `offset` of `child` with the flags
    `flags`: as `with_holes`, in plain Python."""
    inside = min(child.size - offset, length)
    bare = ZERO | PRESENT if flags == PRESENT else flags | ZERO  # the flags in a hole of the child
    found = []
    if inside > 0:
        for told, run, _, _, _ in child.first_extents(offset, inside, most):
            found.append((bare if told & (DATA | ZERO) == ZERO else flags | DATA | told & ZERO, run))
            inside -= run
            length -= run
    if inside <= 0 < length and len(found) < most:
        found.append((bare if child.grows else flags | DATA, length))
    return found


def stored(own: Columns) -> Columns:
    """`own` without the holes of the children: rows with the flag PRESENT alone are DATA."""
    from .numeric import np

    if PRESENT not in own.flags.tobytes():  # faster than a comparison in numpy
        return own
    return own._replace(flags=np.where(own.flags == PRESENT, np.uint8(DATA | PRESENT), own.flags))


def with_holes(own: Columns) -> Columns:
    """`own` with the holes of the children: data in a hole is ZERO too, and rows with the flag PRESENT alone get the flags of
    the child: DATA, ZERO or both. The result may cover only the beginning of `own`, so that the number of holes does not
    affect the maximum of time and memory."""
    from .numeric import np

    asked = (own.offset >= 0) & ((own.flags & ZERO) == 0)
    which = asked.nonzero()[0]
    if not len(which):
        return own
    rows = len(own.start)
    quick = _at_once(own, which)
    if quick is not None:
        return quick
    while True:
        zeros, known, end = _zeros(own, asked, rows)
        if known and (known >= rows // 2 or known >= _MOST_APART):
            return _overlaid(own, zeros, known)
        if rows == 1:
            # The row is longer than one result of its child: the part that the result covers.
            part = np.array([end - int(own.offset[0])])
            return _overlaid(own._replace(length=part), zeros, 1)
        # A long query covered few rows. Fewer rows are closer together.
        rows = max(min(rows // 2, _MOST_APART), 1)


def _at_once(own: Columns, which: Any) -> Columns | None:
    """The result if one query in plain Python suffices and no row must be split: the rows with the numbers `which` are in a
    few ranges of the child, each of which is a hole or has none. Otherwise None."""
    from .numeric import np

    if len(own.children) > 1:
        return None
    child, place = own.children[0], own.offset[which]
    stop = place + own.length[which]
    low, high = int(place.min()), int(stop.max())
    if high > child.size:
        return None
    rows = child.first_extents(low, high - low, _QUICK)
    told = [row[0] & (DATA | ZERO) for row in rows]
    ends = list(accumulate((row[1] for row in rows), initial=low))[1:]
    if ends[-1] < high:
        return None
    if told == [DATA] * len(told):
        return stored(own)
    if told == told[:1] * len(told):
        bits = np.uint8(told[0])
    else:
        if any(((place < end) & (stop > end)).any() for end in ends[:-1]):
            return None
        bits = np.array(told, np.uint8)[np.searchsorted(np.array(ends), place, "right")]
    flags = own.flags.copy()
    flags[which] = _with(flags[which], bits)
    return own._replace(flags=flags)


def _with(own: Any, told: Any) -> Any:
    """The flags of rows with the own flags `own`, for which the child returned `told`: DATA, ZERO or both; 0: no query."""
    from .numeric import np

    flat = (own == PRESENT) & (told != 0)
    return np.where(flat, own | told, own | (told & np.uint8(ZERO)))


class _Zeros(NamedTuple):
    """Ranges of the disk that read as zero, each inside the row with the number `row`, and the flags of the child: ZERO, or
    DATA and ZERO."""

    row: Any
    start: Any
    stop: Any
    told: Any


def _zeros(own: Columns, asked: Any, rows: int) -> tuple[list[_Zeros], int, int]:
    """The zeros in the first `rows` rows; the number of rows, from the first, that are known completely; and the end of the
    known part of the first row, as an offset in its child."""
    from .numeric import np

    found: list[_Zeros] = []
    known, end = rows, 0
    for number, child in enumerate(own.children):
        mine = asked[:rows] if own.child is None else asked[:rows] & (own.child[:rows] == number)
        which = np.flatnonzero(mine)
        if len(which):
            zeros, complete, told = _zeros_in(child, own, which)
            found.append(zeros)
            known = min(known, complete)
            end = max(end, told)
    return found, known, end


def _zeros_in(child: Child, own: Columns, which: Any) -> tuple[_Zeros, int, int]:
    """The same for the rows with the numbers `which`, all of which are in `child`."""
    from .numeric import np

    place = own.offset[which]
    stop = place + own.length[which]
    in_order = np.argsort(place, kind="stable")
    low, high = place[in_order], np.maximum.accumulate(stop[in_order])
    apart = np.flatnonzero(low[1:] - high[:-1] > _GAP) + 1
    if len(apart) >= _MOST_APART:
        apart = apart[:0]
    spans = list(zip(low[np.append(0, apart)].tolist(), high[np.append(apart - 1, -1)].tolist(), strict=True))
    zero_start, zero_stop, flags, told = _holes(child, spans)
    # Whether the results of the child cover the span of each row up to the end of the row.
    span = np.empty(len(which), np.int64)
    span[in_order] = np.searchsorted(apart, np.arange(len(which)), "right")
    unknown = which[stop > told[span]]
    known = int(unknown[0]) if len(unknown) else len(own.start)

    first = np.searchsorted(zero_stop, place, "right")
    count = np.maximum(np.searchsorted(zero_start, stop, "left") - first, 0)
    # Many rows may have the same offset, with many holes: no more pieces than rows of two results. (A single row has at most
    # one piece more.)
    total = np.cumsum(count)
    if len(which) > 1 and total[-1] > 2 * limits.MAX_ROWS:
        enough = int(np.searchsorted(total, 2 * limits.MAX_ROWS, "right"))
        known = min(known, int(which[enough]))
        first, count, total = first[:enough], count[:enough], total[:enough]
    mine = np.repeat(np.arange(len(count)), count)
    theirs = np.arange(len(mine)) + np.repeat(first - (total - count), count)
    shift = (own.start[which] - place)[mine]
    begin = np.maximum(zero_start[theirs], place[mine]) + shift
    end = np.minimum(zero_stop[theirs], stop[mine]) + shift
    return _Zeros(which[mine], begin, end, flags[theirs]), known, int(told[0])


def _holes(child: Child, spans: list[tuple[int, int]]) -> tuple[Any, Any, Any, Any]:
    """The zeros in these spans of a child: start, stop, and its flags DATA and ZERO; and the end of the known part of each
    span. A part of the first span is known at least, and all spans if the results have no more rows than one result may."""
    from .extents import Extents
    from .numeric import np

    pieces: list[Extents] = []
    told: list[int] = []
    rows, size = 0, child.size
    for low, high in spans:
        at, inside = low, min(high, size)
        while at < inside and rows <= limits.MAX_ROWS:
            found = child.extents(at, inside - at)
            rows += len(found)
            pieces.append(found.where(zero=True))
            at = found.end
        if inside <= at < high:
            if child.grows:  # bytes past the end read as zero
                pieces.append(Extents.single(at, high - at, zero=True))
            at = high
        told.append(at)
    empty = np.empty(0, np.int64)
    start = np.concatenate([empty, *(piece.start for piece in pieces)])
    length = np.concatenate([empty, *(piece.length for piece in pieces)])
    flags = np.concatenate([empty.astype(np.uint8), *(piece.flags & np.uint8(DATA | ZERO) for piece in pieces)])
    return start, start + length, flags, np.array(told)


def _overlaid(own: Columns, zeros: list[_Zeros], known: int) -> Columns:
    """The first `known` rows of `own`, split where zeros begin and end."""
    from .numeric import np

    child = None if own.child is None else own.child[:known]
    start, length, flags, offset = (column[:known] for column in own[:4])
    own = own._replace(start=start, length=length, flags=flags, offset=offset, child=child)
    own_flags = stored(own).flags
    zeros = [part for part in zeros if len(part.row)]
    if not zeros:
        return own._replace(flags=own_flags)
    row, begin, stop, told = (np.concatenate(column) for column in zip(*zeros, strict=True))
    if int(row.max()) >= known:
        kept = row < known
        row, begin, stop, told = row[kept], begin[kept], stop[kept], told[kept]
    zero_flags = _with(flags[row], told)
    # Most zeros are whole rows, such as clusters, which need no split.
    whole = (begin == start[row]) & (stop == start[row] + length[row])
    own_flags = own_flags.copy()
    own_flags[row[whole]] = zero_flags[whole]
    cut = ~whole
    if not cut.any():
        return own._replace(flags=own_flags)
    row, begin, stop, zero_flags = row[cut], begin[cut], stop[cut], zero_flags[cut]
    # The offsets of changes, and the flags from there on: a zero ends, a row begins, a zero begins. Of several changes at one
    # offset the last counts: the end of a zero has no effect if another zero, or a row, begins there.
    at = np.concatenate((stop, start, begin))
    rows = np.concatenate((row, np.arange(known), row))
    new = np.concatenate((own_flags[row], own_flags, zero_flags))
    order = np.argsort(at, kind="stable")
    at, rows, new = at[order], rows[order], new[order]
    end = int(start[-1] + length[-1])
    counts = np.append(at[1:] != at[:-1], True) & (at < end)
    at, rows, new = at[counts], rows[counts], new[counts]
    alike = np.append(False, (rows[1:] == rows[:-1]) & (new[1:] == new[:-1]))
    at, rows, new = at[~alike], rows[~alike], new[~alike]
    offset = own.offset[rows]
    offset = np.where(offset >= 0, offset + (at - start[rows]), -1)
    child = None if child is None else child[rows]
    return own._replace(start=at, length=np.diff(at, append=end), flags=new, offset=offset, child=child)
