"""The filter `preallocate`: extends a growing file in large steps."""

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
    """A filter between a format and growing storage. A write past the end of the file also extends the file beyond the write:
    by a zero request, which allocates, if the storage does that without writing, otherwise by a truncate. The preallocated
    part is removed by `truncate` and when the node is closed. `size` is the exact end of the written data. If the storage
    cannot be extended (a full disk, for example), the filter logs that and passes the write.

    Thread-safe: requests past the end run one at a time. The file is longer than `size` until the node is closed, and stays
    longer after a power cut."""

    driver: ClassVar[str] = "preallocate"
    schema: ClassVar[Schema] = Schema(
        "preallocate",
        [
            Option("image", "node", "the growing storage", required=True),
            Option("prealloc-size", "size", "the bytes to preallocate beyond a write", default=128 * MIB, minimum=1),
            Option("prealloc-align", "size", "the alignment of the file's length", default=MIB, minimum=1),
        ],
    )

    # Orders requests, so that no write is in progress while `truncate` makes the file shorter.
    serialise = 512

    def __init__(self, image: Child, prealloc_size: int = 128 * MIB, prealloc_align: int = MIB, **common: Any) -> None:
        super().__init__(image, **common)
        self._below = image  # still needed if an edit removes the node from the graph before it is closed
        self._size = image.size
        #: The length of the file; its bytes past `_size` are zeros.
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
            except BaseException:  # a failed truncate may have changed the size as well
                self._ahead = self.image.size
                self._size = min(self._size, self._ahead)
                raise
            self._size = self._ahead = size

    def graph_changed(self) -> None:
        """If the child was replaced by a file of another length, nothing of that file is preallocated."""
        length = self.image.size
        if length != self._ahead:
            self._size = self._ahead = length

    def settle(self) -> None:
        with self._growing:
            self._cut()

    def stop_writing(self) -> None:
        self.settle()
        self.flush()

    def _grow(self, end: int, request: Callable[..., None], *arguments: Any) -> None:
        """Execute a request that ends at `end`, past the size."""
        with self._growing:
            self._preallocate(end)
            try:
                request(*arguments)
            except BaseException:
                self._cut()  # the failed request may have left bytes other than zero past the size
                raise
            self._size = max(self._size, end)

    def _cut(self) -> None:
        """Remove the preallocated part of the file."""
        size = self._size
        if not self._below.node.read_only and self._below.size > size:
            self._below.truncate(size)
        self._ahead = size

    def _preallocate(self, end: int) -> None:
        """Extend the file beyond `end`, if it is shorter."""
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
            self.warn("cannot preallocate: %s", error)
            return
        self._ahead = ahead
