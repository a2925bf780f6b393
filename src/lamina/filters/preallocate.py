"""The filter `preallocate`: a file that grows is made longer in large steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

from ..errors import LaminaError
from ..limits import MAX_SIZE, MIB, align_up
from ..node import NO_FALLBACK, FilterNode
from ..request import Child
from ..schema import Option, Schema


class Preallocate(FilterNode):
    """Over storage that grows, below a format. A write past the end of the file makes it longer than needed, by zeroes that
    allocate where the storage can do them quickly, else by its length alone; what is ahead is cut off again by `truncate`
    and when the node is closed. `size` is the exact length of what was written. If the storage cannot get ahead, for want
    of room say, that is logged, and the write goes on as it would without the filter.

    Safe for any number of threads: requests past the end run one at a time. The file on the disk is longer than `size`
    until the node is closed; after a power cut it stays so."""

    driver: ClassVar[str] = "preallocate"
    schema: ClassVar[Schema] = Schema(
        "preallocate",
        [
            Option("image", "node", "storage that grows", required=True),
            Option("prealloc-size", "size", "how far ahead, in bytes", default=128 * MIB, minimum=1),
            Option("prealloc-align", "size", "the file's length becomes a multiple of this", default=MIB, minimum=1),
        ],
    )

    # So that no write is on its way below while the size is made smaller.
    serialise = 512

    def __init__(self, image: Child, prealloc_size: int = 128 * MIB, prealloc_align: int = MIB, **common: Any) -> None:
        super().__init__(image, **common)
        self._below = image  # also there when the node was taken out of the graph, and is then closed
        self._size = image.size
        #: The length of the file. What lies in it past the size reads as zero.
        self._ahead = image.size
        self._step = prealloc_size
        self._align = prealloc_align
        self._growing = threading.Lock()

    @property
    def size(self) -> int:
        return self._size

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        end = offset + len(view)
        if end <= self._size:
            self.image.write(offset, view, flags)
        else:
            self._grow(end, self.image.write, offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        end = offset + length
        if end <= self._size:
            self.image.zero(offset, length, flags)
        else:
            self._grow(end, self.image.zero, offset, length, flags)

    def truncate(self, size: int) -> None:
        with self._growing:
            try:
                self.image.truncate(size)
            except BaseException:  # what failed may have changed the size all the same
                self._ahead = self.image.size
                self._size = min(self._size, self._ahead)
                raise
            self._size = self._ahead = size

    def graph_changed(self) -> None:
        """Where the file below is another one now, nothing of it is ahead."""
        length = self.image.size
        if length != self._ahead:
            self._size = self._ahead = length

    def settle(self) -> None:
        with self._growing:
            self._cut()

    def _grow(self, end: int, request: Callable[..., None], *arguments: Any) -> None:
        """Do a request that ends at `end`, past the size."""
        with self._growing:
            self._get_ahead(end)
            try:
                request(*arguments)
            except BaseException:
                self._cut()  # whatever it left past the size is not zero
                raise
            self._size = max(self._size, end)

    def _cut(self) -> None:
        """Give back what is ahead of the size."""
        size = self._size
        if not self._below.node.read_only and self._below.size > size:
            self._below.truncate(size)
        self._ahead = size

    def _get_ahead(self, end: int) -> None:
        """Make the file longer than `end`, if it is not."""
        if end <= self._ahead:
            return
        ahead = min(align_up(end + self._step, self._align), MAX_SIZE)
        start = self._ahead
        try:
            try:
                self.image.zero(start, ahead - start, NO_FALLBACK)
            except LaminaError:
                self.image.truncate(ahead)
        except LaminaError as error:
            self.warn("the file is not made longer ahead of time: %s", error)
            return
        self._ahead = ahead
