"""One connection of a client, shared by its threads, with what happens when it breaks.

No thread of its own: whoever waits for a reply becomes the receiver for all (the leader), and hands that on when its own
reply is there. Who sends while the server cannot take more receives meanwhile, so that two full sockets never wait for each
other. A connection that breaks is made anew, where that was asked for, and what was not answered is sent again.
"""

from __future__ import annotations

import copy
import errno
import select
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import WeakSet

from ..errors import BlockIOError, Closed, LaminaError
from ..limits import KIB
from . import wire
from .channel import Buffer, Channel
from .client_connection import PASSING, leave, lost, passes
from .client_facts import Facts
from .client_session import Request, Transmission

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .uri import Target

#: So many requests on their way fit into the buffers of both sockets even if nobody reads there: headers and replies of a
#: few bytes each, which a Unix socket counts as a kilobyte. Beyond that, who sends looks whether it can.
_FIT: Final = 100
#: Then a payload goes out in pieces of this many bytes: a socket that takes anything takes so much.
_PIECE: Final = 32 * KIB
#: Seconds that `close` waits for a reply, where no time limit was given.
_CLOSING: Final = 30.0
#: The first and the longest pause between attempts to connect again, in seconds.
_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
_CHANGES: Final = (wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES)


class Pending(ABC):
    """A request that was started. `wait` may be called by any thread, and again: the outcome stays."""

    __slots__ = ()

    @abstractmethod
    def wait(self) -> Any:
        """The outcome, when it is there: None, or the status of blocks. Raises what the request failed with."""


class Sent(Request, Pending):
    """A request on its way over one link. Times are those of `time.monotonic`."""

    __slots__ = ("covers", "link", "lost_at", "started")
    link: Link
    #: When its connection was first lost, or 0; when it was sent.
    lost_at: float
    started: float
    #: Of a flush: whether there was something to flush.
    covers: bool

    def wait(self) -> Any:
        if not self.done:
            self.link.wait(self)
        if self.error is not None:
            raise self.error
        return self.status


class Durability:
    """What the client knows of writes that were answered and not flushed, over all links. Thread-safe: each change is a
    single assignment, and where two race, more is taken for lost than is."""

    __slots__ = ("answered", "doubtful")

    def __init__(self) -> None:
        #: Changes were answered since the last flush began.
        self.answered = False
        #: Such changes were there when a connection broke: the next flush must fail.
        self.doubtful = False

    def error(self) -> BlockIOError:
        """For the one flush that tells of it."""
        self.doubtful = False
        return BlockIOError(
            "the connection was lost after writes that were not flushed: the server may have restarted without them",
            errno=errno.EIO,
            operation="flush",
            hint="write again what was written since the last flush",
        )


#: All that are not closed, for `abandon_all`.
_open_links: WeakSet[Link] = WeakSet()


def abandon_all() -> None:
    """Break every connection of this process and make none anew: whoever waits for a server gets an error now. For a program
    that ends and whose server says nothing; from any thread."""
    while True:
        try:
            links = list(_open_links)
        except RuntimeError:  # another thread has just made a connection
            continue
        break
    for link in links:
        link.abandon()


class Link:
    """One connection. `reopen`: makes it anew, and has compared what the server says now with what it said before; None: a
    loss is final. `patience`: seconds that one request waits for that. `request_timeout`: seconds for each reply, or None."""

    def __init__(
        self,
        target: Target,
        channel: Channel,
        facts: Facts,
        durability: Durability,
        *,
        reopen: Callable[[], tuple[Channel, Facts]] | None,
        patience: float,
        request_timeout: float | None,
    ) -> None:
        self._target = target
        self._reopen = reopen
        self._patience = patience
        self._timeout = request_timeout
        self._durability = durability
        #: Held to start and send a request, and to exchange the connection.
        self._sending = threading.Lock()
        #: Guards who leads and who waits.
        self._mutex = threading.Lock()
        self._leading = False
        self._waiting: dict[Sent, threading.Lock] = {}
        #: Why nothing can be done any more.
        self._dead: LaminaError | None = None
        #: Why the connection is of no use; who leads next deals with it.
        self._fault: LaminaError | None = None
        self._settle(channel, facts)
        _open_links.add(self)

    def _settle(self, channel: Channel, facts: Facts) -> None:
        self._channel = channel
        self._session = Transmission(facts, postpone=self._reopen is not None)
        self._fault = None
        channel.settimeout(self._timeout)

    # -- requests

    def submit(self, request: Sent) -> None:
        """Send `request`. Never fails but for a link that is dead: what happens to it on the way, its `wait` tells."""
        request.link = self
        request.lost_at = 0.0
        request.started = time.monotonic()
        with self._sending:
            if self._dead is not None:
                raise copy.copy(self._dead)
            if self._session.leaving:
                if self._reopen is None:
                    hint = "connect again later"
                    message = "the server is shutting down"
                    raise BlockIOError(message, errno=errno.ESHUTDOWN, path=str(self._target), hint=hint)
                self._session.postponed.append(request)
            elif self._fault is not None and self._reopen is not None:
                self._session.postponed.append(request)
            else:
                self._send(request)

    def _send(self, request: Sent, *, leading: bool = False) -> None:
        session = self._session
        header = session.start(request)
        buffers: Sequence[Buffer] = (header,) if request.payload is None else (header, request.payload)
        try:
            if len(session.in_flight) <= _FIT and (request.payload is None or not session.reads):
                self._channel.send(buffers)
            else:
                self._send_and_receive(buffers, leading)
        except LaminaError as error:
            # What the server still said is worth reading, and tells that it is gone; but a stuck one says nothing.
            if error.errno == errno.ETIMEDOUT:
                self._break(error)

    def _send_and_receive(self, buffers: Sequence[Buffer], leading: bool) -> None:
        """Send `buffers` as the server takes them; while it does not, take what it sends, unless another thread does.
        `leading`: this thread is the leader already."""
        poll = select.poll()
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), _PIECE):
                while not self._may_send(poll, leading):
                    if self._fault is not None:
                        return
                self._channel.send((view[at : at + _PIECE],))

    def _may_send(self, poll: select.poll, leading: bool) -> bool:
        """Whether the socket takes a piece; receives once if it does not, and something is there."""
        number = self._channel.fileno()
        if number < 0:
            self._fault = self._fault or lost(self._target)
            return False
        with self._mutex:
            lead = leading or not self._leading
            self._leading = True
        try:
            # Another thread that receives may stop at any time: look again soon.
            poll.register(number, select.POLLOUT | (select.POLLIN if lead else 0))
            limit = 20 if not lead else None if self._timeout is None else max(1, int(self._timeout * 1000))
            events = poll.poll(limit)
            poll.unregister(number)
            if any(event & select.POLLOUT for _, event in events):
                return True
            if lead and events:
                self._receive(None)
            elif lead:
                self._break(self._overdue())
            return False
        finally:
            if lead and not leading:
                self._hand_on()

    # -- waiting

    def wait(self, request: Sent) -> None:
        """Until `request` is done."""
        while not request.done:
            with self._mutex:
                if request.done:
                    return
                waiter = None
                if self._leading:
                    waiter = self._waiting.get(request)
                    if waiter is None:
                        waiter = self._waiting[request] = threading.Lock()
                        waiter.acquire()
                else:
                    self._leading = True
            if waiter is None:
                try:
                    self._receive_until(request)
                finally:
                    self._hand_on()
                continue
            left = -1.0 if self._timeout is None else max(request.started + self._timeout - time.monotonic(), 0.001)
            if waiter.acquire(timeout=left):
                waiter.release()  # several threads may wait for one request
            else:
                self._break(self._overdue())

    def _hand_on(self) -> None:
        """The leader leaves: wake whose replies came, and one of the others to lead."""
        with self._mutex:
            self._leading = False
            for request in [request for request in self._waiting if request.done]:
                self._waiting.pop(request).release()
            for request in self._waiting:
                self._waiting.pop(request).release()
                break

    def _receive_until(self, request: Sent) -> None:
        while not request.done:
            if self._fault is not None:
                self._recover(self._fault)
            elif self._session.leaving and not self._session.in_flight:
                self._recover(BlockIOError("the server is shutting down", errno=errno.ESHUTDOWN))
            else:
                self._receive(request)
                late = self._timeout is not None and time.monotonic() > request.started + self._timeout
                if late and not request.done:
                    self._break(self._overdue())
        if self._session.leaving and not self._session.in_flight and self._fault is None and self._reopen is None:
            self._recover(BlockIOError("the server is shutting down", errno=errno.ESHUTDOWN))

    def _receive(self, own: Sent | None) -> None:
        """Receive once, as the leader. What goes wrong is left in `_fault`."""
        try:
            count = self._channel.recv_into(self._session.buffer())
            if not count:
                raise lost(self._target)
            answered = self._session.received(count)
        except LaminaError as error:
            self._break(self._overdue() if self._timeout is not None and error.errno == errno.ETIMEDOUT else error)
            return
        for request in answered:
            if request.command in _CHANGES and request.error is None and not request.flags & wire.CMD_FLAG_FUA:
                self._durability.answered = True
            elif request.command == wire.CMD_FLUSH and request.error is not None:
                self._durability.answered |= request.covers  # type: ignore[attr-defined]
        if answered and (len(answered) > 1 or answered[0] is not own):
            with self._mutex:
                for request in answered:
                    waiter = self._waiting.pop(request, None)  # type: ignore[call-overload]
                    if waiter is not None:
                        waiter.release()

    # -- when it breaks

    def _overdue(self) -> BlockIOError:
        message = f"no reply within {self._timeout:g} s"
        return BlockIOError(message, errno=errno.ETIMEDOUT, path=str(self._target))

    def _break(self, error: LaminaError) -> None:
        """The connection is of no use any more; wakes whoever is blocked in it."""
        if self._fault is None:
            self._fault = error
        self._channel.close()

    def _recover(self, cause: LaminaError) -> None:
        """The leader finds the connection broken, or its server leaving: make it anew and send again what was not answered,
        or fail all of it."""
        if self._fault is not None:
            self._channel.close()  # whoever is stuck in sending comes out, and lets go
        with self._sending:
            if self._fault is None:
                leave(self._channel, self._session.disconnect())
                self._fault = cause
            requests = self._unanswered()
            durability = self._durability
            if durability.answered or any(r.covers for r in requests if r.command == wire.CMD_FLUSH):
                durability.answered, durability.doubtful = False, True
            if self._reopen is None or cause.errno not in PASSING:
                self._dead = cause
                self._fail(requests, cause)
                return
            if durability.doubtful:
                for flush in [request for request in requests if request.command == wire.CMD_FLUSH]:
                    self._fail([flush], durability.error())
            now = time.monotonic()
            for request in requests:
                request.lost_at = request.lost_at or now
            # A request that breaks every connection it is sent over does not do so for ever.
            self._fail([request for request in requests if now - request.lost_at > self._patience], cause)
            waiting = [request for request in requests if not request.done]
            try:
                channel, facts = self._reopen()
            except LaminaError as error:
                if not passes(error):
                    self._dead = error
                self._fail(waiting, error)
                return
            self._settle(channel, facts)
            for number, request in enumerate(waiting):
                if self._fault is not None:
                    self._session.postponed += waiting[number:]
                    return
                request.restart()
                request.started = time.monotonic()
                self._send(request, leading=True)

    def _unanswered(self) -> list[Sent]:
        """All requests that wait for a reply, oldest first; the session has none of them any more."""
        session = self._session
        requests = cast("list[Sent]", [*session.in_flight.values(), *session.postponed])
        session.in_flight.clear()
        session.postponed.clear()
        return requests

    def _fail(self, requests: list[Sent], error: LaminaError) -> None:
        with self._mutex:
            for request in requests:
                request.error = copy.copy(error)
                request.done = True
                if (waiter := self._waiting.pop(request, None)) is not None:
                    waiter.release()

    # -- the end

    def abandon(self) -> None:
        """Break the connection, and make it anew no more. From any thread, also while others are inside."""
        self._reopen = None
        self._break(BlockIOError("the connection was given up", errno=errno.ECANCELED, path=str(self._target)))

    def close(self) -> None:
        """Wait for what is on its way (no connection is made anew for it), say goodbye, close. From one thread."""
        with self._sending:
            self._reopen = None
            session = self._session
            requests = cast("list[Sent]", [*session.in_flight.values(), *session.postponed])
            if self._timeout is None and requests and self._fault is None:
                self._timeout = _CLOSING
                for request in requests:
                    request.started = time.monotonic()
                self._channel.settimeout(_CLOSING)
        for request in requests:
            self.wait(request)
        with self._sending:
            farewell = self._session.disconnect() if self._fault is None and self._dead is None else b""
            self._dead = Closed("the connection was closed", path=str(self._target))
            leave(self._channel, farewell)

    def forsake(self) -> None:
        """After a fork, in the child: no lock is taken, since threads that only the parent has may hold them."""
        self._channel.forsake()
