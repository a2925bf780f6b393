"""The filter `offset`: a window into another node."""

from __future__ import annotations

from typing import Any

from ..request import Child
from ..schema import Option
from ..window import WindowNode


class Offset(WindowNode):
    """Byte `x` is byte `offset + x` of `image`. `size` is the length in bytes, fixed when it is opened: to the end of the
    image if it is not given. It holds no state: whatever the image allows may run concurrently. OptionError if the window
    is not inside the image."""

    driver = "offset"
    options = (
        Option("offset", "size", "where in the image the window begins, in bytes", default=0),
        Option("size", "size", "how long it is, in bytes; to the end of the image if not given"),
    )

    def __init__(self, image: Child, offset: int = 0, size: int | None = None, **common: Any) -> None:
        super().__init__(image, offset, max(image.size - offset, 0) if size is None else size, **common)
