"""The gate of a graph: it admits requests; edits, truncations and closings hold it, one thread at a time.

Each request has a token, and is inside the gate while the token is a key of `Gate.inside`. The interpreter adds or removes a
key in one step, and either step may be repeated. So passing the gate takes no lock, and an interrupt at any point leaves no
token behind, provided that the request removes its token twice (the second removal counts if an interrupt prevented the
first):

    try:
        try:
            gate.enter(token, root)
            ...
        finally:
            gate.inside.pop(token, None)
    finally:
        gate.inside.pop(token, None)

A blocking request uses the identifier of its thread as its token. The gate therefore knows which threads are inside a
request, and refuses further requests of such a thread (`Gate.require_outside`): those of a signal handler, for instance,
which could wait for a range that its own thread has locked. `Root` does all this for its users.

A request that is started now and finished later, possibly by another thread, brings a token of its own (`pending.Holding`),
and stays inside until it is finished. A thread that waits for the requests inside, to hold the gate or to close a root,
finishes those that were started: so a thread that has started some may do anything that waits for them.
"""

from __future__ import annotations

import threading
import time
from _thread import get_ident
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from .errors import Closed, LaminaError
from .pending import Holding

#: The interval in seconds at which a thread that waits at a gate checks it again.
_POLL_INTERVAL = 0.0005

_Result = TypeVar("_Result")


class User(Protocol):
    """The owner of requests: a `Root`."""

    #: Whether the gate refuses further requests of this user.
    closing: bool


class Holder:
    """A thread that holds a gate, or waits for it. `what`: its activity, for messages ("edits the graph"); `stops`: whether
    the gate admits no request while this thread holds it."""

    __slots__ = ("stops", "thread", "what")

    def __init__(self, what: str, *, stops: bool = True) -> None:
        self.what: str = what
        self.stops: bool = stops
        self.thread: int = get_ident()


class Gate:
    """See above. A thread calls `release` twice after `take`, whether or not `take` succeeded. `release` is a C function: an
    interrupt is raised before or after it, never inside, even if a second interrupt follows directly."""

    __slots__ = ("_line", "changes", "holders", "inside", "release")

    def __init__(self) -> None:
        #: The requests that are inside: token -> owner of the request.
        self.inside: dict[object, User] = {}
        #: The threads that hold the gate or wait for it. Usually empty: the only check of a request.
        self.holders: set[Holder] = set()
        #: The number of times that a thread stopped the requests. Knowledge about the graph stays valid while this number
        #: stays the same and no thread holds the gate.
        self.changes: int = 0
        #: Release the gate, or withdraw from the queue for it.
        self.release: Callable[[Holder], None] = self.holders.discard
        #: The same threads in the order of arrival, and some that have withdrawn.
        self._line: list[Holder] = []

    # -- requests

    def enter(self, token: object, user: User, *, wait: bool = True) -> bool:
        """Admit a request of `user`. While a thread holds the gate and stops requests: wait, or return False if `wait` is
        false. Raises Closed if `user` is closing, and LaminaError if the calling thread is inside a request or holds the
        gate."""
        self.require_outside("make another")
        self.inside[token] = user
        # Checked after entering: either a thread that takes the gate sees this request, or this request sees that thread.
        return not (self.holders or user.closing) or self.wait(token, user, wait=wait)

    def leave(self, token: object) -> None:
        """The request is finished. May be called again."""
        self.inside.pop(token, None)

    def wait(self, token: object, user: User, *, wait: bool = True) -> bool:
        """The slow path of `enter`: a thread holds the gate, or `user` is closing."""
        while True:
            if user.closing:
                self.inside.pop(token, None)
                raise Closed("this image was closed")
            holder = self.holder()
            if holder is None or not holder.stops:
                return True
            self.inside.pop(token, None)
            if not wait:
                return False
            _require_another_thread(holder, "make a request")
            time.sleep(_POLL_INTERVAL)
            self.inside[token] = user

    def drain(self, user: User) -> None:
        """Wait until no request of `user`, which is closing, is inside."""
        while user in (inside := self.inside.copy()).values():
            if not _finish_started(token for token in inside if inside[token] is user):
                time.sleep(_POLL_INTERVAL)

    def require_outside(self, what: str) -> None:
        """Raise LaminaError if the calling thread is inside a request: its signal handler, or a node, is about to wait for
        the end of that request."""
        if get_ident() in self.inside:
            raise LaminaError(
                f"this thread is inside a request of this image, and cannot {what} before that is done",
                hint="do it after the request (not in a signal handler), or in another thread",
            )

    # -- the thread that holds the gate

    def holder(self) -> Holder | None:
        """The thread that holds the gate: the first in the queue that has not withdrawn."""
        for holder in tuple(self._line):
            if holder in self.holders:
                return holder
            try:
                self._line.remove(holder)
            except ValueError:  # another thread did
                continue
        return None

    @property
    def held_here(self) -> bool:
        """Whether the calling thread holds the gate."""
        holder = self.holder()
        return holder is not None and holder.thread == get_ident()

    def take(self, holder: Holder) -> None:
        """Wait for the gate, in the order of arrival, and, if `holder` stops requests, until all requests have left. Call
        `release` afterwards, also after an exception."""
        self.require_outside("change the graph or close an image")
        self.holders.add(holder)
        self._line.append(holder)  # last, since `holder()` removes an entry of the queue that is not among the holders
        while (first := self.holder()) is not holder:
            if first is not None:
                _require_another_thread(first, "edit, close or resize the image")
            time.sleep(_POLL_INTERVAL)
        while holder.stops and self.inside:
            if not _finish_started(self.inside.copy()):
                time.sleep(_POLL_INTERVAL)
        if holder.stops:
            self.changes += 1  # by the one thread that holds the gate, before it changes anything

    def holding(self, holder: Holder, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call `work(*arguments)` while `holder` holds the gate, and return its result."""
        try:
            try:
                self.take(holder)
                return work(*arguments)
            finally:
                self.release(holder)
        finally:
            self.release(holder)

    def require_free(self, what: str) -> None:
        """Raise LaminaError if the calling thread holds the gate or is inside a request, and would wait for itself."""
        self.require_outside(what)
        holder = self.holder()
        if holder is not None:
            _require_another_thread(holder, what)

    def after_fork(self) -> None:
        """In a forked process: the requests and holders belong to threads of the parent."""
        self.inside.clear()
        self.holders.clear()
        self._line.clear()


def _finish_started(tokens: Iterable[object]) -> bool:
    """Finish the requests that were started: whether any of the tokens is one."""
    found = False
    for token in tokens:
        found = (isinstance(token, Holding) and token.settle()) or found
    return found


def _require_another_thread(holder: Holder, what: str) -> None:
    if holder.thread == threading.get_ident():
        raise LaminaError(
            f"this thread {holder.what}, and cannot {what} before that is done",
            hint="do it afterwards, or in another thread",
        )
