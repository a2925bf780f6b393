"""The filter `offset`: a disk that is a range of its child."""

from __future__ import annotations

from typing import Any, ClassVar

from ..request import Child
from ..schema import Option
from ..window import WindowNode


class Offset(WindowNode):
    """Byte `x` is byte `offset + x` of `image`. `size` is the length in bytes (default: up to the end of the image when the
    node is opened). Stateless and thread-safe. Raises OptionError if the range is not inside the image."""

    driver = "offset"
    options: ClassVar[tuple[Option, ...]] = (
        Option("offset", "size", "the start of the range in the image, in bytes", default=0),
        Option("size", "size", "the length in bytes (default: up to the end of the image)"),
    )

    def __init__(self, image: Child, offset: int = 0, size: int | None = None, **common: Any) -> None:
        super().__init__(image, offset, max(image.size - offset, 0) if size is None else size, **common)
