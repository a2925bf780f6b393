"""The filter `concat`: several disks, one after the other, as one disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import OptionError
from ..limits import MAX_SIZE
from ..node import FUA, NO_FALLBACK, Node, plain
from ..pending import Pending
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents, HostFile
    from ..graph import Opener
    from ..status import Status


class Concat(Node):
    """The disks `children`, of any sizes: each begins where the one before ends. A request that touches several of them is
    carried out one disk after the other, and may fail after the first. The size is fixed. Stateless and thread-safe."""

    driver: ClassVar[str] = "concat"
    schema: ClassVar[Schema] = Schema(
        "concat",
        [
            Option(
                "children",
                "list",
                "the disks in order, of any formats and sizes",
                required=True,
                items=Option("child", "node", "a disk"),
            )
        ],
    )
    # The edges to the disks emulate FUA where a disk does not support it.
    supported_flags = FUA
    widens_zero = False

    def __init__(self, children: Sequence[Child], *, name: str | None = None, read_only: bool = False) -> None:
        """Raises OptionError if there is no child, and for a size that no disk can have."""
        super().__init__(name=name, read_only=read_only)
        if not children:
            raise OptionError("concat has no children", hint="give at least one")
        self.children: dict[str, Child] = {f"children.{number}": child for number, child in enumerate(children)}
        self._disks = tuple(children)
        self.graph_changed()

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        children = [opener.child(f"children.{number}", spec) for number, spec in enumerate(options["children"])]
        return cls(children, name=opener.name, read_only=opener.read_only)

    def reopen(self, read_only: bool) -> None:
        self.reopen_over(self._disks, read_only)

    def graph_changed(self) -> None:
        """Raises OptionError for a size that no disk can have."""
        self._ends: list[int] = []
        end = 0
        for disk in self._disks:
            end += disk.size
            self._ends.append(end)
        if end > MAX_SIZE:
            raise OptionError(f"the disks have {end} bytes together", hint=f"a disk has at most {MAX_SIZE}")

    @property
    def size(self) -> int:
        return self._ends[-1]

    @property
    def filename(self) -> str:
        return " + ".join(disk.node.filename for disk in self._disks)

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        for disk, at, lo, hi in self._parts(offset, len(view)):
            disk.read_into(at, view[lo:hi])

    @plain
    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        for disk, at, lo, hi in self._parts(offset, len(view)):
            disk.write(at, view[lo:hi], flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        for disk, at, lo, hi in self._parts(offset, length):
            disk.copy_from(at, source, source_offset + lo, hi - lo, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        parts = list(self._parts(offset, length))
        if flags & NO_FALLBACK and len(parts) > 1:
            # If a later disk refused, the earlier ones would already be changed.
            raise self.refuse("fast zero of several disks")
        for disk, at, lo, hi in parts:
            disk.zero(at, hi - lo, flags)

    def discard(self, offset: int, length: int) -> None:
        for disk, at, lo, hi in self._parts(offset, length):
            disk.discard(at, hi - lo)

    def flush(self) -> None:
        for disk in self._disks:
            disk.flush()

    def start_read(self, offset: int, view: memoryview) -> Pending:
        (disk, at, _, hi), *others = self._parts(offset, len(view))
        return disk.start_read(at, view[:hi]) if not others else super().start_read(offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        (disk, at, _, hi), *others = self._parts(offset, len(view))
        return disk.start_write(at, view[:hi], flags) if not others else super().start_write(offset, view, flags)

    # A result about the status ends with the disk in which it begins.

    def extents(self, offset: int, length: int) -> Extents:
        disk, at, _, hi = next(self._parts(offset, length))
        return disk.extents(at, hi).shift(offset - at)

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        disk, at, _, hi = next(self._parts(offset, length))
        return disk.first_extents(at, hi, most)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        disk, at, _, hi = next(self._parts(offset, length))
        return disk.zero_runs(at, hi)

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        disk, at, _, hi = next(self._parts(offset, length))
        return disk.start_zero_runs(at, hi)

    def reads_zero(self, offset: int, length: int) -> bool:
        return all(disk.reads_zero(at, hi - lo) for disk, at, lo, hi in self._parts(offset, length))

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Child, int, int, int]]:
        """The disks of these bytes in order: (disk, offset in it, from, to), the last two relative to `offset`."""
        number, done = bisect_right(self._ends, offset), 0
        while done < length:
            begin = self._ends[number - 1] if number else 0
            to = min(self._ends[number] - offset, length)
            if to > done:  # else the disk is empty
                yield self._disks[number], offset + done - begin, done, to
                done = to
            number += 1
