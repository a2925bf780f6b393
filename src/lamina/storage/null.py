"""The driver `null`: a disk of any size that keeps nothing and reads as zeros. For measuring what lies above it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..limits import GIB
from ..node import FUA, StorageNode, fill_zero
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents
    from ..graph import Opener


class NullStorage(StorageNode):
    """Writes vanish, reads give zeros. Stateless, so any number of threads may use it."""

    driver: ClassVar[str] = "null"
    schema: ClassVar[Schema] = Schema(
        "null",
        [
            Option("size", "size", "its length in bytes", default=GIB),
            Option(
                "read-zeroes",
                "bool",
                "accepted for compatibility: reads always give zeros, never stale memory",
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
        """It takes up nothing."""
        return 0

    def read_into(self, offset: int, view: memoryview) -> None:
        fill_zero(view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """The bytes vanish."""

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """It reads as zeros already."""

    def discard(self, offset: int, length: int) -> None:
        """There is nothing to give back."""

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import Extents

        return Extents.single(offset, length, zero=True, present=True, file=self, offset=offset)

    def reads_zero(self, offset: int, length: int) -> bool:
        return True
