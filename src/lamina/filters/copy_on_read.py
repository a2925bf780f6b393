"""The filter `copy_on_read`: copies data that is read from a backing image to the top image."""

from __future__ import annotations

from typing import Any

from ..errors import LaminaError
from ..node import FilterNode
from ..ranges import RangeLock
from ..request import Child


class CopyOnRead(FilterNode):
    """A filter above a format with a backing image. The ranges of a read that a lower layer of the chain holds are written to
    the top layer, once, so that later reads find them there. The format decides how much it allocates for them. A failed copy
    (a full disk, for example) is logged, and the read succeeds. Nothing is copied if the image is read-only.

    Thread-safe: a copy locks its range, so concurrent writes of the same bytes wait and are not overwritten."""

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
            self.warn("data that was read could not be copied: %s", error)
