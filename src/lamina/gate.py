"""The gate of a graph: requests pass while it is open; edits, changes of size and closings hold it one after the other.

A request brings a token, and is inside the gate as long as the token is a key of `Gate.inside`. Adding and taking out are
single steps of the interpreter that may be repeated, so passing takes no lock, and an interrupt at any point leaves no token
behind, provided that the request takes its token out twice (the second time counts where an interrupt cut off the first):

    try:
        try:
            gate.enter(token, root)
            ...
        finally:
            gate.inside.pop(token, None)
    finally:
        gate.inside.pop(token, None)

The token of a request that one thread makes from its beginning to its end is the number of that thread, so that a thread
inside a request is known by it: it makes no other one (see `Gate.require_outside`). `Root` does all this for its users.

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

#: How often a thread that waits at a gate looks again, in seconds.
_LOOK_AGAIN = 0.0005

_Result = TypeVar("_Result")


class User(Protocol):
    """Whose requests pass a gate: a `Root`."""

    #: Whether its further requests are refused.
    closing: bool


class Holder:
    """A thread that holds a gate, or waits until it may. `what` it does, for messages ("edits the graph"); `stops`: no
    request passes while it holds the gate."""

    __slots__ = ("stops", "thread", "what")

    def __init__(self, what: str, *, stops: bool = True) -> None:
        self.what = what
        self.stops = stops
        self.thread = get_ident()


class Gate:
    """See above. A thread that holds the gate releases it as a request takes out its token: twice, and whatever became of
    taking it. `release` is a call of C code: it is done when an interrupt can strike, even if a second one comes directly
    behind it."""

    __slots__ = ("_line", "holders", "inside", "release")

    def __init__(self) -> None:
        #: The requests that are inside: token -> whose request it is.
        self.inside: dict[object, User] = {}
        #: The threads that hold the gate or wait for it. Empty while nobody does: the question that each request asks.
        self.holders: set[Holder] = set()
        #: Give the gate up, or the wish to hold it.
        self.release: Callable[[Holder], None] = self.holders.discard
        #: The holders in the order of arrival, and some who left.
        self._line: list[Holder] = []

    # -- requests

    def enter(self, token: object, user: User, *, wait: bool = True) -> bool:
        """Let a request of `user` in. Where the gate is shut: wait, or return False if `wait` is false. Raises Closed if
        `user` is closing, and LaminaError if this thread is inside a request of its own, or is the one that shut the gate."""
        self.require_outside("make another")
        self.inside[token] = user
        # Asked after entering: a thread that shuts the gate then sees this request inside, or this request sees the thread.
        return not (self.holders or user.closing) or self.wait(token, user, wait=wait)

    def leave(self, token: object) -> None:
        """The request is finished. May be called again."""
        self.inside.pop(token, None)

    def wait(self, token: object, user: User, *, wait: bool = True) -> bool:
        """What `enter` does where somebody holds the gate, or `user` is closing."""
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
            time.sleep(_LOOK_AGAIN)
            self.inside[token] = user

    def drain(self, user: User) -> None:
        """Wait until no request of `user` is inside. Let it be closing before."""
        while user in (inside := self.inside.copy()).values():
            if not _finish_started(token for token in inside if inside[token] is user):
                time.sleep(_LOOK_AGAIN)

    def require_outside(self, what: str) -> None:
        """Raise LaminaError if this thread is inside a request: a signal handler, or a node below, asks for something that
        might wait for the end of that request."""
        if get_ident() in self.inside:
            raise LaminaError(
                f"this thread is inside a request of this image, and cannot {what} before that is done",
                hint="do it after the request (not in a signal handler), or in another thread",
            )

    # -- whoever holds the gate

    def holder(self) -> Holder | None:
        """Who holds the gate: the first in the line who has not left."""
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
        """Whether this thread holds the gate."""
        holder = self.holder()
        return holder is not None and holder.thread == get_ident()

    def take(self, holder: Holder) -> None:
        """Hold the gate, after those who came earlier. Where the holder stops requests, wait until all have left. Call
        `release` afterwards, whatever this raises."""
        self.require_outside("change the graph or close an image")
        self.holders.add(holder)
        self._line.append(holder)  # behind that: who is in the line and not among the holders has left
        while (first := self.holder()) is not holder:
            if first is not None:
                _require_another_thread(first, "edit, close or resize the image")
            time.sleep(_LOOK_AGAIN)
        while holder.stops and self.inside:
            if not _finish_started(self.inside.copy()):
                time.sleep(_LOOK_AGAIN)

    def holding(self, holder: Holder, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """What `work(*arguments)` returns, called while `holder` holds the gate."""
        try:
            try:
                self.take(holder)
                return work(*arguments)
            finally:
                self.release(holder)
        finally:
            self.release(holder)

    def require_free(self, what: str) -> None:
        """Raise LaminaError if this thread holds the gate, or is inside a request: it would wait for itself."""
        self.require_outside(what)
        holder = self.holder()
        if holder is not None:
            _require_another_thread(holder, what)

    def after_fork(self) -> None:
        """In a child process: requests and holders belong to threads that only the parent has."""
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
