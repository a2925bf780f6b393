"""The filter `blkverify`: writes to two images, and compares every read of one with the other."""

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
    """The image under test is `image`; `raw` is a trusted copy. Writes and zero requests go to both. A read whose bytes
    differ fails with EIO and names the first different byte. Discards are refused, since the two images may read
    differently after a discard.

    Thread-safe: the request path orders overlapping requests, so both images get them in the same order."""

    driver: ClassVar[str] = "blkverify"
    schema: ClassVar[Schema] = Schema(
        "blkverify",
        [
            Option("test", "node", "the image under test", required=True, aliases=("image",)),
            Option("raw", "node", "the trusted image; a plain name is a raw file", required=True),
        ],
    )

    serialise = 512

    def __init__(self, image: Child, raw: Child, **common: Any) -> None:
        super().__init__(image, **common)
        self.children["raw"] = raw
        self._raw = raw
        self.graph_changed()

    def graph_changed(self) -> None:
        """Raises OptionError if the sizes of the two images differ."""
        if self._raw.size != self.image.size:
            raise OptionError(
                f"the sizes of the images differ: {self.image.size} and {self._raw.size} bytes",
                path=self._raw.node.filename,
                hint="resize the raw image to the size of the image under test",
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
        expected = bytearray(len(view))
        self._raw.read_into(offset, memoryview(expected))
        if expected != view:
            at = next(at for at in range(len(expected)) if expected[at] != view[at])
            trusted = self._raw.node.filename
            raise BlockIOError(
                f"the byte at offset {offset + at} is {view[at]:#04x}, but {expected[at]:#04x} in {trusted}",
                path=self.filename,
                operation="read",
                offset=offset,
                length=len(view),
                hint="the image under test is wrong, or the images already differed when they were opened",
            )

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags)
        self._raw.write(offset, view, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if flags & NO_FALLBACK:
            # If the second image refused, the first one would already be changed.
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
