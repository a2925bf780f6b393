"""The end of graphs that their users did not close: unreferenced graphs, graphs open at exit, and those of a forked child.

The caller that opens a graph closes it. If it does not:

- A thread of this module closes a graph without references, with a `ResourceWarning` that names the line of code that opened
  it. Garbage collection may run inside any allocation, also in a thread that holds a lock of the same graph: so the finalizer
  takes no lock and does no I/O, it only hands the graph to that thread.
- At exit, every graph is flushed while all threads still run, and closed after they have ended.
- After a fork, the child may read files through the graphs of its parent. It writes and flushes nothing, and closing only
  closes descriptors: the tables in its memory become outdated, and file locks belong to the parent too.
"""

from __future__ import annotations

import _thread
import atexit
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakSet

from .capabilities import after_fork_in_child
from .errors import LaminaError
from .ranges import RangeLock

if TYPE_CHECKING:
    from .node import Node
    from .root import Root

    class Inherited(Protocol):
        """State of the parent process that a forked child inherits."""

        def after_fork(self) -> None:
            """Called in the child: release the state of the parent. Takes no lock; may be called twice, if a signal
            interrupts it."""


T = TypeVar("T")

#: Seconds that exit waits for the requests of daemon threads, and for threads that close graphs.
_PATIENCE = 10.0
_POLL_INTERVAL = 0.001


#: All nodes, and all roots of their users.
nodes: WeakSet[Node] = WeakSet()
roots: WeakSet[Root] = WeakSet()
#: The NBD servers and the connections of clients.
connected: WeakSet[Inherited] = WeakSet()

_guarded: WeakSet[Node] = WeakSet()  # top nodes that this module closes if their users do not
_forgotten: deque[Node] = deque()  # unreferenced graphs, for a thread to close
_closers: set[object] = set()  # the threads that close them
_closing: set[object] = set()  # other threads that close a graph
_handed_over = False
_late = False  # whether `_flush_all` was registered after the thread pools of the standard library


#: The number of numbers that `next_number` has returned. A signal handler may take the lock again, in the same thread.
_numbers = 0
_numbering = threading.RLock()


def next_number() -> int:
    """A number, from 1 on, that no other call returns, in whatever thread: the names of nodes are made of it."""
    global _numbers
    with _numbering:
        _numbers = number = _numbers + 1
    return number


def guard(node: Node, opened_at: str | None = None) -> None:
    """Close `node`, the top of a graph, if its users do not. `opened_at`: the line of code that opened it, as "file:line"; by
    default the innermost one outside Lamina. The guards of the nodes beneath it that have no root end, since `node` closes
    them."""
    node.opened_at = opened_at or caller()
    _guarded.add(node)
    for below in node.beneath():
        if below is not node and below.opened_at is not None and not any(edge.is_root for edge in below.parents()):
            release(below)
    if not _late and "concurrent.futures.thread" in sys.modules:
        before_pools()


def inherit(node: Node) -> None:
    """Guard `node`, to which a root is added, if a node beneath it is guarded: otherwise nothing would close that one when
    its own users are gone and `node` is forgotten."""
    if node.opened_at is None:
        where = next((below.opened_at for below in node.beneath() if below.opened_at is not None), None)
        if where is not None:
            guard(node, where)


def lost_root(node: Node, others: Iterable[Node]) -> None:
    """`node` lost its last root, and edges of other nodes are left: its guard ends if a guarded node, one of `others`, is
    above it. If not, the guard stays: an interrupt may drop such an edge before its node has a guard."""
    if any(other.opened_at is not None and node in other.beneath() for other in others if other is not node):
        release(node)


def release(node: Node) -> None:
    """End the guard of `node`: a node above closes it, or it is no longer part of a graph."""
    node.opened_at = None
    _guarded.discard(node)


def forget(node: Node) -> None:
    """Called by the finalizer of a guarded node: if the node is open, another thread closes it."""
    where, node.opened_at = node.opened_at, None
    if where is None or not node.held:
        return
    _forgotten.append(node)
    if len(_closers) < 2:  # two, since the first one may be about to end
        with suppress(RuntimeError):  # too many threads, or too late: the end of the program closes it
            _thread.start_new_thread(_close_forgotten, ())
    _warn(node, where)


@contextmanager
def closing() -> Iterator[None]:
    """Make exit wait for the calling thread, a daemon, as it does for requests."""
    me = object()
    _closing.add(me)
    try:
        yield
    finally:
        _closing.discard(me)


def before_pools() -> None:
    """Make exit flush graphs before thread pools stop. Called before the first pool is created: functions that are registered
    last run first."""
    global _late
    _late = "concurrent.futures.thread" in sys.modules
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with suppress(RuntimeError):  # the program is ending: the registered functions run
            register(_flush_all)


@contextmanager
def handing_over() -> Iterator[None]:
    """A process forked inside this context becomes the owner of all graphs, and its parent no longer uses them."""
    global _handed_over
    _handed_over = True
    try:
        yield
    finally:
        _handed_over = False


def handed_over() -> bool:
    """Whether a process that is forked now becomes the owner of the graphs."""
    return _handed_over


def caller() -> str:
    """File and line of the innermost frame outside Lamina, and outside the module whose context managers it uses."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "lamina",
        "contextlib",
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _warn(node: Node, opened_at: str) -> None:
    text = f"{node.filename}, opened at {opened_at}, was never closed: close it, or open it in a `with` statement"
    # A finalizer, or the end of the program, calls this: no frame of the stack belongs to the line that opened it.
    file, _, line = opened_at.rpartition(":")
    warnings.warn_explicit(text, ResourceWarning, file, int(line), source=node)


def _close_forgotten() -> None:
    me = object()
    _closers.add(me)
    while True:
        try:
            node = _forgotten.popleft()
        except IndexError:
            _closers.discard(me)
            if not _forgotten:  # checked after this thread was removed: a later call starts another one
                return
            _closers.add(me)
            continue
        _settle(node, node.graph.exclusively if node.graph is not None else None)
        del node


def _settle(node: Node, exclusively: Callable[[str, Callable[[], None]], None] | None = None) -> None:
    """Close a graph, by default at the same time as other work in it."""
    try:
        if exclusively is None:
            node.close()
        else:
            exclusively("closes a forgotten image", node.close)
    except Exception as error:  # noqa: BLE001 - no caller could catch it
        node.warn("%s was never closed, and its buffered data could not be written: %s", node.filename, error)


def all_of(things: WeakSet[T]) -> list[T]:
    while True:
        try:
            return list(things)
        except RuntimeError:  # another thread opened something meanwhile
            continue


def _flush_all() -> None:
    """Flush all graphs at the start of exit, while other threads and thread pools still run."""
    for node in [*(root.node for root in all_of(roots)), *all_of(_guarded)]:
        if node.held and not node.read_only:
            try:
                node.flush()
            except LaminaError as error:
                node.warn("%s could not be flushed at the end of the program: %s", node.filename, error)


def _close_all() -> None:
    """Close all graphs when no thread but daemons runs any more."""
    deadline = time.monotonic() + _PATIENCE
    open_roots = all_of(roots)
    for root in open_roots:
        root.refuse()
    while (
        _closers or _closing or _forgotten or any(root.gate.inside for root in open_roots)
    ) and time.monotonic() < deadline:
        if _forgotten and not _closers:
            _close_forgotten()
        time.sleep(_POLL_INTERVAL)
    _flush_all()
    if _closing or any(root.gate.inside for root in open_roots):
        return  # the descriptor of a request in progress stays open until the process has ended
    for node in _from_the_top([node for node in all_of(_guarded) if node.held]):
        where = node.opened_at
        if where is not None and node.held:
            try:
                _warn(node, where)
            finally:
                release(node)
                _settle(node)


def _from_the_top(tops: list[Node]) -> list[Node]:
    """The same nodes, each before the nodes below it, to which its close writes buffered data."""
    ordered: list[Node] = []
    while tops:
        below = {id(node) for top in tops for child in top.children.values() for node in child.node.beneath()}
        ordered += [node for node in tops if id(node) not in below]
        tops = [node for node in tops if id(node) in below]
    return ordered


# -- forks


def _in_child() -> None:
    if _handed_over:
        return
    while True:
        try:
            _disown(list(_forgotten))
            return
        except KeyboardInterrupt:  # from the beginning: a node that is left out would write to the files of the parent
            continue


def _disown(forgotten: list[Node]) -> None:
    _closers.clear()
    _closing.clear()
    gates = [root.gate for root in all_of(roots)]
    everything: list[Inherited] = [*gates, *all_of(nodes), *forgotten, *all_of(connected)]
    for inherited in everything:
        try:
            inherited.after_fork()
        except Exception as error:  # noqa: BLE001 - one that fails must not keep the others from it
            _report(inherited, error)
    for node in forgotten:
        node.close()
    _forgotten.clear()


def _report(inherited: Inherited, error: Exception) -> None:
    import logging

    logging.getLogger("lamina").warning("%r is not usable in this forked process: %r", inherited, error)


_LOCKS = (_thread.LockType, _thread.RLock, threading.Condition)


#: Longer lists contain stored data of a node, not its parts.
_FEW = 64


def renew_locks(thing: Any, seen: set[int]) -> None:
    """Free the locks in the attributes of `thing`, a node or a part of one: the threads that held them do not exist in the
    child. Thread pools are forgotten."""
    seen.add(id(thing))
    slots = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
    for name in {*getattr(thing, "__dict__", ()), *slots}:
        value = getattr(thing, name, None)
        if isinstance(value, _LOCKS):
            value._at_fork_reinit()  # type: ignore[union-attr]
        elif isinstance(value, RangeLock):
            setattr(thing, name, RangeLock())
        elif type(value).__name__ == "ThreadPoolExecutor":
            setattr(thing, name, None)
        elif _is_part(value) and id(value) not in seen:
            renew_locks(value, seen)
        elif isinstance(value, dict | list | tuple) and len(value) <= _FEW:
            for part in value.values() if isinstance(value, dict) else value:
                if _is_part(part) and id(part) not in seen:
                    renew_locks(part, seen)


def _is_part(value: object) -> bool:
    """Whether it may be a part of one node; other nodes and edges free their own locks."""
    kind = type(value)
    return kind.__module__.startswith("lamina.") and not hasattr(kind, "after_fork") and kind.__name__ != "Child"


atexit.register(_close_all)
before_pools()
after_fork_in_child(_numbering._at_fork_reinit)  # type: ignore[attr-defined]  # a thread of the parent may hold it
after_fork_in_child(_in_child)
