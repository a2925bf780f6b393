"""The filter `copy_on_read`: what is read from a backing image is kept in the image on top."""

from __future__ import annotations

from typing import ClassVar

from ..errors import LaminaError
from ..node import FilterNode
from ..ranges import RangeLock
from ..request import Child
from ..schema import Option, Schema


class CopyOnRead(FilterNode):
    """Over a format with a backing image. Stretches of a read that a layer below the top one holds are written into the top
    layer, once, so that the next read finds them there; how much room that takes is the format's choice. A read that fails
    is the error of the backing image. A copy that fails, for want of room say, is logged, and the read succeeds. Over an
    image that is opened for reading nothing is copied.

    Safe for any number of threads: a copy holds its range, and writes of the same bytes wait, so none is ever undone."""

    driver: ClassVar[str] = "copy_on_read"
    schema: ClassVar[Schema] = Schema(
        "copy_on_read", [Option("image", "node", "a format with a backing image", required=True)]
    )

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._copies = RangeLock()

    @property
    def serialise(self) -> int:
        return 512

    def read_into(self, offset: int, view: memoryview) -> None:
        if self.image.node.read_only:
            self.image.read_into(offset, view)
            return
        held = self._copies.acquire(offset, offset + len(view), True)
        try:
            below = [row for row in self.image.extents(offset, len(view)) if row.present and row.depth > 0]
            self.image.read_into(offset, view)
            for row in below:
                if not self._copy(row.start, view[row.start - offset : row.end - offset], zero=row.zero):
                    break
        finally:
            self._copies.release(held)

    def _copy(self, offset: int, part: memoryview, *, zero: bool) -> bool:
        """Write it into the top layer; whether that could be done."""
        try:
            if zero:
                self.image.zero(offset, len(part))
            else:
                self.image.write(offset, part)
        except LaminaError as error:
            import logging

            logging.getLogger("lamina.copy_on_read").warning("what was read is not kept: %s", error)
            return False
        return True
