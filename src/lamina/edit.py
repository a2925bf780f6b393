"""Edits of a graph in use: insert and remove filters, stack overlays, replace backing nodes.

An edit holds the gate of the graph: it waits for the requests inside, changes the graph, refreshes the limits in all edges,
and releases the waiting requests. A request therefore sees the graph before or after an edit, never in between, and none is
lost. All roots see the edit: a node that replaces another node gets all of its edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

from . import lifecycle
from .edge import Edge
from .errors import LaminaError, OptionError
from .format_node import FormatNode
from .gate import Holder
from .graph import Opener
from .node import Node
from .request import Child
from .root import Graph, Root


class Edit:
    """An edit of the graph of one root: `with image.edit() as edit:`. No request runs during an edit; a request of the
    editing thread raises LaminaError. Each step is atomic; completed steps remain if a later one fails. `opener` opens new
    nodes, and decides which files they may open."""

    # The gate refers to the holder and not to the edit: an edit that an interrupt dropped is collected, and releases the
    # gate.
    _holder: Holder | None = None

    def __init__(self, root: Root, opener: Opener) -> None:
        self._root = root
        self._opener = opener.for_parts(root.graph)

    def __enter__(self) -> Edit:
        gate = self._root.gate
        holder = self._holder = Holder("edits the graph")
        try:
            self._root.require_open()
            gate.take(holder)
            self._root.require_open()
            self._root.graph.require_free(self._root)
        except BaseException:
            try:
                gate.release(holder)
            finally:
                gate.release(holder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._settle()  # once more, where an interrupt cut that short

    def __del__(self) -> None:
        # An interrupt between `__enter__` and the block, or before the first line of `__exit__`.
        if self._holder is not None and not self._root.node.foreign:
            self._settle()

    def _settle(self) -> None:
        """Refresh the limits in all edges and release the gate, unless that was done."""
        gate, holder = self._root.gate, self._holder
        if holder is None or gate.holder() is not holder:
            return
        try:
            for root in self._root.graph.roots:
                if root.opened_at is not None and root.node.opened_at is None:
                    lifecycle.guard(root.node, root.opened_at)
            refresh(self._root.graph)
        except Exception:
            gate.release(holder)
            raise
        gate.release(holder)

    @property
    def root(self) -> Child:
        """The edge to the top node."""
        return self._root.edge

    def insert(self, driver: str, options: Mapping[str, Any] | None = None, *, above: Child | None = None) -> Node:
        """Insert a filter above a node: the node of the edge `above`, or the top node. All edges to that node, those of other
        roots included, lead to the filter from now on. Returns the filter."""
        old = (above or self._root.edge).node
        edges = old.parents()
        below = Child(old, "image", grows=True)
        node = self._over(below, {**(options or {}), "driver": driver, "image": below})
        forth, back = _redirection(edges, node), _redirection(edges, old)
        any(forth)
        try:
            refresh(self._root.graph)
        except BaseException:  # a node above does not support the limits of the filter
            any(back)  # first, since a second interrupt must not separate the image from its files
            below.give_up()
            node.children.pop("image", None)
            node.close()
            raise
        return node

    def remove(self, node: Node) -> None:
        """Remove a filter. It is flushed first; if that fails, it remains."""
        self._require_part(node)
        if "image" not in node.children or isinstance(node, FormatNode):
            raise OptionError("only a filter can be removed", node=node.name)
        node.flush()
        below, edges = node.children["image"], node.parents()
        lifecycle.release(node)  # from now on its collection says nothing about the graph
        forth, back = _redirection(edges, below.node), _redirection(edges, node)
        any(forth)
        below.give_up()
        try:
            refresh(self._root.graph)
        except BaseException:  # a node above needs it
            any(back)
            below.count_at(below.node)
            refresh(self._root.graph)
            raise
        node.children.pop("image", None)
        node.close()

    def overlay(self, spec: Mapping[str, Any]) -> Node:
        """Stack an overlay on top: `spec` describes it without its backing node, which is the present top node. Earlier
        writes are flushed, and remain in the backing node. All roots of that node move to the overlay."""
        old = self._root.node
        old.flush()
        edges = [edge for edge in old.parents() if edge.is_root]
        below = Child(old, "backing")
        node = self._over(below, {**spec, "backing": below})
        if node.children.get("backing") is not below:
            below.give_up()
            node.close()
            raise OptionError("an overlay is an image of a format that has a backing node", node=node.name)
        any(_redirection(edges, node))
        return node

    def set_backing(self, node: Node, spec: Mapping[str, Any] | str | None) -> None:
        """Replace the backing node of a format, or remove it. The header of the image is not changed. The caller guarantees
        that both backing nodes hold the same bytes where the image has none of its own."""
        if not isinstance(node, FormatNode):
            raise OptionError("only a format has a backing node", node=node.name)
        new = None if spec is None else self._opener.child("backing", spec, read_only=True)
        before, after = node.children, dict(node.children)
        old = after.pop("backing", None)
        if new is not None:
            after["backing"] = new
        # One store in each direction: an interrupt must not leave the image without its backing node.
        node.children = after
        try:
            self._opener.require_depth(self._root.node)
            refresh(self._root.graph)
        except BaseException:  # a node above does not support that one
            node.children = before
            refresh(self._root.graph)
            if new is not None:
                new.close()
            raise
        if old is not None:
            old.close()

    def _over(self, below: Child, options: Mapping[str, Any]) -> Node:
        """The node that `options` describe, above `below`. On an error the edge `below` is removed."""
        try:
            return self._opener.open(options)
        except BaseException:
            below.give_up()
            raise

    def _require_part(self, node: Node) -> None:
        if node not in self._root.node.beneath():
            raise LaminaError("this node is not part of the graph", node=node.name)


def _redirection(edges: Iterable[Edge], node: Node) -> Iterator[None]:
    """An iterator that redirects the edges to `node`. `any(...)` of it does that in one call of C code, which no interrupt
    divides. This function itself only registers the edges with `node`."""
    edges = tuple(edges)
    for edge in edges:
        edge.count_at(node)
    return map(setattr, edges, repeat("node"), repeat(node))


def refresh(graph: Graph) -> None:
    """Refresh the limits in all edges of the graph, from the bottom up."""
    fresh: set[int] = set()
    for root in graph.roots:
        _refresh(root.edge, fresh)


def _refresh(edge: Child, fresh: set[int]) -> None:
    if id(edge.node) not in fresh:
        fresh.add(id(edge.node))
        for child in edge.node.children.values():
            _refresh(child, fresh)
        edge.node.graph_changed()
    edge.refresh()
