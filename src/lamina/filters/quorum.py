"""The filter `quorum`: several copies of one disk, and what most of them say."""

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

#: Ranges that are remembered of each copy.
_MOST = 4096
#: Where copies differ, each block of this many bytes has a vote of its own.
_BLOCK = 512


class Quorum(Node):
    """One disk in several `children`, all equally long. A read asks all of them, and gives, block by block of 512 bytes,
    what at least `vote_threshold` say; if there is nothing that so many say, it fails with EIO. A write goes to all, and
    succeeds if it does on `vote_threshold` of them. Copies that fail or disagree are logged under `lamina.quorum`; with
    `rewrite_corrupted` those that disagree are written over with what most say, which must be more than half of all.

    A copy on which a write failed that succeeded as a whole holds old bytes there. It has no vote about these blocks until
    they are written again, or found equal to what the others say. (That is remembered as long as the node is open.)

    Discards are left out: what the copies read as then could differ with right. Safe for any number of threads: requests
    that overlap are ordered by the request path, so all copies see them in one order."""

    driver: ClassVar[str] = "quorum"
    schema: ClassVar[Schema] = Schema(
        "quorum",
        [
            Option("children", "list", "the copies", required=True, items=Option("child", "node", "a copy")),
            Option("vote-threshold", "int", "how many must agree", required=True, minimum=1),
            Option("rewrite-corrupted", "bool", "write over copies that disagree", default=False),
        ],
    )
    # The edges to the copies do what these cannot.
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
        """OptionError if the threshold cannot be reached, or the copies are not equally long."""
        super().__init__(name=name, read_only=read_only)
        if not 1 <= vote_threshold <= len(children):
            raise OptionError(
                f"{vote_threshold} votes of {len(children)} children cannot be",
                hint="vote-threshold is from 1 to their number",
            )
        if rewrite_corrupted and vote_threshold * 2 <= len(children):
            raise OptionError(
                f"{vote_threshold} votes of {len(children)} are no majority, and nothing is written over for them",
                hint=f"vote-threshold={len(children) // 2 + 1} or more, or leave out rewrite-corrupted",
            )
        self.children = {f"children.{number}": child for number, child in enumerate(children)}
        #: What of each copy is older than what was acknowledged.
        self._stale = {role: Stretches() for role in self.children}
        self._copies = tuple(children)
        self._threshold = vote_threshold
        self._rewrite = rewrite_corrupted
        self.graph_changed()

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        children = [opener.child(f"children.{number}", spec) for number, spec in enumerate(options["children"])]
        threshold, rewrite = options["vote-threshold"], options["rewrite-corrupted"]
        return cls(children, threshold, rewrite_corrupted=rewrite, name=opener.name, read_only=opener.read_only)

    def graph_changed(self) -> None:
        """OptionError if the copies are not equally long."""
        sizes = {child.size for child in self._copies}
        if len(sizes) > 1:
            raise OptionError(f"the children are not equally long: {sorted(sizes)} bytes", hint="make them so")
        self._size = sizes.pop()

    @property
    def size(self) -> int:
        return self._size

    @property
    def limits(self) -> Limits:
        """The coarsest request alignment of all copies; their other limits are left to the edges below."""
        return Limits(request_alignment=max(child.node.limits.request_alignment for child in self._copies))

    @property
    def serialise(self) -> int:
        return _BLOCK

    def read_into(self, offset: int, view: memoryview) -> None:
        def read(child: Child) -> bytes:
            buffer = bytearray(len(view))
            child.read_into(offset, memoryview(buffer))
            return bytes(buffer)

        found = self._ask(read, "read", offset, len(view))
        contents = list(found.values())
        end = offset + len(view)
        stale = [role for role in found if self._stale[role].touch(offset, end)]
        if not stale and contents.count(contents[0]) == len(contents):
            view[:] = contents[0]
            return
        for lo in range(offset - offset % _BLOCK, end, _BLOCK):
            first, last = max(lo, offset) - offset, min(lo + _BLOCK, end) - offset
            votes = {role: content[first:last] for role, content in found.items()}
            old = [role for role in stale if self._stale[role].touch(lo, lo + _BLOCK)]
            counts = Counter(vote for role, vote in votes.items() if role not in old)
            winner, count = counts.most_common(1)[0] if counts else (b"", 0)
            if count < self._threshold:
                raise BlockIOError(
                    f"only {count} of {len(self._copies)} copies agree, and {self._threshold} must",
                    node=self.name,
                    operation="read",
                    offset=offset + first,
                    length=last - first,
                    hint="compare the copies, and replace the bad ones",
                )
            view[first:last] = winner
            losers = [role for role, vote in votes.items() if vote != winner]
            if losers:
                self._outvoted(losers, offset + first, view[first:last])
            for role in set(old).difference(losers) if not self.read_only else ():
                self._is_good(role, offset + first, offset + last)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._change(lambda child: child.write(offset, view, flags), "write", offset, len(view))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if flags & NO_FALLBACK:
            # One copy could do it and the next refuse, and then a byte was touched.
            raise self.refuse("fast zero")
        self._change(lambda child: child.zero(offset, length, flags), "zero", offset, length)

    def flush(self) -> None:
        self._ask(lambda child: child.flush(), "flush")

    def truncate(self, size: int) -> None:
        done = self._ask(lambda child: child.truncate(size), "truncate")
        for role in self.children.keys() - done:
            self._stale[role].add(min(size, self._size), MAX_SIZE)
        self._size = size

    def extents(self, offset: int, length: int) -> Extents:
        """Data where any copy has data, zero only where all are; a place in a file only if all say the same."""
        answers = list(self._ask(lambda child: child.extents(offset, length), "extents", offset, length).values())
        end = min(answer.end for answer in answers)
        answers = [answer.clip(offset, end) for answer in answers]
        first = answers[0]
        return first if all(answer == first for answer in answers) else _merged(answers)

    def reads_zero(self, offset: int, length: int) -> bool:
        return all(child.reads_zero(offset, length) for child in self._copies)

    def _ask(
        self, request: Callable[[Child], T], operation: str, offset: int | None = None, length: int | None = None
    ) -> dict[str, T]:
        """What the copies answer, of those that do; the first error if too few do."""
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
                f"only {len(found)} of {len(self._copies)} copies could do it, and {self._threshold} must: {first.message}",
                errno=first.errno or 5,
                node=self.name,
                operation=operation,
                offset=offset,
                length=length,
            ) from first
        return found

    def _change(self, request: Callable[[Child], None], operation: str, offset: int, length: int) -> None:
        """Have all copies make these bytes what the request says. Where it fails on some and succeeds as a whole, those have
        no vote about them until they are written again."""
        done = self._ask(request, operation, offset, length)
        end = offset + length
        for role in done:
            self._is_good(role, offset, end)
        good = [role for role in done if not self._stale[role].touch(offset, end)]
        if len(good) < self._threshold:
            raise BlockIOError(
                f"only {len(good)} of {len(self._copies)} copies hold all that was written there, and {self._threshold} must",
                node=self.name,
                operation=operation,
                offset=offset,
                length=length,
                hint=f"write whole blocks of {_BLOCK} bytes, or replace the bad copies",
            )
        for role in self.children.keys() - done:
            self._stale[role].add(align_down(offset, _BLOCK), align_up(end, _BLOCK))

    def _is_good(self, role: str, start: int, end: int) -> None:
        """This copy now holds what was acknowledged, in the blocks that lie wholly in the range, or reach to the end of the
        disk."""
        stale = self._stale[role]
        if stale.touch(start, end):
            stale.remove(
                align_up(start, _BLOCK), align_up(end, _BLOCK) if end == self._size else align_down(end, _BLOCK)
            )

    def _outvoted(self, roles: list[str], offset: int, right: memoryview) -> None:
        for role in roles:
            self.warn("%s disagrees about the %d bytes at %d", role, len(right), offset)
            if self._rewrite and not self.read_only:
                try:
                    self.children[role].write(offset, right)
                except LaminaError as error:
                    self.warn("%s could not be written over: %s", role, error)
                else:
                    self._is_good(role, offset, offset + len(right))


class Stretches:
    """Ranges of bytes, joined where they touch. At most `_MOST` of them: of more, neighbours become one with what lies
    between. Any number of threads may ask while one changes it."""

    def __init__(self) -> None:
        #: In order. Replaced as a whole, so that nobody sees a change half done.
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._mutex = threading.Lock()

    def touch(self, start: int, end: int) -> bool:
        """Whether a byte of the range is in it."""
        ranges = self._ranges
        if not ranges:
            return False
        at = bisect_left(ranges, (end,)) - 1  # the last that begins before `end`
        return at >= 0 and ranges[at][1] > start

    def add(self, start: int, end: int) -> None:
        with self._mutex:
            apart = [(lo, hi) for lo, hi in self._ranges if hi < start or lo > end]
            near = [(lo, hi) for lo, hi in self._ranges if hi >= start and lo <= end]
            apart.append((min([start, *(lo for lo, _ in near)]), max([end, *(hi for _, hi in near)])))
            apart.sort()
            if len(apart) > _MOST:
                pairs = zip(apart[::2], apart[1::2], strict=False)
                apart = [(lo, hi) for (lo, _), (_, hi) in pairs] + apart[len(apart) - len(apart) % 2 :]
            self._ranges = tuple(apart)

    def remove(self, start: int, end: int) -> None:
        if start >= end:
            return
        with self._mutex:
            left: list[tuple[int, int]] = []
            for lo, hi in self._ranges:
                left += [(lo, min(hi, start))] * (lo < start) + [(max(lo, end), hi)] * (hi > end)
            self._ranges = tuple((lo, hi) for lo, hi in left if lo < hi)


def _merged(answers: list[Extents]) -> Extents:
    """One cautious answer for several about the same bytes."""
    import numpy as np

    from ..extents import ZERO, Extents

    edges = np.unique(np.concatenate([answer.start for answer in answers]))
    rows = [np.searchsorted(answer.start, edges, "right") - 1 for answer in answers]
    # ZERO is flipped before and after, so that "or" is "and" for it.
    flags = np.bitwise_or.reduce([answer.flags[row] ^ ZERO for answer, row in zip(answers, rows, strict=True)]) ^ ZERO
    depth = np.minimum.reduce([answer.depth[row] for answer, row in zip(answers, rows, strict=True)])
    length = np.diff(np.append(edges, answers[0].end))
    return bounded(Extents.from_columns(edges, length, flags.astype(np.uint8), depth=depth).coalesce())
