"""The base class of filters that are a range of another node. It follows the contract of `node.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import OptionError
from .limits import Limits
from .node import COMPRESS, TransformNode, is_plain, plain
from .request import Child

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .status import Status


class WindowNode(TransformNode):
    """A range of `image` as a node: byte `x` is byte `start + x` of the image, and `length` is fixed. Stateless and
    thread-safe. Raises OptionError if the range is not inside the image."""

    def __init__(
        self, image: Child, start: int, length: int, *, name: str | None = None, read_only: bool = False
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._offset = start
        self._size = length
        self.supported_flags: int = self.supported_flags | (image.node.supported_flags & COMPRESS)
        self.graph_changed()

    def graph_changed(self) -> None:
        """Raises OptionError if the new image does not contain the range."""
        if self._offset + self._size > self.image.size:
            raise OptionError(
                f"{self._size} bytes at offset {self._offset} exceed the end of the image at {self.image.size}",
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

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        return self.image.first_extents(self._offset + offset, length, most)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.image.reads_zero(self._offset + offset, length)


def shifted_limits(below: Limits, offset: int) -> Limits:
    """The limits of a node whose requests are shifted by `offset` to a child with the limits `below`. An alignment that does
    not divide `offset` is dropped; the edge to the child aligns these requests."""
    alignments = ("request_alignment", "zero_alignment", "discard_alignment")
    moved = {name: 1 for name in alignments if offset % getattr(below, name)}
    if offset % (below.compress_alignment or 1):
        moved["compress_alignment"] = 0
    return below._replace(**moved)
