"""The filter `readonly`: what lies below it can be read, and not changed. One of the filters; it needs nothing but the
contract of a node, since the request path refuses every change of a node that is read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..node import FilterNode
from ..request import Child

if TYPE_CHECKING:
    from ..graph import Opener


class ReadOnlyFilter(FilterNode):
    """`image`, open for reading whatever the graph is opened for. Every change raises ReadOnly and touches no byte."""

    driver = "readonly"
    faithful = True
    writable_hint = "open it without the filter readonly"

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = True) -> None:
        super().__init__(image, name=name, read_only=True)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Opens `image` for reading: no lock for writing is asked for, nothing in its tables is touched."""
        return cls(opener.child("image", options["image"], grows=True, read_only=True), name=opener.name)
