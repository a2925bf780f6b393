"""The filter `offset`: a window into another node."""

from __future__ import annotations

from typing import ClassVar

from ..errors import OptionError
from ..node import WindowNode
from ..request import Child
from ..schema import Option, Schema


class Offset(WindowNode):
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
        length = max(image.size - offset, 0) if size is None else size
        super().__init__(image, offset, length, name=name, read_only=read_only)
        if offset + length > image.size:
            raise OptionError(
                f"{length} bytes from {offset} reach past the end of the image at {image.size}",
                path=image.node.filename,
                hint="choose a smaller offset or size",
            )
