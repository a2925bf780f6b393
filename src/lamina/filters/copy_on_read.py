"""The filter `copy_on_read`: what is read from a backing image is kept in the image on top."""

from __future__ import annotations

from typing import Any

from ..errors import LaminaError
from ..node import FilterNode
from ..ranges import RangeLock
from ..request import Child


class CopyOnRead(FilterNode):
    """Over a format with a backing image. Stretches of a read that a layer below the top one holds are written into the top
    layer, once, so that the next read finds them there; how much room that takes is the format's choice. A read that fails
    is the error of the backing image. A copy that fails, for want of room say, is logged, and the read succeeds. Over an
    image that is opened for reading nothing is copied.

    Safe for any number of threads: a copy holds its range, and writes of the same bytes wait, so none is ever undone."""

    driver = "copy_on_read"
    faithful = True
    serialise = 512

    def __init__(self, image: Child, **common: Any) -> None:
        super().__init__(image, **common)
        self._copies = RangeLock()

    def read_into(self, offset: int, view: memoryview) -> None:
        if self.image.node.read_only:
            self.image.read_into(offset, view)
        else:
            self._copies.exclusive(offset, offset + len(view), self._read_and_keep, offset, view)

    def _read_and_keep(self, offset: int, view: memoryview) -> None:
        found = self.image.windows(offset, len(view))
        below = [row for rows in found for row in rows if row.present and row.depth > 0]
        self.image.read_into(offset, view)
        try:
            for row in below:
                if row.zero:
                    self.image.zero(row.start, row.length)
                else:
                    self.image.write(row.start, view[row.start - offset : row.end - offset])
        except LaminaError as error:
            self.warn("what was read is not kept: %s", error)
