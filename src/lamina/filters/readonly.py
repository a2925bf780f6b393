"""The filter `readonly`: what lies below it can be read, and not changed. One of the filters; it needs nothing but the
contract of a node, since the request path refuses every change of a node that is read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..node import FilterNode
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..graph import Opener


class ReadOnlyFilter(FilterNode):
    """`image`, open for reading whatever the graph is opened for. Every change raises ReadOnly and touches no byte."""

    driver: ClassVar[str] = "readonly"
    schema: ClassVar[Schema] = Schema("readonly", [Option("image", "node", "the node below", required=True)])

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = True) -> None:
        super().__init__(image, name=name, read_only=True)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Opens `image` for reading: no lock for writing is asked for, nothing in its tables is touched."""
        return cls(opener.child("image", options["image"], grows=True, read_only=True), name=opener.name)
