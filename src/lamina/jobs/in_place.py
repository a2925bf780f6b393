"""How jobs change the storage of an image in use, whose bytes stay the same: part by part, while no other request runs.

Used by `compact`. A batch of parts takes some milliseconds; other users wait for one batch at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ..errors import OptionError
from ..limits import MIB, align_down, align_up
from ..workers import Workers
from .requests import FAR, MOST, is_far

if TYPE_CHECKING:
    from ..image import Image
    from .progress import Monitor

#: The longest part. Clusters are not longer.
PART = 2 * MIB
#: Threads if all storage is local: one reads while another writes.
_NEAR = 2

_Result = TypeVar("_Result")


class Part(NamedTuple):
    """The bytes from `start` to `stop` of a disk."""

    start: int
    stop: int


def parts(ranges: Iterable[tuple[int, int]], block: int, size: int) -> Iterator[Part]:
    """Parts that cover these ranges (start, length), which are in order and inside a disk of `size` bytes. Parts consist of
    whole blocks, but for the end of the disk, and do not overlap. `block`: a power of two up to `PART`."""
    done = 0
    for start, length in ranges:
        at, end = max(align_down(start, block), done), min(align_up(start + length, block), size)
        while at < end:
            stop = min(align_down(at, PART) + PART, end)
            yield Part(at, stop)
            at = done = stop


class Batches(Generic[_Result]):
    """Calls `work` for parts of `image`, by several threads, a batch at a time while no request of the graph runs, and then
    `finish` with the results of the batch, in one thread. `what` completes "another thread ..." in errors, `name` is that of
    the threads. `asked`: the number of threads, 1 to 16; None: two, or 8 if some storage is remote."""

    def __init__(
        self,
        image: Image,
        what: str,
        name: str,
        work: Callable[[Part], _Result],
        finish: Callable[[list[_Result]], None],
        asked: int | None,
    ) -> None:
        if asked is not None and not 1 <= asked <= MOST:
            raise OptionError(f"{asked} threads cannot work at once", hint=f"ask for 1 to {MOST}")
        threads = asked or (FAR if is_far(image.node) else _NEAR)
        self._image, self._what = image, what
        self._work, self._finish = work, finish
        self._most = max(threads, 4)
        self._workers = Workers(threads, name) if threads > 1 else None

    def run(self, todo: Iterator[Part], watch: Monitor) -> None:
        """Work on all these parts, in order. Raises the errors of the work, and Cancelled."""
        try:
            try:
                while batch := list(islice(todo, self._most)):
                    self._image.root.alone(self._what, self._one, batch)
                    watch.update(batch[-1].stop, self._image.size)
            finally:
                self._close()
        finally:
            self._close()  # an interrupt that struck the first time finds the second

    def _one(self, batch: list[Part]) -> None:
        if self._workers is None or len(batch) == 1:
            self._finish([self._work(part) for part in batch])
        else:
            self._finish(self._workers.map(self._work, batch))

    def _close(self) -> None:
        if self._workers is not None:
            self._workers.close()
