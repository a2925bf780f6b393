"""The filter `compress`: stores all written data compressed, in a format that supports compression."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedFeature
from ..limits import Limits
from ..node import COMPRESS, FilterNode
from ..request import Child


class Compress(FilterNode):
    """Adds the flag COMPRESS to all writes to `image`. The alignment of the filter is the image's compression block, so
    the request path completes writes to such blocks. Raises UnsupportedFeature if the image cannot compress."""

    driver = "compress"
    faithful = True

    def __init__(self, image: Child, **common: Any) -> None:
        super().__init__(image, **common)
        if not (self.supported_flags & COMPRESS and image.node.limits.compress_alignment):
            raise UnsupportedFeature(
                f"the driver {image.node.driver} does not support compression",
                path=image.node.filename,
                hint="use qcow2 without encryption, with reference counts of more than one bit",
            )

    @property
    def limits(self) -> Limits:
        below = self.image.node.limits
        return below._replace(request_alignment=max(below.request_alignment, below.compress_alignment))

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags | COMPRESS)
