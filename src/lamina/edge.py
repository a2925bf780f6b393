"""The edges of a graph: each connects a node, or a root, to a child node, counts as one user of the child, and keeps the
limits of the child for the request path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from weakref import ref

from .errors import Closed, LaminaError, OptionError, ReadOnly
from .limits import GIB, MAX_TRANSFER, align_down, is_power_of_two
from .node import Node, require_writable

if TYPE_CHECKING:
    from .extents import Extents

#: Overlapping writes leave each block of this many bytes in the state after one of them, even if a write is split.
_ATOM = 512
#: The largest step of a zero request or a discard, unless the driver declares a smaller one.
_STEP = 4 * GIB


def consecutive(extents: Callable[[int, int], Extents], offset: int, length: int) -> Iterator[Extents]:
    """The status of the whole range: `extents(offset, length)`, called again from the end of each result."""
    end = offset + length
    while offset < end:
        found = extents(offset, end - offset)
        yield found
        offset = found.end


class Edge:
    """An edge to `node`. `grows`: requests may extend a growable node (the storage of a format, the child of a filter); the
    edge of a user and an edge to a backing node never do. `read_only`: the edge refuses changes, even if the node is
    writable. A node is closed with its last edge."""

    __slots__ = (
        "__weakref__",
        "_align",
        "_discard_align",
        "_max_discard",
        "_max_transfer",
        "_max_zero",
        "_order",
        "_reads_wait",
        "_seen",
        "_within",
        "_zero_align",
        "closing",
        "denied",
        "event",
        "grows",
        "node",
        "read_only",
        "role",
    )

    def __init__(self, node: Node, role: str, *, grows: bool = False, read_only: bool = False) -> None:
        self.node: Node = node
        self.role: str = role
        self.grows: bool = grows
        self.read_only: bool = read_only
        #: Whether its root is closing: long requests end early.
        self.closing: bool = False
        #: Makes the error for a reopening for writing, if the policy for references lets the image only read this child;
        #: each further user of the node has it as well.
        self.denied: Callable[[], LaminaError] | None = next((one.denied for one in node.parents() if one.denied), None)
        self.refresh()
        try:
            self.count_at(node)
        except BaseException:  # an interrupt, whose traceback would keep this edge
            self.give_up()
            raise

    def count_at(self, node: Node) -> None:
        """Register this edge, which leads to `node` or is about to, as a parent of `node`."""
        node._parents.add(ref(self, node._parents.discard))

    @property
    def is_root(self) -> bool:
        """Whether its owner is a root, not a node."""
        return self.role == "root"

    @property
    def writes(self) -> bool:
        """Whether its requests may change the node."""
        return not (self.read_only or self.node.read_only or self.role == "backing")

    def refresh(self) -> None:
        """Read the node's limits again (they are frozen while requests run)."""
        #: The receiver of events (`Node.event`); None if the driver does not override it, which makes the test cheap.
        self.event: Callable[[str], None] | None = self.node.event if type(self.node).event is not Node.event else None
        self._seen = self._within = -1
        limits = self.node.limits
        align = limits.request_alignment
        if not is_power_of_two(align) or limits.zero_alignment < 1 or limits.discard_alignment < 1:
            raise ValueError(f"{self.node.name} declares impossible limits: {limits}")
        self._align = align
        most = limits.max_transfer or MAX_TRANSFER
        self._max_transfer = max(align_down(most, max(align, _ATOM) if most >= _ATOM else align), align)
        self._zero_align = math.lcm(limits.zero_alignment, align)
        self._max_zero = max(align_down(min(limits.max_zero or _STEP, _STEP), self._zero_align), self._zero_align)
        self._discard_align = math.lcm(limits.discard_alignment, align)
        self._max_discard = max(
            align_down(min(limits.max_discard or _STEP, _STEP), self._discard_align), self._discard_align
        )
        # Reads of plain storage need no order; read-modify-write there orders writes among themselves.
        self._reads_wait = self.node.serialise > 0
        # Read-modify-write and widened zero requests use whole blocks, so locked ranges are multiples of all three.
        unit = math.lcm(self.node.serialise or 1, align, self._zero_align)
        self._order = unit if unit > 1 else 0

    @property
    def size(self) -> int:
        return self.node.size

    def tell(self, event: str) -> None:
        """Pass an event on to the node (see `Node.event`)."""
        if self.event is not None:
            self.event(event)

    def close(self) -> None:
        """Remove the edge, and close the node with its last edge. After an interrupt, call it again. Only one thread closes
        edges of a graph at a time (`Graph.exclusively`)."""
        node = self.node
        node._parents.discard(ref(self))
        if not node.parents():
            node.close()

    def give_up(self) -> None:
        """Remove the edge without closing the node."""
        self.node._parents.discard(ref(self))

    def reopen(self, read_only: bool, *, beneath: Edge | None = None) -> None:
        """Make this edge read-only or writable. The first writable edge reopens its node for writing (`Node.reopen`); when
        the last one becomes read-only, so does the node. No request runs meanwhile. Raises, without effect, OptionError if an
        edge of another node (other than `beneath`), or a root that writes, excludes it, and PolicyError if no policy grants
        it."""
        if self.denied is not None and not read_only:
            raise self.denied()
        node, before = self.node, self.read_only
        others = [edge for edge in node.parents() if edge not in (self, beneath)]
        if not read_only:
            if any(not edge.is_root or (edge.writes and not self.is_root) for edge in others):
                raise OptionError(
                    "another node or a writing user excludes writing to it",
                    node=node.name,
                    hint="close that node or user first",
                )
            if node.read_only:
                node.reopen(False)
            self.read_only = False
            return
        self.read_only = True
        try:
            if not node.read_only and not any(edge.writes for edge in others):
                node.reopen(True)
        except BaseException:
            self.read_only = before
            raise

    def require_writable(self, operation: str) -> None:
        require_writable(self.node, operation)
        if self.read_only:
            raise ReadOnly(
                "this user of the node is read-only",
                path=self.node.filename,
                operation=operation,
                hint="write to the top node of the graph, or reopen the image for writing",
            )

    def checkpoint(self) -> None:
        """Called between two steps of a long request, while it holds no lock. Raises Closed if the root is closing, so that
        `close` does not wait hours for one request."""
        if self.closing:
            raise Closed("this image was closed")
