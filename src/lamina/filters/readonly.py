"""The filter `readonly`: refuses all changes. The request path does the work, since it refuses every change of a read-only
node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..node import FilterNode, require_writable
from ..request import Child

if TYPE_CHECKING:
    from ..graph import Opener


class ReadOnlyFilter(FilterNode):
    """Opens `image` read-only, even in a graph that is opened read-write. Every change raises ReadOnly."""

    driver = "readonly"
    faithful = True
    writable_hint = "open it without the filter readonly"

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = True) -> None:
        super().__init__(image, name=name, read_only=True)

    def reopen(self, read_only: bool) -> None:
        """Raise ReadOnly for writing."""
        if not read_only:
            require_writable(self, "reopen")

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Open `image` read-only: without the lock of a writer, and without changes of its metadata."""
        return cls(opener.child("image", options["image"], grows=True, read_only=True), name=opener.name)
