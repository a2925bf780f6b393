"""The filter `quorum`: several copies of one disk, with a vote on their content."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from ..errors import BlockIOError, LaminaError, OptionError
from ..limits import MAX_SIZE, Limits, align_down, align_up
from ..node import FUA, NO_FALLBACK, Node, bounded
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents
    from ..graph import Opener

T = TypeVar("T")

#: The maximum number of stale ranges of each copy.
_MAX_RANGES = 4096
#: The size in bytes of the blocks on which copies that differ vote separately.
_BLOCK = 512


class Quorum(Node):
    """One disk stored in several `children` of equal size. A read reads all copies and returns, for each block of 512 bytes,
    the content on which at least `vote_threshold` copies agree; without such a content it fails with EIO. A write goes to
    all copies and succeeds if it succeeds on `vote_threshold` of them. Errors and differences are logged under
    `lamina.quorum`. With `rewrite_corrupted` copies that differ are overwritten with the content of the majority; the
    threshold must then be more than half of the copies.

    If a write succeeds although it failed on one copy, the blocks of that copy are stale. A stale block has no vote until it
    is written again or found equal to the content of the other copies. (The node records stale blocks while it is open.)

    Discards are refused, since the copies may read differently after a discard. Thread-safe: the request path orders
    overlapping requests, so all copies get them in the same order."""

    driver: ClassVar[str] = "quorum"
    schema: ClassVar[Schema] = Schema(
        "quorum",
        [
            Option(
                "children", "list", "the copies, of equal size", required=True, items=Option("child", "node", "a copy")
            ),
            Option("vote-threshold", "int", "the number of copies that must agree", required=True, minimum=1),
            Option(
                "rewrite-corrupted",
                "bool",
                "overwrite copies that differ; needs a vote of more than half",
                default=False,
            ),
        ],
    )
    # The edges to the copies emulate FUA where a copy does not support it.
    supported_flags = FUA

    def __init__(
        self,
        children: list[Child],
        vote_threshold: int,
        *,
        rewrite_corrupted: bool = False,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        """Raises OptionError for an invalid threshold and for copies of different sizes."""
        super().__init__(name=name, read_only=read_only)
        if not 1 <= vote_threshold <= len(children):
            raise OptionError(
                f"vote-threshold is {vote_threshold}, but there are {len(children)} children",
                hint=f"it takes 1 to {len(children)}",
            )
        if rewrite_corrupted and vote_threshold * 2 <= len(children):
            raise OptionError(
                f"rewrite-corrupted needs a majority, and {vote_threshold} of {len(children)} votes are none",
                hint=f"set vote-threshold={len(children) // 2 + 1} or more, or omit rewrite-corrupted",
            )
        self.children: dict[str, Child] = {f"children.{number}": child for number, child in enumerate(children)}
        #: The stale ranges of each copy, which are older than acknowledged writes.
        self._stale = {role: RangeSet() for role in self.children}
        #: The ranges that were changed since the last flush, and may not be on stable storage.
        self._unflushed = RangeSet()
        self._flushing = threading.Lock()  # held where that set is exchanged or filled
        self._copies = tuple(children)
        self._threshold = vote_threshold
        self._rewrite = rewrite_corrupted
        self.graph_changed()

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        children = [opener.child(f"children.{number}", spec) for number, spec in enumerate(options["children"])]
        threshold, rewrite = options["vote-threshold"], options["rewrite-corrupted"]
        return cls(children, threshold, rewrite_corrupted=rewrite, name=opener.name, read_only=opener.read_only)

    def reopen(self, read_only: bool) -> None:
        self.reopen_over(self._copies, read_only)

    def graph_changed(self) -> None:
        """Raises OptionError if the sizes of the copies differ."""
        sizes = {child.size for child in self._copies}
        if len(sizes) > 1:
            raise OptionError(
                f"the sizes of the children differ: {sorted(sizes)} bytes", hint="resize them to one size"
            )
        self._size = sizes.pop()

    @property
    def size(self) -> int:
        return self._size

    @property
    def limits(self) -> Limits:
        """The largest request alignment of all copies. The edges to the copies enforce their other limits."""
        return Limits(request_alignment=max(child.node.limits.request_alignment for child in self._copies))

    @property
    def serialise(self) -> int:
        return _BLOCK

    def read_into(self, offset: int, view: memoryview) -> None:
        def read(child: Child) -> bytes:
            buffer = bytearray(len(view))
            child.read_into(offset, memoryview(buffer))
            return bytes(buffer)

        found = self._request_all(read, "read", offset, len(view))
        contents = list(found.values())
        end = offset + len(view)
        stale = [role for role in found if self._stale[role].overlaps(offset, end)]
        if not stale and contents.count(contents[0]) == len(contents):
            view[:] = contents[0]
            return
        for lo in range(offset - offset % _BLOCK, end, _BLOCK):
            first, last = max(lo, offset) - offset, min(lo + _BLOCK, end) - offset
            votes = {role: content[first:last] for role, content in found.items()}
            old = [role for role in stale if self._stale[role].overlaps(lo, lo + _BLOCK)]
            counts = Counter(vote for role, vote in votes.items() if role not in old)
            winner, count = counts.most_common(1)[0] if counts else (b"", 0)
            if count < self._threshold:
                raise BlockIOError(
                    f"only {count} of {len(self._copies)} copies agree, and {self._threshold} are needed",
                    node=self.name,
                    operation="read",
                    offset=offset + first,
                    length=last - first,
                    hint="compare the copies and replace those that are corrupt",
                )
            view[first:last] = winner
            losers = [role for role, vote in votes.items() if vote != winner]
            if losers:
                self._handle_differences(losers, offset + first, view[first:last])
            for role in set(old).difference(losers) if not self.read_only else ():
                self._mark_current(role, offset + first, offset + last)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._change(lambda child: child.write(offset, view, flags), "write", offset, len(view))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if flags & NO_FALLBACK:
            # If a later copy refused, the earlier ones would already be changed.
            raise self.refuse("fast zero")
        self._change(lambda child: child.zero(offset, length, flags), "zero", offset, length)

    def flush(self) -> None:
        """A copy whose flush fails may have lost whatever was not flushed before: those ranges become stale in it. Where the
        flush fails as a whole nothing was promised, and the next flush promises it."""
        written = RangeSet()
        try:
            with self._flushing:
                written, self._unflushed = self._unflushed, RangeSet()
            done = self._request_all(lambda child: child.flush(), "flush")
            for role in self.children.keys() - done:
                # Requests in progress count as well: storage reports a loss once.
                self._stale[role].update(written)
                self._stale[role].update(self._unflushed)
        except BaseException:  # an interrupt as well: the next flush asks about these ranges again
            with self._flushing:
                self._unflushed.update(written)
            raise

    def truncate(self, size: int) -> None:
        done = self._request_all(lambda child: child.truncate(size), "truncate")
        for role in self.children.keys() - done:
            self._stale[role].add(min(size, self._size), MAX_SIZE)
        self._size = size

    def extents(self, offset: int, length: int) -> Extents:
        """Data where any copy has data, zero where all are zero. A host offset remains only if all copies have equal
        extents."""
        results = self._request_all(lambda child: child.extents(offset, length), "extents", offset, length)
        end = min(found.end for found in results.values())
        copies = [found.clip(offset, end) for found in results.values()]
        first = copies[0]
        return first if all(found == first for found in copies) else _merged(copies)

    def reads_zero(self, offset: int, length: int) -> bool:
        return all(child.reads_zero(offset, length) for child in self._copies)

    def _request_all(
        self, request: Callable[[Child], T], operation: str, offset: int | None = None, length: int | None = None
    ) -> dict[str, T]:
        """Execute a request on all copies. Returns the results of the copies that succeed; raises BlockIOError for fewer
        successes than the threshold."""
        found: dict[str, T] = {}
        first: LaminaError | None = None
        for role, child in self.children.items():
            try:
                found[role] = request(child)
            except LaminaError as error:
                first = first or error
                self.warn("%s of %s failed: %s", operation, role, error)
        if first is not None and len(found) < self._threshold:
            raise BlockIOError(
                f"only {len(found)} of {len(self._copies)} copies succeed, and {self._threshold} are needed: {first.message}",
                errno=first.errno or 5,
                node=self.name,
                operation=operation,
                offset=offset,
                length=length,
            ) from first
        return found

    def _change(self, request: Callable[[Child], None], operation: str, offset: int, length: int) -> None:
        """Execute a request that changes a range on all copies. The range becomes stale in copies on which it fails."""
        end = offset + length
        with self._flushing:
            self._unflushed.add(align_down(offset, _BLOCK), align_up(end, _BLOCK))
        done = self._request_all(request, operation, offset, length)
        for role in done:
            self._mark_current(role, offset, end)
        current = [role for role in done if not self._stale[role].overlaps(offset, end)]
        if len(current) < self._threshold:
            raise BlockIOError(
                f"only {len(current)} of {len(self._copies)} copies are up to date there, and {self._threshold} are needed",
                node=self.name,
                operation=operation,
                offset=offset,
                length=length,
                hint=f"write complete blocks of {_BLOCK} bytes, or replace the stale copies",
            )
        for role in self.children.keys() - done:
            self._stale[role].add(align_down(offset, _BLOCK), align_up(end, _BLOCK))

    def _mark_current(self, role: str, start: int, end: int) -> None:
        """Clear the stale blocks of a copy that are completely inside the range; the last block of the disk may be
        incomplete."""
        stale = self._stale[role]
        if stale.overlaps(start, end):
            stale.remove(
                align_up(start, _BLOCK), align_up(end, _BLOCK) if end == self._size else align_down(end, _BLOCK)
            )

    def _handle_differences(self, roles: list[str], offset: int, majority: memoryview) -> None:
        """Log that copies differ from the content of the majority, and overwrite them if the option says so."""
        for role in roles:
            self.warn("%s differs in the %d bytes at offset %d", role, len(majority), offset)
            if self._rewrite and not self.read_only:
                try:
                    self.children[role].write(offset, majority)
                except LaminaError as error:
                    self.warn("%s could not be overwritten: %s", role, error)
                else:
                    self._mark_current(role, offset, offset + len(majority))


class RangeSet:
    """A set of bytes, stored as at most `_MAX_RANGES` ranges. Beyond that limit adjacent ranges are joined, including the
    bytes between them. Any number of threads may query it while one thread changes it."""

    def __init__(self) -> None:
        #: In order, not adjacent. Replaced as a whole, so that other threads never see an incomplete change.
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._mutex = threading.Lock()

    def overlaps(self, start: int, end: int) -> bool:
        """Whether the set contains a byte of the range."""
        ranges = self._ranges
        if not ranges:
            return False
        at = bisect_left(ranges, (end,)) - 1  # the last range that begins before `end`
        return at >= 0 and ranges[at][1] > start

    def add(self, start: int, end: int) -> None:
        with self._mutex:
            apart = [(lo, hi) for lo, hi in self._ranges if hi < start or lo > end]
            near = [(lo, hi) for lo, hi in self._ranges if hi >= start and lo <= end]
            apart.append((min([start, *(lo for lo, _ in near)]), max([end, *(hi for _, hi in near)])))
            apart.sort()
            if len(apart) > _MAX_RANGES:
                pairs = zip(apart[::2], apart[1::2], strict=False)
                apart = [(lo, hi) for (lo, _), (_, hi) in pairs] + apart[len(apart) - len(apart) % 2 :]
            self._ranges = tuple(apart)

    def update(self, other: RangeSet) -> None:
        """Add the bytes of another set."""
        for start, end in other._ranges:
            self.add(start, end)

    def remove(self, start: int, end: int) -> None:
        if start >= end:
            return
        with self._mutex:
            left: list[tuple[int, int]] = []
            for lo, hi in self._ranges:
                left += [(lo, min(hi, start))] * (lo < start) + [(max(lo, end), hi)] * (hi > end)
            self._ranges = tuple((lo, hi) for lo, hi in left if lo < hi)


def _merged(copies: list[Extents]) -> Extents:
    """Extents that are correct for all copies: data where any is data, zero where all are zero."""
    import numpy as np

    from ..extents import ZERO, Extents

    edges = np.unique(np.concatenate([found.start for found in copies]))
    rows = [np.searchsorted(found.start, edges, "right") - 1 for found in copies]
    # ZERO is inverted before and after, so that "or" acts as "and" on it.
    flags = np.bitwise_or.reduce([found.flags[row] ^ ZERO for found, row in zip(copies, rows, strict=True)]) ^ ZERO
    depth = np.minimum.reduce([found.depth[row] for found, row in zip(copies, rows, strict=True)])
    length = np.diff(np.append(edges, copies[0].end))
    return bounded(Extents.from_columns(edges, length, flags.astype(np.uint8), depth=depth).coalesce())
