"""The filter `offset`: a window into another node."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..errors import OptionError
from ..limits import Limits
from ..node import TransformNode
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents, HostFile


class Offset(TransformNode):
    """Byte `x` is byte `offset + x` of `image`. `size` is the length in bytes, fixed when it is opened: to the end of the
    image if it is not given. It holds no state: whatever the image allows may run concurrently. OptionError if the window
    is not inside the image."""

    driver: ClassVar[str] = "offset"
    schema: ClassVar[Schema] = Schema(
        "offset",
        [
            Option("image", "node", "the node below", required=True),
            Option("offset", "size", "where in the image the window begins, in bytes", default=0),
            Option("size", "size", "how long it is, in bytes; to the end of the image if not given"),
        ],
    )

    def __init__(
        self,
        image: Child,
        offset: int = 0,
        size: int | None = None,
        *,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._offset = offset
        self._size = max(image.size - offset, 0) if size is None else size
        if offset + self._size > image.size:
            raise OptionError(
                f"{self._size} bytes from {offset} reach past the end of the image at {image.size}",
                path=image.node.filename,
                hint="choose a smaller offset or size",
            )

    @property
    def size(self) -> int:
        return self._size

    @property
    def limits(self) -> Limits:
        """The image's, as far as the window keeps them aligned; what it does not, the edge below aligns."""
        below, offset = self.image.node.limits, self._offset
        alignments = ("request_alignment", "zero_alignment", "discard_alignment")
        return below._replace(**{name: 1 for name in alignments if offset % getattr(below, name)})

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        base = self.image.node.host_base
        return base and (base[0], base[1] + self._offset)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(self._offset + offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(self._offset + offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(self._offset + offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.image.discard(self._offset + offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return self.image.extents(self._offset + offset, length).shift(-self._offset)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.image.reads_zero(self._offset + offset, length)
