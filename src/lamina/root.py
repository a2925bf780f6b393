"""Graphs, and the roots through which users reach them.

A `Graph` is a set of nodes that edges connect, with one gate that every request of a user passes. A `Root` is one user of the
graph: an `Image`, an export of a server, a job. It owns an edge (`request.Child`) to its node. A node may have any number of
roots, and a graph may have roots on several nodes; all users see the same bytes and the same edits. Users close their roots
in any order: edges are counted, and a node is closed with its last edge.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from . import lifecycle
from .edge import consecutive
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
    """The nodes that edges connect, or that were opened to be connected. `image.graph` is the graph of an image;
    `lamina.open(..., graph=image.graph)` adds nodes to it, and their options may name the nodes of the graph."""

    __slots__ = ("__weakref__", "_nodes", "_roots", "gate", "sole")

    def __init__(self) -> None:
        self.gate: Gate = Gate()
        #: The root of a job that needs the graph for itself: meanwhile no other root writes or edits.
        self.sole: Root | None = None
        self._nodes: WeakSet[Node] = WeakSet()  # those that were ever added
        self._roots: WeakSet[Root] = WeakSet()

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes in use by name: the `node-name` of their options, or a name that Lamina made."""
        return {node.name: node for node in lifecycle.all_of(self._nodes) if node.graph is self and node.parents()}

    @property
    def roots(self) -> list[Root]:
        """The roots that are not closed."""
        return [root for root in lifecycle.all_of(self._roots) if not root.closed]

    def add(self, node: Node) -> None:
        """Make `node` a node of this graph, and of no other one."""
        self._nodes.add(node)
        node.graph = self

    def add_root(self, root: Root) -> None:
        """Called by a new root of this graph."""
        self._roots.add(root)

    def require_free(self, root: Root | None = None) -> None:
        """Raise OptionError if a job of another root than `root` needs the graph for itself."""
        if self.sole is not None and self.sole is not root:
            raise OptionError(
                "a job needs this graph for itself: meanwhile no other user writes to it or edits it",
                path=self.sole.node.filename,
                hint="wait until the job ends",
            )

    def exclusively(self, what: str, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call `work(*arguments)` while no other thread edits this graph or closes a part of it, and return its result. The
        gate admits requests meanwhile. `what`: the activity, for messages ("opens a node")."""
        if self.gate.held_here:
            return work(*arguments)
        return self.gate.holding(Holder(what, stops=False), work, *arguments)

    def close(self, edge: Child) -> None:
        """Close an edge, and its node with the last edge."""
        self.exclusively("closes a node", edge.close)

    def edge_to(self, name: str, role: str, *, grows: bool, writes: bool) -> Child | None:
        """A new edge from a node that is being opened to the node `name`; None if the graph has no such node. `writes`:
        requests through the edge may change the node. Such an edge excludes all edges from other nodes, and roots that write;
        edges that only read exclude those that write. (File locks have the same rule between processes.)"""
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
                    f"{user} {'writes to' if edge.writes else 'reads'} this node, which excludes a second node that "
                    f"{'writes to' if writes else 'reads'} it",
                    node=name,
                    hint="close that one first, or put the new node between them with an edit",
                )
        return Child(node, role, grows=grows, read_only=not writes)


def graph_of(node: Node) -> Graph:
    """The graph of `node` and of all nodes below it; a node without a graph is added. LaminaError if the nodes belong to two
    graphs with roots: requests of one graph would not wait for edits of the other."""
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
        graph.add(each)
    return graph


class Root:
    """One user of a graph: its requests pass the gate, then the edge. Thread-safe, `close` included. A thread makes one
    request at a time: a signal handler that interrupts a request of its thread gets a LaminaError for a request of its
    own."""

    __slots__ = ("__weakref__", "_holders", "_inside", "closed", "closing", "edge", "gate", "graph", "opened_at")

    closed: bool
    closing: bool

    def __init__(self, node: Node, *, read_only: bool = False) -> None:
        self.graph: Graph = graph_of(node)
        self.gate: Gate = self.graph.gate
        self._inside, self._holders = self.gate.inside, self.gate.holders
        #: Whether the gate refuses further requests of this root, and whether `close` has completed.
        self.closing = self.closed = False
        edges: list[Child] = []
        try:
            self.graph.exclusively("opens an image", self._begin, node, read_only, edges)
            self.edge: Child = edges[0]
            lifecycle.inherit(node)
            #: The line of code that opened it, as "file:line"; None: `lifecycle` does not close it.
            self.opened_at: str | None = node.opened_at
            self.graph.add_root(self)
            lifecycle.roots.add(self)
        except BaseException:
            for edge in edges:
                edge.give_up()
            raise

    def _begin(self, node: Node, read_only: bool, edges: list[Child]) -> None:
        edges.append(Child(node, "root", read_only=read_only))
        if edges[0].writes:
            self.graph.require_free()

    def give_up(self) -> None:
        """Remove this new root, which nobody can have used, without closing the node. (The traceback of an interrupt may keep
        the root itself.)"""
        self.closing = self.closed = True
        self.edge.give_up()

    def share(self, node: Node | str | None = None, *, read_only: bool = False) -> Root:
        """Another root, on the same node or on another node of this graph, given by itself or by name. A root on a node that
        is the child of another node is read-only."""
        self.require_open()
        opened_at = lifecycle.caller() if self.opened_at is not None else None
        return self.graph.exclusively("opens an image", self._share, node, read_only, opened_at)

    def _share(self, given: Node | str | None, read_only: bool, opened_at: str | None) -> Root:
        node = self.graph.nodes.get(given) if isinstance(given, str) else given or self.node
        if node is None or node.graph is not self.graph:
            raise OptionError(f"this graph has no node {given}", hint="its nodes: " + ", ".join(self.graph.nodes))
        below = node is not self.node and any(not edge.is_root for edge in node.parents())
        root = Root(node, read_only=read_only or self.edge.read_only or below)
        try:
            root.opened_at = opened_at
            if opened_at is not None and node.opened_at is None:
                lifecycle.guard(node, opened_at)
            return root
        except BaseException:
            root.give_up()
            raise

    def beneath(self, edge: Child) -> Root:
        """A root that writes to the backing node of `edge`, an edge below this root, which reopens it for writing. It serves
        a job that changes no byte which the node above reads there; reopen it read-only before it is closed. OptionError if
        that node has another user."""
        return self.alone("opens a backing node for writing", self._beneath, edge)

    def _beneath(self, edge: Child) -> Root:
        node = edge.node
        if node.parents() != [edge]:
            raise OptionError(
                "this backing node has another user, which would see its bytes change",
                path=node.filename,
                hint="close the image, export or job that uses it",
            )
        root = Root(node, read_only=True)
        try:
            root.edge.denied = None  # the caller of the job grants it
            root.edge.reopen(False, beneath=edge)
        except BaseException:
            self.graph.close(root.edge)
            root.closed = root.closing = True
            raise
        return root

    @property
    def node(self) -> Node:
        """The node of the edge."""
        return self.edge.node

    @property
    def size(self) -> int:
        """The length of the node in bytes."""
        return self.edge.node.size

    @property
    def read_only(self) -> bool:
        """Whether requests of this root that change something are refused."""
        return self.edge.read_only or self.edge.node.read_only

    # -- requests. (`read_into` and `write` repeat the code of `_request`: a call takes 0.05 us of the 2 us of a read.)

    def read_into(self, offset: int, view: memoryview) -> None:
        """As `Node.read_into`."""
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
        """As `Node.write`."""
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
        """As `Node.copy_from`."""
        self._request(self.edge.copy_from, offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """As `Node.zero`."""
        self._request(self.edge.zero, offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        """As `Node.discard`."""
        self._request(self.edge.discard, offset, length)

    def flush(self) -> None:
        """As `Node.flush`."""
        self._request(self.edge.flush)

    def extents(self, offset: int, length: int) -> Extents:
        """As `Node.extents`: a prefix."""
        return self._request(self.edge.extents, offset, length)

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        """As `Node.first_extents`."""
        return self._request(self.edge.first_extents, offset, length, most)

    def reads_zero(self, offset: int, length: int) -> bool:
        """As `Node.reads_zero`."""
        return self._request(self.edge.reads_zero, offset, length)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """As `Node.zero_runs`."""
        return self._request(self.edge.zero_runs, offset, length)

    # A started request stays inside the gate until it is finished (see `gate.py`).

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """As `Node.start_read`."""
        return self._start(self.edge.start_read, offset, view)

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        """As `Node.start_write`."""
        return self._start(self.edge.start_write, offset, view, flags)

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        """As `Node.start_zero`."""
        return self._start(self.edge.start_zero, offset, length, flags)

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        """As `Node.start_zero_runs`."""
        return self._start(self.edge.start_zero_runs, offset, length)

    def _start(self, start: Callable[..., Pending], *arguments: Any) -> Pending:
        return start_holding(self._enter, self.gate.leave, start, *arguments) or DONE

    def _enter(self, token: Holding) -> bool:
        return self.gate.enter(token, self)

    def windows(self, offset: int, length: int) -> Iterator[Extents]:
        """The exact status of the range, in consecutive parts; each part is a request of its own."""
        return consecutive(self.extents, offset, length)

    def require_inside(self, offset: int, length: int, operation: str) -> None:
        """Raise OutOfRange if the range is not inside the node."""
        self.edge.require_inside(offset, length, operation)

    def truncate(self, size: int) -> None:
        """Change the size while no request runs: a write that was checked against the old size would extend the file
        again."""
        self.alone("changes the size of the disk", self.edge.truncate, size)

    def reopen(self, read_only: bool) -> None:
        """Make this root read-only or writable (see `Edge.reopen`) while no request runs."""
        if self.node.foreign:
            raise foreign(self.node, "reopen")
        if read_only != self.read_only:
            self.alone("reopens the image", self._reopen, read_only)

    def _reopen(self, read_only: bool) -> None:
        if not read_only:
            self.graph.require_free(self)
        self.edge.reopen(read_only)

    def alone(self, what: str, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """work(*arguments), while no request of the graph runs. `what` completes "another thread ..." in errors."""
        self.require_open()
        result: _Result = self.gate.holding(Holder(what), self._while_open, work, *arguments)
        return result

    def _while_open(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        self.require_open()
        return work(*arguments)

    # -- closing

    def require_open(self) -> None:
        """Raise Closed if this root is closed or closing."""
        if self.closing:
            raise Closed("this image was closed")

    def refuse(self) -> None:
        """Refuse further requests. Requests inside continue; long ones end early."""
        self.closing = self.edge.closing = True

    def close(self) -> None:
        """Refuse further requests (Closed), wait for those inside, and close the edge, and the node with its last edge. Any
        number of threads may call it; each call returns when the root is closed. After an interrupt the next call completes
        the work. LaminaError in a thread that is inside a request of this graph or edits it: it would wait for itself."""
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
        except Exception:  # descriptors are closed all the same, except after an interrupt
            self.closed = True
            raise
        self.closed = True
        others = node.parents()
        if others and not any(edge.is_root for edge in others):
            lifecycle.lost_root(node, self.graph.nodes.values())
