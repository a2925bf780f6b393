"""Graphs, and the roots by which users reach them.

A `Graph` is a set of nodes that are connected by edges, and what its users share: one gate, which every request of a user
passes. A `Root` is one user: an `Image`, an export of a server, a job. It owns an edge (`request.Child`) to its node. Any
number of roots lie on one node, or on different nodes of one graph; all see the same bytes and the same edits. They are
closed in any order: edges are counted, and the last edge to a node closes it.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from . import lifecycle
from .errors import Closed, LaminaError, OptionError
from .gate import Gate, Holder
from .node import foreign
from .pending import DONE, Holding, Pending, start_holding
from .request import Child

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .node import Node
    from .status import Status

_Result = TypeVar("_Result")


class Graph:
    """Nodes that belong together. `image.graph` is the one of an image; `lamina.open(..., graph=image.graph)` opens further
    nodes into it, whose options may name the nodes that are there."""

    __slots__ = ("__weakref__", "gate")

    def __init__(self) -> None:
        self.gate = Gate()

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes in use by their names: those that the option `node-name` gave, or Lamina."""
        return {node.name: node for node in lifecycle.all_of(lifecycle.nodes) if node.graph is self and node.parents()}

    @property
    def roots(self) -> list[Root]:
        """Those that are not closed."""
        return [root for root in lifecycle.all_of(lifecycle.roots) if root.graph is self and not root.closed]

    def exclusively(self, what: str, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """What `work(*arguments)` returns, called while no other thread changes or closes anything of this graph. Requests
        go on meanwhile. `what`: "opens a node", for messages."""
        if self.gate.held_here:
            return work(*arguments)
        return self.gate.holding(Holder(what, stops=False), work, *arguments)

    def close(self, edge: Child) -> None:
        """Give up an edge; the node is closed if it was the last."""
        self.exclusively("closes a node", edge.close)

    def edge_to(self, name: str, role: str, *, grows: bool, writes: bool) -> Child | None:
        """A new edge from a node that is being opened to the node that is called `name`; None if no node is. `writes`:
        requests through the edge may change it. Then no other node may lie on it, and no root that writes; a node that only
        reads lies beside others that read. (The same that the locks of files say between programs.)"""
        return self.exclusively("opens a node", self._edge_to, name, role, grows, writes)

    def _edge_to(self, name: str, role: str, grows: bool, writes: bool) -> Child | None:
        node = self.nodes.get(name)
        if node is None:
            return None
        if writes and node.read_only:
            raise OptionError(
                "it was opened read-only, and the node above it writes", node=name, hint="open both in the same way"
            )
        for edge in node.parents():
            if edge.writes or (writes and not edge.is_root):
                user = "an image, an export or a job" if edge.is_root else "another node"
                raise OptionError(
                    f"{user} {'writes to' if edge.writes else 'reads'} this node, and the new one would "
                    f"{'write to' if writes else 'read'} it beside that",
                    node=name,
                    hint="close that one first, or put the new node between them with an edit",
                )
        return Child(node, role, grows=grows, read_only=not writes)


def graph_of(node: Node) -> Graph:
    """The graph that `node` and all below it belong to; those that belonged to none do from now on. LaminaError if they lie
    in two graphs that are both in use: requests of the one would not know of edits of the other."""
    nodes = list(node.beneath())
    graphs = {each.graph for each in nodes if each.graph is not None}
    used = [graph for graph in graphs if graph.roots]
    if len(used) > 1:
        raise LaminaError(
            "these nodes belong to two graphs that are both in use",
            node=node.name,
            hint="open the second one with graph=, or close an image first",
        )
    graph = used[0] if used else node.graph or Graph()
    for each in nodes:
        each.graph = graph
    return graph


class Root:
    """One user of a graph: its requests pass the gate, and the edge behind it. Safe for any number of threads, `close`
    included. A thread makes one request at a time: LaminaError in a signal handler that finds its thread inside one."""

    __slots__ = ("__weakref__", "_holders", "_inside", "closed", "closing", "edge", "gate", "graph", "opened_at")

    def __init__(self, node: Node, *, read_only: bool = False) -> None:
        self.graph = graph_of(node)
        self.gate = self.graph.gate
        self._inside, self._holders = self.gate.inside, self.gate.holders
        #: Whether no further request is let in, and whether `close` came to its end.
        self.closing = self.closed = False
        self.edge: Child = self.graph.exclusively("opens an image", self._begin, node, read_only)
        #: Who opened it, as "file:line", where `lifecycle` closes what nobody does.
        self.opened_at = node.opened_at
        lifecycle.roots.add(self)

    @staticmethod
    def _begin(node: Node, read_only: bool) -> Child:
        return Child(node, "root", read_only=read_only)

    def share(self, node: Node | str | None = None, *, read_only: bool = False) -> Root:
        """Another root: on the same node, or on another one of this graph, which may be given by its name. On a node that
        another node lies on it only reads."""
        self.require_open()
        opened_at = lifecycle.caller() if self.opened_at is not None else None
        return self.graph.exclusively("opens an image", self._share, node, read_only, opened_at)

    def _share(self, given: Node | str | None, read_only: bool, opened_at: str | None) -> Root:
        node = self.graph.nodes.get(given) if isinstance(given, str) else given or self.node
        if node is None or node.graph is not self.graph:
            raise OptionError(f"this graph has no node {given}", hint="its nodes: " + ", ".join(self.graph.nodes))
        below = any(not edge.is_root for edge in node.parents())
        root = Root(node, read_only=read_only or self.edge.read_only or below)
        root.opened_at = opened_at
        if opened_at is not None and node.opened_at is None:
            lifecycle.guard(node, opened_at)
        return root

    @property
    def node(self) -> Node:
        return self.edge.node

    @property
    def size(self) -> int:
        return self.edge.node.size

    @property
    def read_only(self) -> bool:
        return self.edge.read_only or self.edge.node.read_only

    # -- requests. (Reads and writes pass the gate by themselves: a call costs 0.05 us of the 2 that a read takes.)

    def read_into(self, offset: int, view: memoryview) -> None:
        inside, me = self._inside, get_ident()
        if me in inside:
            self.gate.require_outside("make another")
        try:
            try:
                inside[me] = self
                if self._holders or self.closing:
                    self.gate.wait(me, self)
                self.edge.read_into(offset, view)
            finally:
                inside.pop(me, None)
        finally:
            inside.pop(me, None)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        inside, me = self._inside, get_ident()
        if me in inside:
            self.gate.require_outside("make another")
        try:
            try:
                inside[me] = self
                if self._holders or self.closing:
                    self.gate.wait(me, self)
                self.edge.write(offset, view, flags)
            finally:
                inside.pop(me, None)
        finally:
            inside.pop(me, None)

    def _request(self, request: Callable[..., _Result], *arguments: Any) -> _Result:
        inside, me = self._inside, get_ident()
        if me in inside:
            self.gate.require_outside("make another")
        try:
            try:
                inside[me] = self
                if self._holders or self.closing:
                    self.gate.wait(me, self)
                return request(*arguments)
            finally:
                inside.pop(me, None)
        finally:
            inside.pop(me, None)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        self._request(self.edge.copy_from, offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._request(self.edge.zero, offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self._request(self.edge.discard, offset, length)

    def flush(self) -> None:
        self._request(self.edge.flush)

    def extents(self, offset: int, length: int) -> Extents:
        return self._request(self.edge.extents, offset, length)

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        return self._request(self.edge.first_extents, offset, length, most)

    def reads_zero(self, offset: int, length: int) -> bool:
        return self._request(self.edge.reads_zero, offset, length)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return self._request(self.edge.zero_runs, offset, length)

    # What is started stays inside the gate until it is finished (see `gate.py`).

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self._start(self.edge.start_read, offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        return self._start(self.edge.start_write, offset, view, flags)

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        return self._start(self.edge.start_zero, offset, length, flags)

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        return self._start(self.edge.start_zero_runs, offset, length)

    def _start(self, start: Callable[..., Pending], *arguments: Any) -> Pending:
        return start_holding(self._enter, self.gate.leave, start, *arguments) or DONE

    def _enter(self, token: Holding) -> bool:
        return self.gate.enter(token, self)

    def windows(self, offset: int, length: int) -> Iterator[Extents]:
        """The exact status of all these bytes, one answer after the other; each is a request of its own."""
        end = offset + length
        while offset < end:
            found = self.extents(offset, end - offset)
            yield found
            offset = found.end

    def require_inside(self, offset: int, length: int, operation: str) -> None:
        """Raise OutOfRange if these bytes are not all inside the node."""
        self.edge.require_inside(offset, length, operation)

    def truncate(self, size: int) -> None:
        """Change the size while no request runs: one that was found inside the old size would make a file long again."""
        self._alone("changes the size of the disk", self.edge.truncate, size)

    def reopen(self, read_only: bool) -> None:
        """Change the node, or no longer (see `Edge.reopen`), from a moment on at which no request runs."""
        if self.node.foreign:
            raise foreign(self.node, "reopen")
        if read_only != self.read_only:
            self._alone("reopens the image", self.edge.reopen, read_only)

    def _alone(self, what: str, work: Callable[..., None], *arguments: Any) -> None:
        self.require_open()
        self.gate.holding(Holder(what), self._while_open, work, *arguments)

    def _while_open(self, work: Callable[..., None], *arguments: Any) -> None:
        self.require_open()
        work(*arguments)

    # -- its end

    def require_open(self) -> None:
        """Raise Closed if this root is closed, or is being closed."""
        if self.closing:
            raise Closed("this image was closed")

    def refuse(self) -> None:
        """Let no further request in; those inside go on, and long ones end early."""
        self.closing = self.edge.closing = True

    def close(self) -> None:
        """Let no further request in (Closed), wait for those inside, and give up the edge, which closes the node if no other
        root, and no other node, has an edge to it. From any thread, and from several at once: each returns when it is
        closed. Where it is interrupted, the next call does the rest. LaminaError in a thread that is inside a request of
        this graph, or edits it, and so would wait for itself."""
        self.gate.require_free("close the image")
        self.refuse()
        self.gate.drain(self)
        self.graph.exclusively("closes an image", self._end)

    def _end(self) -> None:
        if self.closed:
            return
        node = self.edge.node
        try:
            self.edge.close()
        except Exception:  # everything was given back all the same; after an interrupt it was not
            self.closed = True
            raise
        self.closed = True
        others = node.parents()
        if others and not any(edge.is_root for edge in others):
            lifecycle.release(node)  # it is closed with the node above it
