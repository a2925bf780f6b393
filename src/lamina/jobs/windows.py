"""Walking over the status of a whole image in windows, so that no answer needs much memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ..errors import Hint, LimitExceeded
from ..extents import Extents
from ..limits import align_down
from ..numeric import np
from .requests import NEAR

if TYPE_CHECKING:
    from ..image import Image
    from ..numeric import NDArray

#: The most rows that are held while a block of the grid is put together.
_MAX_HELD = 1 << 21


def windows(image: Image, begin: int, end: int, *, grid: int = 1) -> Iterator[Extents]:
    """The exact extents from `begin` to `end`, one piece after the other. Pieces meet at multiples of `grid`, a power of
    two, and each is what one answer of the image holds (see `Node.extents`): its memory is bounded by its rows, however long
    it is. Raises LimitExceeded where a single block of `grid` bytes has millions of extents."""
    held: Extents | None = None
    for found in image.root.windows(begin, end - begin):
        at = found.end
        held = found if held is None else Extents.concat([held, found])
        cut = end if at == end else align_down(at, grid)
        if held.begin < cut:
            yield held.clip(held.begin, cut)
            held = held.clip(cut, at) if cut < at else None
        elif len(held) > _MAX_HELD:
            raise LimitExceeded(
                f"the {grid} bytes from {held.begin} on have more than {_MAX_HELD} extents",
                path=image.filename,
                hint=Hint(
                    "use a smaller alignment, or the exact status",
                    command="use a smaller alignment, or the exact status (--exact)",
                ),
            )


def pairs(first: Image, second: Image, begin: int, end: int, *, grid: int = 1) -> Iterator[tuple[Extents, Extents]]:
    """The same of two images, which are both at least `end` bytes long: pieces of the two about the same bytes."""
    for mine in windows(first, begin, end, grid=grid):
        for theirs in windows(second, mine.begin, mine.end, grid=grid):
            yield mine.clip(theirs.begin, theirs.end), theirs


def stretches(
    kind: NDArray[np.int64],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    *,
    near: Collection[int] = (),
) -> Iterator[tuple[int, int, int]]:
    """(kind, start, length) of rows that do not overlap, in order, with neighbours of one kind that touch made one,
    wherever their bytes lie: what is worth one request. So are neighbours of the kinds `near` that are at most `NEAR` bytes
    apart."""
    order = np.argsort(start, kind="stable")
    kind, start = kind[order], start[order]
    end = start + length[order]
    if not len(start):
        return iter(())
    apart = start[1:] - end[:-1]
    if near:
        apart[(apart <= NEAR) & np.isin(kind[1:], tuple(near))] = 0
    first = np.flatnonzero(np.concatenate(([True], (kind[1:] != kind[:-1]) | (apart != 0))))
    last = np.append(first[1:], len(start)) - 1
    return zip(kind[first].tolist(), start[first].tolist(), (end[last] - start[first]).tolist(), strict=True)
