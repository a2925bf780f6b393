"""Nodes that show a stretch of another node. On the floor of the nodes, under the contract of `node.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import OptionError
from .limits import Limits
from .node import COMPRESS, TransformNode, is_plain, plain
from .request import Child

if TYPE_CHECKING:
    from .extents import Extents, HostFile


class WindowNode(TransformNode):
    """A stretch of `image` as a node of its own: byte `x` is byte `start + x` of the image, and `length` is fixed. It holds
    no state: whatever the image allows may run concurrently. OptionError if the window is not inside the image."""

    def __init__(
        self, image: Child, start: int, length: int, *, name: str | None = None, read_only: bool = False
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._offset = start
        self._size = length
        self.supported_flags |= image.node.supported_flags & COMPRESS
        self.graph_changed()

    def graph_changed(self) -> None:
        """The window stays where it is, so what is below now must be long enough too."""
        if self._offset + self._size > self.image.size:
            raise OptionError(
                f"{self._size} bytes from {self._offset} reach past the end of the image at {self.image.size}",
                path=self.image.node.filename,
                hint="choose a smaller offset or size",
            )

    @property
    def size(self) -> int:
        return self._size

    @property
    def limits(self) -> Limits:
        return shifted_limits(self.image.node.limits, self._offset)

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        base = self.image.node.host_base
        return base and (base[0], base[1] + self._offset)

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(self._offset + offset, view)

    @plain
    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(self._offset + offset, view, flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        if not is_plain(type(self).write):
            raise self.refuse("copy from a file")
        self.image.copy_from(self._offset + offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(self._offset + offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.image.discard(self._offset + offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return self.image.extents(self._offset + offset, length).shift(-self._offset)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.image.reads_zero(self._offset + offset, length)


def shifted_limits(below: Limits, offset: int) -> Limits:
    """`below` for requests that go there `offset` bytes further: the alignments that the shift keeps. What it does not keep,
    the edge below aligns."""
    alignments = ("request_alignment", "zero_alignment", "discard_alignment")
    moved = {name: 1 for name in alignments if offset % getattr(below, name)}
    if offset % (below.compress_alignment or 1):
        moved["compress_alignment"] = 0
    return below._replace(**moved)
