"""One connection of a client, which its threads share, and its recovery.

The link has no thread of its own. One of the threads that wait for replies, the leader, receives for all; when its own reply
arrives, another thread becomes the leader. A thread that sends receives as well while the server takes no more bytes, so two
full sockets never wait for each other. If reconnecting is enabled, the link replaces a broken connection and sends the
requests without a reply again.

An exception (Ctrl-C) may strike at any line. So a thread takes bytes from the connection only under a lock that it does not
hold while it waits, and two leaders do no harm; a leader is registered for a second at a time, and waiting threads check as
often whether there is one. An exception in the middle of a message breaks the connection, and the link reconnects even if
that is not enabled; an exception anywhere else leaves the connection as it is. `forget` tells what happens to the request.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, cast

from ...errors import BlockIOError, Closed, LaminaError
from ...limits import KIB
from .. import links, wire
from ..channel import Buffer, Channel
from .connection import TRANSIENT, Check, leave, lost, passes, pause
from .details import ExportDetails
from .request import CHANGES, Durability, Request, Sent
from .times import SHORT, TICK, Clock, Times
from .transmission import Transmission

if TYPE_CHECKING:
    from ..uri import Target

#: So many requests in flight fit into the buffers of both sockets even if the server does not read: headers and replies of a
#: few bytes each, which a Unix socket counts as a kilobyte. With more, a sender checks first whether the socket is writable.
_FIT: Final = 100
#: The length of the pieces in which a payload is then sent: a writable socket takes so many bytes.
_PIECE: Final = 32 * KIB
#: The most seconds for which `close` waits for requests in flight.
_CLOSING: Final = 30.0
#: The seconds for which a leader is registered.
_LEASE: Final = 2 * TICK
#: The first and the longest pause before a reconnect, in seconds. Pauses double until a reply arrives.
_PAUSE, _LONGEST_PAUSE = 0.02, 1.0


class Link:
    """One connection. `reopen`: makes it anew, and has compared what the server says now with what it said before; it calls
    what it is given, which ends the attempt by raising. `patience`: seconds that one request waits for that; 0: a loss is
    final. `times`: how long the server may be silent."""

    def __init__(
        self,
        target: Target,
        channel: Channel,
        details: ExportDetails,
        durability: Durability,
        *,
        reopen: Callable[[Check], tuple[Channel, ExportDetails]],
        patience: float,
        times: Times,
    ) -> None:
        self._target = target
        self._reopen = reopen
        self._patience = patience
        self._clock = Clock(times)
        self._durability = durability
        #: Held to start and send a request, and to exchange the connection.
        self._sending = threading.Lock()
        #: Held to take bytes from the connection, never while a thread waits for the server. Acquired after `_sending`.
        self._taking = threading.Lock()
        #: Guards the leader and the waiting threads. Acquired after both.
        self._mutex = threading.Lock()
        #: The time at which the registration of the leader expires.
        self._led_until = 0.0
        self._waiting: dict[Sent, threading.Lock] = {}
        #: The error of all further requests, if the link is dead.
        self._dead: LaminaError | None = None
        #: The error that broke the connection; the next leader handles it.
        self._fault: LaminaError | None = None
        #: An exception ended a message in the middle; the server is told first.
        self._torn = False
        #: The link does not reconnect any more.
        self._final = False
        #: This process is a child of the one whose connection it is.
        self.inherited: bool = False
        #: The link is reconnecting.
        self._mending = False
        self._pause = 0.0
        self._look_at = 0.0
        self._settle(channel, details)
        links.note(self)

    def _settle(self, channel: Channel, details: ExportDetails) -> None:
        channel.settimeout(self._clock.tick)
        channel.watch = self._watch
        self._channel = channel
        self._session = Transmission(details, postpone=self._patience > 0, on_change=self._durability.note)
        self._torn = False
        self._fault = None

    @property
    def name(self) -> str:
        """The URI of the export."""
        return str(self._target)

    def after_fork(self) -> None:
        self.inherited = True

    # -- requests

    def submit(self, request: Sent) -> None:
        """Send `request`. Never fails but for a link that is dead: what happens to it on the way, its `wait` tells."""
        request.link = self
        with self._sending:
            if self._dead is not None:
                raise copy.copy(self._dead)
            if self._session.leaving and self._patience <= 0:
                raise self._leaving("connect again later")
            if self._session.leaving or self._fault is not None:
                self._session.postponed.append(request)
                return
            try:
                self._send(request)
            except BaseException:
                if self._session.in_flight.get(request.cookie) is request:
                    self._tear()
                raise

    def _send(self, request: Sent) -> None:
        session = self._session
        request.begun = time.monotonic()
        request.before = before = len(session.in_flight)
        if not before:
            self._clock.since = request.begun
        header = session.start(request)
        buffers: Sequence[Buffer] = (header,) if request.payload is None else (header, request.payload)
        try:
            if before < _FIT and (request.payload is None or not session.reads):
                self._channel.send(buffers)
            else:
                self._send_and_receive(buffers)
        except LaminaError as error:
            # What the server still said is worth reading, and tells that it is gone; but a stuck one says nothing.
            if error.errno == errno.ETIMEDOUT:
                self._break(error)

    def _send_and_receive(self, buffers: Sequence[Buffer]) -> None:
        """Send `buffers` as the server takes them; while it does not, take what it sends."""
        channel = self._channel
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), _PIECE):
                while True:
                    readable, writable = channel.wait_ready(self._clock.tick)
                    if self._fault is not None:
                        return
                    if writable:
                        break
                    if readable:
                        self._take(None, eager=False)
                    self._look(time.monotonic())
                piece = view[at : at + _PIECE]
                channel.send((piece,))
                self._clock.moved(len(piece))

    # -- waiting

    def wait(self, request: Sent) -> None:
        """Until `request` is done."""
        while not request.done:
            waiter: threading.Lock | None = None
            with self._mutex:
                if request.done:
                    return
                now = time.monotonic()
                if now < self._led_until:
                    waiter = self._waiting.get(request)
                    if waiter is None:
                        waiter = threading.Lock()
                        waiter.acquire()
                        self._waiting[request] = waiter
                else:
                    self._led_until = now + _LEASE
            if waiter is None:
                try:
                    self._receive_until(request)
                finally:
                    self._hand_on()
            elif waiter.acquire(timeout=_LEASE):
                waiter.release()  # several threads may wait for one request

    def _hand_on(self) -> None:
        """The leader leaves: wake whose replies came, and one of the others to lead."""
        with self._mutex:
            self._led_until = 0.0
            for request in [request for request in self._waiting if request.done]:
                self._waiting.pop(request).release()
            for request in self._waiting:
                self._waiting.pop(request).release()
                break

    def _receive_until(self, request: Sent) -> None:
        while not request.done:
            if self._fault is not None or (self._session.leaving and not self._session.in_flight):
                self._recover()
            elif not self._take(request):
                self._led_until = time.monotonic() + _LEASE
                self._await_input(request)
                self._take(request, eager=False)
                self._look(time.monotonic())
        if self._patience <= 0 and self._session.leaving and not self._session.in_flight and self._fault is None:
            self._recover()

    def _await_input(self, request: Sent) -> None:
        channel = self._channel
        try:
            channel.wait_input()
        except LaminaError as error:
            if channel is self._channel:
                self._break(error)
        if request.cookie not in self._session.in_flight and not request.done and self._sending.acquire(blocking=False):
            # An interrupt in the middle of `_recover` or `submit` could leave a request that is in no list.
            try:
                known = [*self._session.in_flight.values(), *self._session.postponed]
                if self._fault is None and not any(one is request for one in known):
                    self._fail((request,), self.interrupted())
            finally:
                self._sending.release()

    def _take(self, own: Sent | None, *, eager: bool = True) -> bool:
        """Take what has come, if anything has: whether. What goes wrong is left in `_fault`."""
        session, taking = self._session, False
        try:
            with self._taking:
                if session is not self._session or self._fault is not None:
                    return True
                taking = True
                count = self._channel.receive_soon(session.buffer(), eager=eager)
                if count is None:
                    return False
                if not count:
                    raise lost(self._target)
                answered = session.received(count)
        except LaminaError as error:
            self._break(error)
            return True
        except BaseException:
            if taking:
                self._tear()
            raise
        now = time.monotonic()
        if answered:
            self._clock.progress(now)
            self._pause = 0.0
            if len(answered) > 1 or answered[0] is not own:
                with self._mutex:
                    for request in answered:
                        waiter = self._waiting.pop(request, None)  # type: ignore[call-overload]
                        if waiter is not None:
                            waiter.release()
        else:
            self._clock.moved(count)
        if now >= self._look_at:
            self._look(now)
        return True

    # -- time

    def _watch(self, count: int) -> None:
        """The channel sends: the server has just taken `count` bytes, or none for a moment."""
        self._clock.moved(count)
        if self._fault is not None:
            raise copy.copy(self._fault)
        error = self._clock.overdue(list(self._session.in_flight.values()), self.name)
        if error is not None:
            raise error

    def _look(self, now: float) -> None:
        """Break the connection if its server has had its time. Looks now and then."""
        if now < self._look_at or self._fault is not None:
            return
        self._look_at = now + self._clock.tick / 2
        error = self._clock.overdue(list(self._session.in_flight.values()), self.name)
        if error is not None:
            self._break(error)

    # -- interrupted threads

    def forget(self, request: Sent) -> None:
        """The thread that waited for `request` was interrupted. On return its buffers are free: the data of a reply is
        dropped, and the request is not sent again. A change may still be carried out; it is in `Durability.unsettled` until
        the server replies. Waits only for threads that use the buffers at this moment."""
        request.left = True
        self._clock.press()
        # While the connection is made anew nothing is sent, and `left` is looked at before it is.
        sends = request.payload is not None and not self._mending
        with contextlib.ExitStack() as held:
            for lock in (self._sending, self._taking) if sends else (self._taking,):
                taken = lock.acquire(timeout=SHORT)
                if not taken:  # another thread is blocked in a send
                    self._break(self.interrupted())
                    taken = lock.acquire(timeout=SHORT)
                if taken:
                    held.callback(lock.release)
            if request.done:
                return
            try:
                self._session.detach(request)
            except BaseException:
                self._break(self.interrupted())
                raise
            request.payload = None
            known = [*self._session.in_flight.values(), *self._session.postponed]
            if not any(one is request for one in known):
                self._fail((request,), self.interrupted())
            elif request.command in CHANGES:
                self._durability.unsettled.append(request)

    # -- when it breaks

    def _leaving(self, hint: str | None = None) -> BlockIOError:
        return BlockIOError("the server is shutting down", errno=errno.ESHUTDOWN, path=self.name, hint=hint)

    def _break(self, error: LaminaError) -> None:
        """The connection is broken. Wakes the threads that are blocked in it."""
        if self._fault is None:
            error.path = error.path or str(self._target)
            self._fault = error
        self._channel.close()

    def _tear(self) -> None:
        """An exception ended a message in the middle. The server finds the end of the stream, and ends what it is doing."""
        if self._fault is None:
            self._torn = True
            self._fault = self.interrupted()
        self._channel.end_output()

    def _recover(self) -> None:
        """The leader finds the connection broken, or its server leaving: make it anew and send again what was not answered,
        or fail all of it."""
        with self._sending:
            session = self._session
            if self._fault is None:
                if not session.leaving or session.in_flight:
                    return  # another leader was here
                leave(self._channel, session.disconnect())
                self._fault = self._leaving()
            cause, torn = self._fault, self._torn
            if torn and any(request.command in CHANGES for request in list(session.in_flight.values())):
                self._await_end()
            self._channel.close()
            with self._taking:
                requests = self._unanswered()
            durability = self._durability
            if durability.answered or any(r.covers for r in requests if r.command == wire.CMD_FLUSH):
                durability.answered, durability.doubtful = False, True
            self._fail([request for request in requests if request.left], cause)
            if self._final or not (torn or (self._patience > 0 and cause.errno in TRANSIENT)):
                self._dead = self._dead or cause
                self._fail(requests, cause)
                return
            if durability.doubtful:
                for flush in [request for request in requests if request.command == wire.CMD_FLUSH]:
                    self._fail([flush], durability.error())
            if self._clock.pressed and not torn:
                # An interrupted thread does not wait for a silent server, on any connection.
                self._clock.relax()
                self._fail(requests, cause)
                return
            if not torn:
                now = time.monotonic()
                for request in requests:
                    request.lost_at = request.lost_at or now
                # A request that breaks every connection it is sent over does not do so for ever.
                self._fail([request for request in requests if now - request.lost_at > self._patience], cause)
            waiting = [request for request in requests if not request.done]
            session.postponed = list[Request](waiting)
            self._pause, rest = min(max(2 * self._pause, _PAUSE), _LONGEST_PAUSE), self._pause
            self._mending = True
            try:
                pause(0.0 if torn else max(rest, _PAUSE), self._check)
                channel, details = self._reopen(self._check)
            except LaminaError as error:
                if not passes(error) or self._patience <= 0:
                    self._dead = error
                session.postponed = []
                self._fail(waiting, error)
                return
            finally:
                self._mending = False
            try:
                self._settle(channel, details)
            except BaseException:
                channel.close()
                raise
            self._send_again(waiting)

    def _send_again(self, waiting: list[Sent]) -> None:
        session = self._session
        session.postponed = list[Request](waiting)
        for request in waiting:
            if self._fault is not None:
                return
            if request.left:
                self._fail((request,), self.interrupted())
            else:
                request.restart()
                try:
                    self._send(request)
                except BaseException:
                    self._tear()
                    raise
            session.postponed.remove(request)

    def interrupted(self) -> BlockIOError:
        """The error of a request whose outcome is unknown, since the thread that waited for it was interrupted."""
        message = "the request was interrupted, or another one in the middle of a message"
        return BlockIOError(message, errno=errno.EINTR, path=self.name)

    def _check(self) -> None:
        """Raises what ends an attempt to connect again."""
        if self._final:
            raise Closed("the connection was closed", path=self.name)

    def _await_end(self) -> None:
        """Until the server has ended the connection: then nothing that was asked over it is still at work. A short time."""
        deadline = time.monotonic() + SHORT
        nowhere = memoryview(bytearray(64 * KIB))
        with contextlib.suppress(LaminaError):
            while time.monotonic() < deadline and not self._final:
                self._channel.wait_input()
                if self._channel.receive_soon(nowhere, eager=False) == 0:
                    return

    def _unanswered(self) -> list[Sent]:
        """All requests that wait for a reply, oldest first. The session keeps them, as postponed."""
        session = self._session
        requests = cast("dict[Sent, None]", dict.fromkeys([*session.in_flight.values(), *session.postponed]))
        waiting = [request for request in requests if not request.done]
        session.postponed = list[Request](waiting)
        session.in_flight.clear()
        return waiting

    def _fail(self, requests: Iterable[Sent], error: LaminaError) -> None:
        with self._mutex:
            for request in requests:
                if request.done:
                    continue
                request.error = copy.copy(error)
                request.done = True
                if (waiter := self._waiting.pop(request, None)) is not None:
                    waiter.release()

    # -- the end

    def abandon(self) -> None:
        """Break the connection, and make it anew no more. From any thread, also while others are inside."""
        self._final = True
        self._break(BlockIOError("the connection was given up", errno=errno.ECANCELED, path=self.name))

    def hasten(self) -> None:
        """The link is about to be closed: no connection is made anew, and the server has a short time to make progress."""
        self._final = True
        self._clock.urgent = True
        self._clock.press()

    def close(self) -> None:
        """Wait a short time for requests in flight, send DISC, and close. Requests that are not finished fail."""
        self.hasten()
        try:
            with self._sending:
                requests = cast("list[Sent]", [*self._session.in_flight.values(), *self._session.postponed])
            deadline = time.monotonic() + _CLOSING
            for request in requests:
                request.latest = deadline
            for request in requests:
                self.wait(request)
        finally:
            with self._sending:
                farewell = self._session.disconnect() if self._fault is None and self._dead is None else b""
                self._dead = Closed("the connection was closed", path=self.name)
                self._fault = self._fault or self._dead
                try:
                    leave(self._channel, farewell)
                finally:
                    with self._taking:
                        self._fail(self._unanswered(), self._dead)

    def forsake(self) -> None:
        """After a fork, in the child: no lock is taken, since threads that only the parent has may hold them."""
        self._channel.forsake()
