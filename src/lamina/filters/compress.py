"""The filter `compress`: has everything that is written packed. One of the filters, for a format that can pack."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedFeature
from ..limits import Limits
from ..node import COMPRESS, FilterNode
from ..request import Child


class Compress(FilterNode):
    """`image`, whose writes ask for COMPRESS. It declares the blocks that the image packs as its own, so that the request
    path completes writes to whole ones. Raises UnsupportedFeature over what packs nothing."""

    driver = "compress"
    faithful = True

    def __init__(self, image: Child, **common: Any) -> None:
        super().__init__(image, **common)
        if not (self.supported_flags & COMPRESS and image.node.limits.compress_alignment):
            raise UnsupportedFeature(
                f"{image.node.driver} cannot store anything compressed",
                path=image.node.filename,
                hint="images of format qcow2 can, if their reference counts have more than one bit",
            )

    @property
    def limits(self) -> Limits:
        below = self.image.node.limits
        return below._replace(request_alignment=max(below.request_alignment, below.compress_alignment))

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags | COMPRESS)
