"""The plan of a conversion: what the job does with each range of the disk, from the exact extents of source and target.

Only `convert_transfer` uses it, in its reading thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ..extents import Extents
from ..format_node import FormatNode
from ..limits import KIB, MAX_SIZE, MIB, is_power_of_two
from ..numeric import np
from .beneath import Backing, Layer, beneath_filters
from .requests import NEAR
from .sharing import FileRange, Offloader, without
from .windows import pairs, stretches, windows

if TYPE_CHECKING:
    from ..image import Image
    from ..numeric import NDArray
    from .rate import RateLimit

#: The length of the buffers of the job, which no write crosses.
BUFFER = 2 * MIB
#: The block size of the search for zeros, in bytes; smaller if shorter runs are to become holes.
_GRANULE = 4 * KIB

#: Which copies are left to the operating system: none, those that share blocks, or all that it can do.
Offload = Literal["", "share", "copy"]

# What to do with a range of the disk. ZERO: zero the target. STORED: read the source. OVER_ZERO: the same, and the target
# reads as zero already. COMPARED: read the source and the backing file. IN_BACKING: read the backing file, and zero the
# target where it is not zero. From FILE_RANGES on: offload the copy of one file range.
STORED, ZERO, OVER_ZERO, COMPARED, IN_BACKING, FILE_RANGES = range(6)


class Plan:
    """What to do with each range of the disk, for a copy of `source` to `target`. `blank`, `smallest_hole`, `below` and
    `offload` as for `convert`; `rate` limits what is offloaded.

    `hole`: the shortest run of zeros that is not written as data, 0 for no search; `granule`: the block size of that search;
    `block`: ranges begin and end at multiples of it, except at the end of the disk."""

    def __init__(
        self,
        source: Image,
        target: Image,
        *,
        blank: bool,
        smallest_hole: int,
        below: Backing | None,
        offload: Offload,
        rate: RateLimit | None = None,
    ) -> None:
        # What is compared must be read.
        reads = not offload or (below is not None and below.image is not None)
        self.source, self.target, self.blank, self.below = source, target, blank, below
        self.offloader = None if reads else Offloader(source, target, only_share=offload == "share", rate=rate)
        self.hole = smallest_hole
        self.granule = min(_GRANULE, 1 << max(smallest_hole.bit_length() - 1, 3)) if smallest_hole else 0
        # Of a target that takes whole blocks (one that packs them, say) none is written in two halves.
        self.block = min(target.alignment, BUFFER) if self.offloader is None else 1
        if below is not None and below.image is not None:
            # What differs is found, and written, in whole clusters of the target.
            self.block = max(self.block, _unit(target))
        if smallest_hole and self.block > 1:
            self.hole, self.granule = max(smallest_hole, self.block), max(self.granule, self.block)
        # Known zeros between two reads are found again by the search, unless they are shorter than it finds. In a format with
        # smaller clusters they would take storage.
        node = beneath_filters(target.node)
        small = isinstance(node, FormatNode) and node.limits.zero_alignment < self.granule
        self._joins = self.hole > 0 and not small
        self._layer = Layer(
            source, below.depth if below is not None else None, moves=below is None or below.changed is None
        )
        #: The file ranges of the part of the plan that `ranges` yielded last.
        self.file_ranges: list[FileRange] = []

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(kind, start, length) of all that is to be done, in order. A kind of FILE_RANGES + n means `file_ranges[n]`."""
        below = self.below
        compared = below is not None and below.image is not None
        for exact, there in self._pieces(compared):
            self._layers = self._layer.above() if self.hole else MAX_SIZE
            if below is not None:
                exact = below.wanted(exact, self._layers) if below.replaces else below.marked(exact)
            found = exact.align(self.block) if self.block > 1 else exact
            yield from self._over_content(found, there) if compared else self._over_layers(found, there)
        if below is not None and not below.keeps_rest:
            # Where the new disk is longer than the source, what a longer backing file has there is hidden.
            for rest in windows(self.target, self.source.size, self.target.size):
                shown = rest.where(zero=False)
                kinds = np.full(len(shown), IN_BACKING if compared else ZERO)
                yield from stretches(kinds, shown.start, shown.length)

    def _pieces(self, compared: bool) -> Iterator[tuple[Extents, Extents | None]]:
        """What the source says, and the target of the same bytes where that matters, piece by piece."""
        size = self.source.size
        if self.hole and (compared or not self.blank):
            below = self.below
            there = below.image if below is not None and below.replaces and below.image is not None else self.target
            yield from pairs(self.source, there, 0, size, grid=self.block)
            return
        for exact in windows(self.source, 0, size, grid=self.block):
            yield exact, None

    def _over_layers(self, found: Extents, there: Extents | None) -> Iterator[tuple[int, int, int]]:
        """The same for a part of the disk, of which the target has what the layers beneath the first `depth` own."""
        below, layers = self.below, self._layers
        held = found.where(zero=False) if self.hole else found
        zero = over_zero = Extents.empty(found.begin)
        if there is not None:
            # What reads as zero there already need not be made so.
            zero = found.where(zero=True).intersect(there.where(zero=False))
            if self.offloader is None and below is None:
                blocks = there.align(BUFFER)  # so that no read becomes shorter for it
                over_zero = held.intersect(blocks.where(zero=True))
                held = held.intersect(blocks.where(zero=False))
        wanted, owned = held.depth < layers, zero.depth < layers
        near: tuple[int, ...] = ()
        if self._joins and self.offloader is None and below is None:
            near = (STORED, OVER_ZERO)
            owned &= _apart(zero, held)
        self.file_ranges = file_ranges = self.offloader.file_ranges(held, wanted) if self.offloader is not None else []
        start, length = without(file_ranges, held.start[wanted], held.length[wanted])
        # Each file range has a kind of its own, so that it is not joined with a neighbour.
        kinds = (
            np.full(len(start), STORED),
            np.full(len(over_zero), OVER_ZERO),
            np.full(np.count_nonzero(owned), ZERO),
            np.arange(len(file_ranges)) + FILE_RANGES,
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
            return stretches(np.full(len(found), COMPARED), found.start, found.length)
        there = there.align(self.block)
        mine, theirs = found.where(zero=False), there.where(zero=False)
        parts = {
            COMPARED: mine.intersect(theirs),
            OVER_ZERO: mine.intersect(there.where(zero=True)),
            IN_BACKING: found.where(zero=True).intersect(theirs),
        }
        if self.below is not None and self.below.replaces:
            parts = {kind: part.where(depth=0) for kind, part in parts.items()}
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
    return min(unit, BUFFER) if is_power_of_two(unit) else 64 * KIB
