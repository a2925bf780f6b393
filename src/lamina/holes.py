"""Data in a hole is zero: what a format stores where the file has a hole, or ends, reads as zero, and its status says so.

One rule above the mapping of every format (`format_node`), for one small stretch and for columns alike. The flags of such a
stretch are ZERO and DATA: zero for those who read or copy it, stored for those who count what is stored; it keeps its offset.

A child is asked for its status once for a whole answer, and both are intersected as columns. Only stretches that lie far
apart in it are asked about one by one.
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

#: What lies between two stretches of a file that are further apart than this is not asked about.
_GAP = MIB
#: Rows that are asked for to see whether there is a hole at all.
_QUICK = 4
#: Of so many stretches that lie apart each is asked about; where there are more, all from the first to the last at once.
_MOST_APART = 1 << 10


def lies_in_hole(child: Child, offset: int, length: int) -> bool:
    """Whether these bytes of a child are known to read as zero. So are those past its end, where its edge allows to read
    them."""
    return (child.grows or offset + length <= child.size) and child.reads_zero(offset, length)


def runs_with_holes(flags: int, child: Child, offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """(flags, length) of the first of these bytes, which a format maps to `offset` of `child` with these flags, up to `most`
    runs: as `with_holes`, in plain Python."""
    inside = min(child.size - offset, length)
    bare = ZERO | PRESENT if flags == PRESENT else flags | ZERO  # in a hole, where the child stores nothing
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
    """`own`, where nobody asked the children: what has no flag but PRESENT is DATA."""
    from .numeric import np

    if PRESENT not in own.flags.tobytes():  # faster than a comparison in numpy
        return own
    return own._replace(flags=np.where(own.flags == PRESENT, np.uint8(DATA | PRESENT), own.flags))


def with_holes(own: Columns) -> Columns:
    """`own`, where data that lies in a hole of its child is ZERO too, and what has no flag but PRESENT gets those of the
    child: DATA, ZERO or both. Or a part of it, from its beginning: neither time nor memory depend on how many holes there
    are."""
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
            # One row is longer than what its child tells at once: the part that it has told.
            part = np.array([end - int(own.offset[0])])
            return _overlaid(own._replace(length=part), zeros, 1)
        # Much of the file was looked at for little. Fewer rows lie closer together.
        rows = max(min(rows // 2, _MOST_APART), 1)


def _at_once(own: Columns, which: Any) -> Columns | None:
    """The answer where one question in plain Python tells it, and no row is to be cut: all that the rows numbered `which`
    store lies in a few stretches of the file, each of which is a hole or is none. None where that is not so."""
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
    """The flags `own` of rows, where the child said `told`, DATA, ZERO or both, of the bytes of each; 0: it was not asked."""
    from .numeric import np

    flat = (own == PRESENT) & (told != 0)
    return np.where(flat, own | told, own | (told & np.uint8(ZERO)))


class _Zeros(NamedTuple):
    """Stretches of the disk that read as zero, each inside the row number `row`, and what the child says there: ZERO, or
    DATA and ZERO."""

    row: Any
    start: Any
    stop: Any
    told: Any


def _zeros(own: Columns, asked: Any, rows: int) -> tuple[list[_Zeros], int, int]:
    """What is zero in the first `rows` rows; how many rows, from the first on, are known in full; and up to where the first
    of them is known, as an offset in its child."""
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
    """The same for the rows numbered `which`, all of which lie in `child`."""
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
    # Of each row, whether the child told all of its span up to the end of the row.
    span = np.empty(len(which), np.int64)
    span[in_order] = np.searchsorted(apart, np.arange(len(which)), "right")
    unknown = which[stop > told[span]]
    known = int(unknown[0]) if len(unknown) else len(own.start)

    first = np.searchsorted(zero_stop, place, "right")
    count = np.maximum(np.searchsorted(zero_start, stop, "left") - first, 0)
    # Many rows may lie in one place, with many holes: no more pieces than two answers have. (A single row has few more.)
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
    """What reads as zero in these spans of a child: start, stop, and its flags DATA and ZERO; and of each span, up to where
    that is known: the first in part at least, and all of them if they are told in as many rows as one answer has."""
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
            if child.grows:  # what is read past the end is zero
                pieces.append(Extents.single(at, high - at, zero=True))
            at = high
        told.append(at)
    empty = np.empty(0, np.int64)
    start = np.concatenate([empty, *(piece.start for piece in pieces)])
    length = np.concatenate([empty, *(piece.length for piece in pieces)])
    flags = np.concatenate([empty.astype(np.uint8), *(piece.flags & np.uint8(DATA | ZERO) for piece in pieces)])
    return start, start + length, flags, np.array(told)


def _overlaid(own: Columns, zeros: list[_Zeros], known: int) -> Columns:
    """The first `known` rows of `own`, cut where something in them begins or ends to read as zero."""
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
    # Most zeros are whole rows, such as clusters, and nothing is to be cut for them.
    whole = (begin == start[row]) & (stop == start[row] + length[row])
    own_flags = own_flags.copy()
    own_flags[row[whole]] = zero_flags[whole]
    cut = ~whole
    if not cut.any():
        return own._replace(flags=own_flags)
    row, begin, stop, zero_flags = row[cut], begin[cut], stop[cut], zero_flags[cut]
    # Where something changes, and what holds from there: a row begins, a zero begins, a zero ends. Of several at one place
    # the last counts: a zero that ends where another begins, or its row ends, says nothing.
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
