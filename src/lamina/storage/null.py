"""The driver `null`: a disk of any size that stores nothing and reads as zeros. It serves to measure the nodes above it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..limits import GIB
from ..node import FUA, StorageNode, fill_zero
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents
    from ..graph import Opener


class NullStorage(StorageNode):
    """Writes are discarded, and reads return zeros. Stateless and thread-safe."""

    driver: ClassVar[str] = "null"
    transient = True
    schema: ClassVar[Schema] = Schema(
        "null",
        [
            Option("size", "size", "the length in bytes", default=GIB),
            Option(
                "read-zeroes",
                "bool",
                "ignored, for compatibility: reads always return zeros",
                default=True,
            ),
        ],
    )
    supported_flags = FUA

    def __init__(self, size: int = GIB, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._size = size

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        return cls(options["size"], name=opener.name, read_only=opener.read_only)

    @property
    def size(self) -> int:
        return self._size

    @property
    def allocated(self) -> int:
        """Always 0."""
        return 0

    def reopen(self, read_only: bool) -> None:
        self.read_only = read_only

    def read_into(self, offset: int, view: memoryview) -> None:
        fill_zero(view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """Do nothing."""

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Do nothing."""

    def discard(self, offset: int, length: int) -> None:
        """Do nothing."""

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import Extents

        return Extents.single(offset, length, zero=True, present=True, file=self, offset=offset)

    def reads_zero(self, offset: int, length: int) -> bool:
        return True
