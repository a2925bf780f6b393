"""The base classes of filters that treat all requests alike, or all changes. It follows the contract of `node.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from . import clock as system_clock
from .node import FilterNode, plain
from .request import Child

if TYPE_CHECKING:
    from .extents import Extents

#: A function without parameters that executes one request.
Request: TypeAlias = Callable[[], Any]


class AroundNode(FilterNode):
    """A filter whose requests all pass through one method, `around`. `clock`, for filters that wait or measure, has the
    functions of the module `clock`; tests replace it."""

    def __init__(
        self, image: Child, *, clock: Any = system_clock, name: str | None = None, read_only: bool = False
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self.clock = clock

    def around(self, kind: str, request: Request, offset: int, length: int, flags: int, /) -> Any:
        """Execute `request` and return its result, or raise an error instead. `kind`: "read", "write", "zero", "discard",
        "flush", "truncate" or "extents". `offset`, `length` and `flags` are 0 where the request has none; for a truncate
        `offset` is the new size."""
        return request()

    def read_into(self, offset: int, view: memoryview) -> None:
        self.around("read", partial(self.image.read_into, offset, view), offset, len(view), 0)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.around("write", partial(self.image.write, offset, view, flags), offset, len(view), flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.around("zero", partial(self.image.zero, offset, length, flags), offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.around("discard", partial(self.image.discard, offset, length), offset, length, 0)

    def flush(self) -> None:
        self.around("flush", self.image.flush, 0, 0, 0)

    def truncate(self, size: int) -> None:
        self.around("truncate", partial(self.image.truncate, size), size, 0, 0)

    def extents(self, offset: int, length: int) -> Extents:
        found: Extents = self.around("extents", partial(self.image.extents, offset, length), offset, length, 0)
        return found


class AroundChanges(AroundNode):
    """As `AroundNode`, for the requests that change something; reads and questions about the status pass."""

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        self.image.read_into(offset, view)

    def extents(self, offset: int, length: int) -> Extents:
        return self.image.extents(offset, length)
