"""Changing a graph that is in use: filters put in and taken out, overlays stacked, backing nodes exchanged.

Every request of a user enters a graph by its entrance (the root edge of an `Image`). An edit closes the entrance, waits until
the requests inside have left, changes the graph, has all edges read the limits of their nodes again, and lets the waiting
requests in. So a request sees the graph before or after an edit, never in between, and none is lost.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import LaminaError, OptionError
from .format_node import FormatNode
from .graph import Opener
from .node import Node
from .request import Child

if TYPE_CHECKING:
    from .extents import Extents, HostFile

#: How often an edit that waits for idle looks again, in seconds.
_LOOK_AGAIN = 0.0005


class Gate:
    """Lets requests pass while it is open. Two counters that only rise say how many are inside: taking a number from
    `itertools.count` is one step of the interpreter, so that passing takes no lock."""

    __slots__ = ("_entered", "_left", "_opened", "_shut", "enter_quietly", "leave")

    def __init__(self) -> None:
        self._entered = itertools.count()
        self._left = itertools.count()
        self.enter_quietly = self._entered.__next__
        self.leave = self._left.__next__
        self._shut = False
        self._opened = threading.Condition()

    def enter(self) -> None:
        self.enter_quietly()
        while (
            self._shut
        ):  # asked after entering: whoever shuts the gate then sees this request inside, or it sees the gate
            self.leave()
            with self._opened:
                while self._shut:
                    self._opened.wait()
            self.enter_quietly()

    def shut(self) -> None:
        """Let nobody in, and wait until all have left. One at a time."""
        with self._opened:
            while self._shut:
                self._opened.wait()
            self._shut = True
        # Each look takes a number of either counter, so that their difference stays what it is. Who left is asked first: a
        # request that comes, sees the gate shut and leaves between the two looks must not stand for one that is inside.
        while self.leave() != self.enter_quietly():
            time.sleep(_LOOK_AGAIN)

    def open(self) -> None:
        with self._opened:
            self._shut = False
            self._opened.notify_all()


class Entrance(Child):
    """The root edge of a graph: a `Child` whose requests pass a gate. (`Child.read_into(self, ...)` costs 0.1 us less than
    `super()`, in a request that takes 2.)"""

    __slots__ = ("gate",)

    def __init__(self, node: Node, role: str) -> None:
        super().__init__(node, role)
        self.gate = Gate()

    def read_into(self, offset: int, view: memoryview) -> None:
        self.gate.enter()
        try:
            Child.read_into(self, offset, view)
        finally:
            self.gate.leave()

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.gate.enter()
        try:
            Child.write(self, offset, view, flags)
        finally:
            self.gate.leave()

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        self.gate.enter()
        try:
            Child.copy_from(self, offset, source, source_offset, length, flags)
        finally:
            self.gate.leave()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.gate.enter()
        try:
            Child.zero(self, offset, length, flags)
        finally:
            self.gate.leave()

    def discard(self, offset: int, length: int) -> None:
        self.gate.enter()
        try:
            Child.discard(self, offset, length)
        finally:
            self.gate.leave()

    def flush(self) -> None:
        self.gate.enter()
        try:
            Child.flush(self)
        finally:
            self.gate.leave()

    def truncate(self, size: int) -> None:
        self.gate.enter()
        try:
            Child.truncate(self, size)
        finally:
            self.gate.leave()

    def extents(self, offset: int, length: int) -> Extents:
        self.gate.enter()
        try:
            return Child.extents(self, offset, length)
        finally:
            self.gate.leave()

    def reads_zero(self, offset: int, length: int) -> bool:
        self.gate.enter()
        try:
            return Child.reads_zero(self, offset, length)
        finally:
            self.gate.leave()


class Edit:
    """An edit of the graph behind one entrance: `with image.edit() as edit:`. No request runs while it lasts, so none may be
    made inside it by this thread either. What was done stays done if a later step fails; every single step is all or
    nothing. `opener` decides what may be opened."""

    def __init__(self, entrance: Entrance, opener: Opener) -> None:
        self._entrance = entrance
        self._opener = opener

    def __enter__(self) -> Edit:
        self._entrance.gate.shut()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            refresh(self._entrance)
        finally:
            self._entrance.gate.open()

    @property
    def root(self) -> Child:
        """The edge to the top node."""
        return self._entrance

    def insert(self, driver: str, options: Mapping[str, Any] | None = None, *, above: Child | None = None) -> Node:
        """Put a filter between an edge (the root edge if none is given) and its node; returns the filter."""
        edge = above or self._entrance
        below = Child(edge.node, "image", grows=True)
        node = self._opener.open({**(options or {}), "driver": driver, "image": below})
        edge.node = node
        try:
            refresh(self._entrance)
        except BaseException:  # a node above cannot keep to its limits over this one
            edge.node = node.children.pop("image").node
            node.close()
            raise
        return node

    def remove(self, node: Node) -> None:
        """Take a filter out. What it holds back is flushed first; if that fails it stays."""
        edge = self._edge_to(node)
        if "image" not in node.children or isinstance(node, FormatNode):
            raise OptionError("only a filter can be taken out", node=node.name)
        node.flush()
        below = node.children["image"]
        edge.node = below.node
        try:
            refresh(self._entrance)
        except BaseException:  # a node above cannot do without it
            edge.node = node
            refresh(self._entrance)
            raise
        del node.children["image"]
        node.close()

    def overlay(self, spec: Mapping[str, Any]) -> Node:
        """Stack an overlay on top: `spec` describes it, without its backing node, which is the top node of now. What was
        written so far is flushed, and stays below."""
        old = self._entrance.node
        old.flush()
        below = Child(old, "backing")
        node = self._opener.open({**spec, "backing": below})
        if node.children.get("backing") is not below:
            node.close()
            raise OptionError("an overlay is an image of a format that has a backing node", node=node.name)
        self._entrance.node = node
        return node

    def set_backing(self, node: Node, spec: Mapping[str, Any] | None) -> None:
        """Give a format node another backing node, or none. What the image's header names is not changed. The reader vouches
        that both read the same where the image relies on it."""
        if not isinstance(node, FormatNode):
            raise OptionError("only a format has a backing node", node=node.name)
        new = None if spec is None else self._opener.child("backing", spec, read_only=True)
        old = node.children.pop("backing", None)
        if new is not None:
            node.children["backing"] = new
        try:
            refresh(self._entrance)
        except BaseException:  # a node above cannot do with that one
            node.children.pop("backing", None)
            if old is not None:
                node.children["backing"] = old
            refresh(self._entrance)
            if new is not None:
                new.close()
            raise
        if old is not None:
            old.close()

    def _edge_to(self, node: Node) -> Child:
        line: list[Child] = [self._entrance]
        for edge in line:
            if edge.node is node:
                return edge
            line += edge.node.children.values()
        raise LaminaError("this node is not part of the graph", node=node.name)


def refresh(edge: Child) -> None:
    """Have this edge and all below it read the limits of their nodes again, the lowest first."""
    for child in edge.node.children.values():
        refresh(child)
    edge.node.graph_changed()
    edge.refresh()
