"""The filter `blkverify`: every write goes to two images, and every read of the one is held against the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import BlockIOError, OptionError
from ..node import NO_FALLBACK, TransformNode
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents, HostFile
    from ..graph import Opener


class Blkverify(TransformNode):
    """The disk is `image`, the one under test; `raw` has the same bytes and is trusted. Writes and zeroes go to both; a read
    that differs fails with EIO, which names the first byte that does. Discards are left out, since what the two read as
    then may differ with right.

    Safe for any number of threads: requests that overlap are ordered by the request path, so both see them in one order."""

    driver: ClassVar[str] = "blkverify"
    schema: ClassVar[Schema] = Schema(
        "blkverify",
        [
            Option("test", "node", "the image under test", required=True, aliases=("image",)),
            Option("raw", "node", "the image that is right; a bare name is a raw file", required=True),
        ],
    )

    serialise = 512

    def __init__(self, image: Child, raw: Child, **common: Any) -> None:
        super().__init__(image, **common)
        self.children["raw"] = raw
        self._raw = raw
        self.graph_changed()

    def graph_changed(self) -> None:
        """OptionError if the two are not equally long."""
        if self._raw.size != self.image.size:
            raise OptionError(
                f"the images are not equally long: {self.image.size} and {self._raw.size} bytes",
                path=self._raw.node.filename,
                hint="make the raw one as long as the one under test",
            )

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        raw = options["raw"]
        if isinstance(raw, str) or (isinstance(raw, dict) and raw.get("driver", "file") == "file"):
            raw = {"driver": "raw", "file": raw}
        image = opener.child("image", options["test"], grows=True)
        return cls(image, opener.child("raw", raw, grows=True), name=opener.name, read_only=opener.read_only)

    @property
    def size(self) -> int:
        return self.image.size

    @property
    def growable(self) -> bool:
        return self.image.node.growable and self._raw.node.growable

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        return self.image.node.host_base

    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(offset, view)
        right = bytearray(len(view))
        self._raw.read_into(offset, memoryview(right))
        if right != view:
            at = next(at for at in range(len(right)) if right[at] != view[at])
            raise BlockIOError(
                f"the byte at {offset + at} is {view[at]:#04x}, and in {self._raw.node.filename} it is {right[at]:#04x}",
                path=self.filename,
                operation="read",
                offset=offset,
                length=len(view),
                hint="the image under test is wrong there, or the two were not equal from the start",
            )

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags)
        self._raw.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if flags & NO_FALLBACK:
            # The one could do it and the other refuse, and then a byte was touched.
            raise self.refuse("fast zero")
        self.image.zero(offset, length, flags)
        self._raw.zero(offset, length, flags)

    def flush(self) -> None:
        self.image.flush()
        self._raw.flush()

    def truncate(self, size: int) -> None:
        self.image.truncate(size)
        self._raw.truncate(size)

    def extents(self, offset: int, length: int) -> Extents:
        return self.image.extents(offset, length)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self.image.reads_zero(offset, length)
