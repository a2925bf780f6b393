"""Changing a graph that is in use: filters put in and taken out, overlays stacked, backing nodes exchanged.

Every request of a user enters a graph by its entrance (the root edge of an `Image`). An edit closes the entrance, waits until
the requests inside have left, changes the graph, has all edges read the limits of their nodes again, and lets the waiting
requests in. So a request sees the graph before or after an edit, never in between, and none is lost.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import lifecycle
from .errors import Closed, LaminaError, OptionError
from .format_node import FormatNode
from .graph import Opener
from .node import Node
from .pending import DONE, Done, Pending
from .request import Child

if TYPE_CHECKING:
    from types import FrameType

    from .extents import Extents, HostFile

#: How often who waits at a gate looks again, in seconds.
_LOOK_AGAIN = 0.0005
#: Among the turns of a gate: it is shut for ever.
_CLOSED = "closed"


class Turn:
    """Whoever shuts a gate, for as long as it is shut."""

    __slots__ = ("thread", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.thread = threading.get_ident()


class Gate:
    """Lets requests pass while it is open. Each request brings a token of its own, and is inside as long as that is in a set:
    adding and discarding are single steps of the interpreter that may be repeated, so that passing takes no lock, and an
    interrupt at any point leaves nobody inside who left, provided that the request leaves twice:

        try:
            try:
                gate.enter(token)
                ...
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    (The second time counts where the first was cut off.) Who shuts the gate opens it again in the same way, whatever became
    of shutting it. `leave` and `open` are calls of C code: they are done when an interrupt can strike, even if a second one
    comes directly behind it."""

    __slots__ = ("_line", "_turns", "inside", "leave", "open")

    def __init__(self) -> None:
        self.inside: set[object] = set()
        self.leave = self.inside.discard
        #: Those who shut it, or wait until they may. Empty while it is open.
        self._turns: set[object] = set()
        #: Let the waiting requests in, if this turn is what shut it.
        self.open = self._turns.discard
        #: The same in the order of arrival, and some who left.
        self._line: list[Turn] = []

    def enter(self, token: object) -> None:
        """Pass, or wait until it is open. Raises Closed once it is shut for ever."""
        self.inside.add(token)
        # Asked after entering: whoever shuts the gate then sees this request inside, or it sees the gate.
        if self._turns:
            self._wait(token)

    def _wait(self, token: object) -> None:
        while self._turns:
            self.leave(token)
            if _CLOSED in self._turns:
                raise Closed("this image was closed")
            self._require_another_thread("make a request")
            time.sleep(_LOOK_AGAIN)
            self.inside.add(token)

    def shut(self, owner: Turn) -> None:
        """Let nobody in, and wait until all have left. One owner at a time; Closed if it is shut for ever. Whatever this
        raises: call `open` afterwards."""
        self._require_outside("edit the graph or change its size")
        self._take(owner)
        if _CLOSED in self._turns:
            raise Closed("this image was closed")
        self._empty()

    def close(self, owner: Turn) -> None:
        """Shut it for ever, and wait until all have left. Called again it waits again. Call `open` afterwards, for the next
        who closes."""
        self._require_outside("close the image")
        self._require_another_thread("close the image")
        self.refuse()
        self._take(owner)
        self._empty()

    def refuse(self) -> None:
        """Let nobody in any more; those inside go on."""
        self._turns.add(_CLOSED)

    @property
    def closed(self) -> bool:
        """Whether it is shut for ever."""
        return _CLOSED in self._turns

    def is_shut_by(self, owner: Turn) -> bool:
        return self._owner() is owner

    def _take(self, owner: Turn) -> None:
        self._turns.add(owner)
        self._line.append(owner)  # behind that: who is in the line and not among the turns has left
        while self._owner() is not owner:
            self._require_another_thread("edit, close or resize the image")
            time.sleep(_LOOK_AGAIN)

    def _owner(self) -> Turn | None:
        """Whose turn it is: the first in the line who has not left."""
        for turn in tuple(self._line):
            if turn in self._turns:
                return turn
            try:
                self._line.remove(turn)
            except ValueError:  # another thread did
                continue
        return None

    def _empty(self) -> None:
        while self.inside:
            time.sleep(_LOOK_AGAIN)

    def _require_another_thread(self, what: str) -> None:
        by = self._owner()
        if by is not None and by.thread == threading.get_ident():
            raise LaminaError(
                f"this thread {by.what}, and cannot {what} before that is done",
                hint="do it afterwards, or in another thread",
            )

    def _require_outside(self, what: str) -> None:
        """Raise LaminaError where this thread is inside a request itself, and would wait for its own end: a signal handler,
        or a node below."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code in _PASSING and frame.f_locals.get("token") in self.inside:
                raise LaminaError(
                    f"this thread is inside a request of this image, and cannot {what} before that is done",
                    hint="do it after the request, or in another thread",
                )
            frame = frame.f_back


class Entrance(Child):
    """The root edge of a graph: a `Child` whose requests pass a gate. (`Child.read_into(self, ...)` costs 0.1 us less than
    `super()`, in a request that takes 2.)"""

    __slots__ = ("__weakref__", "closed", "gate")

    def __init__(self, node: Node, role: str) -> None:
        super().__init__(node, role)
        self.gate = Gate()
        #: Whether `close` came to its end.
        self.closed = False
        lifecycle.entrances.add(self)

    def read_into(self, offset: int, view: memoryview) -> None:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                Child.read_into(self, offset, view)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                Child.write(self, offset, view, flags)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                Child.copy_from(self, offset, source, source_offset, length, flags)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                Child.zero(self, offset, length, flags)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def discard(self, offset: int, length: int) -> None:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                Child.discard(self, offset, length)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def flush(self) -> None:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                Child.flush(self)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def truncate(self, size: int) -> None:
        """As an edit: no request runs beside it. One that was found inside the old size would make a file long again."""
        gate, turn = self.gate, Turn("changes the size of the disk")
        try:
            try:
                gate.shut(turn)
                Child.truncate(self, size)
            finally:
                gate.open(turn)
        finally:
            gate.open(turn)

    def extents(self, offset: int, length: int) -> Extents:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                return Child.extents(self, offset, length)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def reads_zero(self, offset: int, length: int) -> bool:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                return Child.reads_zero(self, offset, length)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    # What is started here is done at once: requests inside the gate have not got a thread that an edit could wait for.

    def start_read(self, offset: int, view: memoryview) -> Pending:
        self.read_into(offset, view)
        return DONE

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        self.write(offset, view, flags)
        return DONE

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        self.zero(offset, length, flags)
        return DONE

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        return Done(self.zero_runs(offset, length))

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        gate, token = self.gate, object()
        try:
            try:
                gate.enter(token)
                return Child.zero_runs(self, offset, length)
            finally:
                gate.leave(token)
        finally:
            gate.leave(token)

    def checkpoint(self) -> None:
        if self.gate.closed:
            raise Closed("this image was closed")

    def close(self) -> None:
        """Let no request in any more (Closed), wait for those inside, then close the graph. From any thread, and from several
        at once: each returns when it is closed. Where it is interrupted, the next call does the rest. LaminaError in a thread
        that is inside a request of this edge, or edits the graph, and so would wait for itself."""
        if self.node.foreign:
            self.gate.refuse()
            self.node.close()
            self.closed = True
            return
        gate, token = self.gate, Turn("closes the image")
        try:
            try:
                gate.close(token)
                if not self.closed:
                    self._close_node()
            finally:
                gate.open(token)
        finally:
            gate.open(token)

    def _close_node(self) -> None:
        try:
            self.node.close()
        except Exception:  # everything was given back all the same; after an interrupt it was not
            self.closed = True
            raise
        self.closed = True

    def after_fork(self) -> None:
        """In a child process: the requests that were inside belong to threads that only the parent has."""
        self.gate = Gate()


#: The code of the methods that pass the gate.
_PASSING = {
    method.__code__
    for method in (
        Entrance.read_into,
        Entrance.write,
        Entrance.copy_from,
        Entrance.zero,
        Entrance.discard,
        Entrance.flush,
        Entrance.extents,
        Entrance.reads_zero,
        Entrance.zero_runs,
    )
}


class Edit:
    """An edit of the graph behind one entrance: `with image.edit() as edit:`. No request runs while it lasts, so none may be
    made inside it by this thread either. What was done stays done if a later step fails; every single step is all or
    nothing. `opener` decides what may be opened."""

    # The gate knows this one, not the edit: an edit that an interrupt dropped is collected, and opens the gate.
    _turn: Turn | None = None

    def __init__(self, entrance: Entrance, opener: Opener) -> None:
        self._entrance = entrance
        self._opener = opener.for_parts()
        self._opened_at: str | None = None

    def __enter__(self) -> Edit:
        gate = self._entrance.gate
        turn = self._turn = Turn("edits the graph")
        try:
            gate.shut(turn)
            self._opened_at = self._entrance.node.opened_at
        except BaseException:
            try:
                gate.open(turn)
            finally:
                gate.open(turn)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._settle()  # once more, where an interrupt cut that short

    def __del__(self) -> None:
        # An interrupt between `__enter__` and the block, or before the first line of `__exit__`.
        if self._turn is not None and not self._entrance.node.foreign:
            self._settle()

    def _settle(self) -> None:
        """Have all edges read the limits of their nodes again, and let requests in, unless that was done."""
        gate, turn = self._entrance.gate, self._turn
        if turn is None or not gate.is_shut_by(turn):
            return
        try:
            if self._opened_at is not None:
                lifecycle.guard(self._entrance.node, self._opened_at)
            refresh(self._entrance)
        except Exception:
            gate.open(turn)
            raise
        gate.open(turn)

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
            edge.node = below.node  # before any call: a second interrupt must not part the image from its files
            del node.children["image"]
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
        lifecycle.release(node)  # who forgets it from now on does not forget the graph
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
        before, after = node.children, dict(node.children)
        old = after.pop("backing", None)
        if new is not None:
            after["backing"] = new
        # There and back by one store each: an interrupt must not leave the image without what lies below it.
        node.children = after
        try:
            refresh(self._entrance)
        except BaseException:  # a node above cannot do with that one
            node.children = before
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
