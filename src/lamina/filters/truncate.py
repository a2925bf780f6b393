"""The filter `truncate`: a disk of another size than its child, fixed or rounded."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BlockIOError, OptionError
from ..limits import MAX_SIZE, align_down, align_up
from ..node import FUA, TransformNode, bounded, fill_zero
from ..request import Child
from ..schema import Option

if TYPE_CHECKING:
    from ..extents import Extents, HostFile

_ZEROS = bytes(1 << 16)


class Truncate(TransformNode):
    """A disk with the bytes of `image` and `size` bytes long, or as long as `image` rounded up or down to a multiple. The
    size is fixed when the node is opened. Bytes past the end of the image read as zeros. Zeros may be written there; other
    bytes fail with ENOSPC before any byte of the request is written. Stateless and thread-safe."""

    driver = "truncate"
    options: ClassVar[tuple[Option, ...]] = (
        Option("size", "size", "the size in bytes"),
        Option("round-up", "size", "round the size of the image up to a multiple of this", minimum=1),
        Option("round-down", "size", "round the size of the image down to a multiple of this", minimum=1),
    )

    def __init__(
        self,
        image: Child,
        size: int | None = None,
        *,
        round_up: int | None = None,
        round_down: int | None = None,
        **common: Any,
    ) -> None:
        """Raises OptionError unless exactly one of the three sizes is given, and for a size that is too large."""
        super().__init__(image, **common)
        if sum(given is not None for given in (size, round_up, round_down)) != 1:
            raise OptionError("truncate needs one size", hint="give one of size, round-up and round-down")
        if size is None:
            size = align_up(image.size, round_up) if round_up else align_down(image.size, round_down or 1)
        if size > MAX_SIZE:
            raise OptionError(f"the size {size} is too large", hint=f"the maximum is {MAX_SIZE}")
        self._size = size
        self.graph_changed()

    def graph_changed(self) -> None:
        #: The number of bytes that the image contains; the other bytes are zeros.
        self._inside = min(self._size, self.image.size)

    @property
    def size(self) -> int:
        return self._size

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        """That of the image, unless the disk is longer than the image."""
        return self.image.node.host_base if self._inside == self._size else None

    def read_into(self, offset: int, view: memoryview) -> None:
        inside = self._split(offset, len(view))
        if inside:
            self.image.read_into(offset, view[:inside])
        fill_zero(view[inside:])

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        inside = self._split(offset, len(view))
        for at in range(inside, len(view), len(_ZEROS)):
            if not _ZEROS.startswith(view[at : at + len(_ZEROS)]):
                raise BlockIOError(
                    f"the image ends at offset {self._inside}, and only zeros can be written past it",
                    errno=errno.ENOSPC,
                    path=self.filename,
                    operation="write",
                    offset=offset,
                    length=len(view),
                )
        if inside:
            self.image.write(offset, view[:inside], flags)
        elif flags & FUA:
            self.image.flush()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        inside = self._split(offset, length)
        if inside:
            self.image.zero(offset, inside, flags)
        elif flags & FUA:
            self.image.flush()

    def discard(self, offset: int, length: int) -> None:
        inside = self._split(offset, length)
        if inside:
            self.image.discard(offset, inside)

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import Extents

        inside = self._split(offset, length)
        if not inside:
            return Extents.single(offset, length, zero=True, present=True)
        found = self.image.extents(offset, inside)
        if found.end < offset + inside:
            return found
        return bounded(found.pad_zero(offset + length).coalesce())

    def reads_zero(self, offset: int, length: int) -> bool:
        inside = self._split(offset, length)
        return not inside or self.image.reads_zero(offset, inside)

    def _split(self, offset: int, length: int) -> int:
        """The number of bytes of the request that are inside the image."""
        return min(max(self._inside - offset, 0), length)
