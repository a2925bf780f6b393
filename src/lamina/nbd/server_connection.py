"""One client of a server: its negotiation, then its requests, from the first byte to the last.

A connection is one thread that receives, executes (`server_commands.py`) and answers. One receive brings many requests and
one send takes many replies, so that a request costs microseconds. Where storage is slow, waiting for one request would hold
up the others: then requests go to the server's pool of threads, and each is answered when it is done.

Memory: 1 MiB of requests (`server_session.ROOM`) and 1 MiB of replies (`server_commands.SLAB`) for each client, and 1 MiB
more for each request in the pool. Nothing is allocated by a length that a client names.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..errors import BlockIOError, LaminaError
from . import wire
from .server_commands import SLAB, Commands
from .server_negotiation import Agreed, Negotiation, Phase
from .server_session import PART, REFUSED, Request, Transmission

if TYPE_CHECKING:
    import ssl

    from .channel import PlainChannel, TlsChannel
    from .exports import View

log = logging.getLogger("lamina.nbd")

#: Seconds that a request may take on average before the others do not wait for it any more.
_SLOW = 0.001
#: Seconds that a client waits for its turn.
_PATIENCE = 0.002
#: Requests of one client that are in the pool at a time.
_IN_POOL = 16


class Turn:
    """Lets one client at a time execute what it received, as long as that is quick: threads that meet at every system call
    cost more than they gain. Nobody waits long: behind one that stands still (in slow storage, or because its client does
    not read) the others begin a new line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self) -> threading.Lock:
        """A lock that is held; release it when it is the next one's turn."""
        lock = self._lock
        if not lock.acquire(timeout=_PATIENCE):
            lock = self._lock = threading.Lock()
            lock.acquire()
        return lock


class Connection:
    """A client. `run` does everything, in a thread of its own; `drain` and `close` come from other threads.

    `view`: the exports, as this client may see them. `tls`: "off", "allow" or "require", with `context` for the handshake and
    `admit(names)` to say whom TLS lets in. `admitted()` is called when transmission begins; False: there is no room.
    """

    def __init__(
        self,
        channel: PlainChannel,
        view: View,
        *,
        tls: str = "off",
        context: ssl.SSLContext | None = None,
        admit: Callable[[Sequence[str]], bool] = lambda names: True,
        handshake_time: float = 10.0,
        idle_time: float | None = None,
        admitted: Callable[[], bool] = lambda: True,
        pool: Callable[[], ThreadPoolExecutor],
        turn: Turn,
    ) -> None:
        self.channel: PlainChannel | TlsChannel = channel
        self._plain = channel
        self.peer = channel.peer
        self.begun = time.monotonic()
        self.export_name: str | None = None
        #: Requests by command, bytes read and written, requests that failed.
        self.counts = dict.fromkeys((*wire.COMMAND_NAMES.values(), "failed", "bytes_read", "bytes_written"), 0)
        self._view = view
        self._tls, self._context, self._admit = tls, context, admit
        self._deadline = self.begun + handshake_time
        self._idle_time = idle_time
        self._admitted = admitted
        self._pool, self._turn = pool, turn
        self._negotiation: Negotiation | None = None
        self.draining = False
        self._slots = threading.Semaphore(_IN_POOL)
        #: Held while an answer is sent that must not have others in between, if it takes several sends.
        self.sending = threading.RLock()
        #: Seconds that a request takes, of late. Storage that is not known yet counts as slow.
        self._mean = 2 * _SLOW

    # -- life

    def run(self) -> None:
        """Serve the client until it leaves. Raises nothing: what goes wrong is this client's affair, and logged."""
        why = "left"
        try:
            agreed = self._negotiate()
            if agreed is not None:
                self.export_name = agreed.export.name
                log.info("%s: opened %r (%s)", self.peer, agreed.export.name, self._manner(agreed))
                self.channel.settimeout(self._idle_time)
                why = self._transmit(Transmission(agreed), agreed)
        except LaminaError as error:
            why = "ended by the server" if self.draining else error.message
        except Exception:
            log.exception("%s: an error of the server itself", self.peer)
            why = "an error of the server itself"
        finally:
            self.channel.close()
            self._view.close()
        log.info("%s: %s after %.1f s, %s", self.peer, why, time.monotonic() - self.begun, self._summary())

    def drain(self) -> None:
        """The server ends: what was received is answered, new requests are refused, and no more is received."""
        self.draining = True
        if self._negotiation is not None:
            self._negotiation.shutting_down = True
        self._plain.end_input()

    def close(self) -> None:
        """End it now."""
        self._plain.close()

    @property
    def transmitting(self) -> bool:
        return self.export_name is not None

    # -- negotiation

    def _negotiate(self) -> Agreed | None:
        negotiation = Negotiation(self._view, tls=self._tls, reports=lambda text: log.info("%s: %s", self.peer, text))
        self._negotiation = negotiation
        negotiation.shutting_down = self.draining
        while True:
            out = negotiation.take()
            if negotiation.phase is Phase.TRANSMISSION and not self._admitted():
                raise BlockIOError("the server has as many clients as it may have")
            self._keep_time()
            if out:
                self.channel.send(out)
            if negotiation.phase is Phase.TRANSMISSION:
                return negotiation.agreed
            if negotiation.phase is Phase.CLOSED:
                return None
            if negotiation.phase is Phase.STARTTLS:
                self._secure(negotiation)
                continue
            view = negotiation.buffer()
            count = self.channel.recv_into(view)
            if not count:
                return None
            negotiation.received(count)

    def _keep_time(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BlockIOError("the negotiation took too long")
        self.channel.settimeout(left)

    def _secure(self, negotiation: Negotiation) -> None:
        assert self._context is not None  # STARTTLS is refused without one
        left = max(self._deadline - time.monotonic(), 0.1)
        secured = self._plain.start_tls(self._context, server_side=True, timeout=left)
        self.channel = secured
        if not self._admit(secured.peer_names):
            raise BlockIOError(f"its certificate is not on the list: {', '.join(secured.peer_names) or 'it has none'}")
        self._view = self._view.secured(secured.peer_names)
        negotiation.secured(self._view)

    def _manner(self, agreed: Agreed) -> str:
        replies = (
            "extended headers" if agreed.extended else "structured replies" if agreed.structured else "simple replies"
        )
        return f"TLS, {replies}" if self.channel.secure else replies

    def _summary(self) -> str:
        done = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        return done or "nothing asked"

    # -- transmission

    def _transmit(self, session: Transmission, agreed: Agreed) -> str:
        channel = self.channel
        commands = Commands(self, session, agreed, SLAB)
        try:
            while not session.finished:
                count = channel.recv_into(session.buffer())
                if not count:
                    return "ended by the server" if self.draining else "gone without a farewell"
                requests = session.received(count)
                if requests:
                    self._answer(commands, requests)
        finally:
            self._wait_for_pool()
        return "left" if session.violation is None else f"dropped: {session.violation}"

    def _answer(self, commands: Commands, requests: list[Request]) -> None:
        """See to it that these are answered: here and now if that is quick or there is but one, else in the pool."""
        if self._mean > _SLOW and len(requests) > 1:
            self._answer_in_pool(commands, requests)
            return
        turn = self._turn.take() if self._mean <= _SLOW else None
        begun = time.monotonic()
        try:
            commands.answer(requests)
        finally:
            if turn is not None:
                turn.release()
        self._took((time.monotonic() - begun) / len(requests))

    def _took(self, seconds: float) -> None:
        self._mean += (seconds - self._mean) / 8

    def _answer_in_pool(self, commands: Commands, requests: list[Request]) -> None:
        for request in requests:
            if request.type in (PART, REFUSED, wire.CMD_DISC):
                commands.answer([request])
                continue
            if request.type == wire.CMD_WRITE:
                request = request._replace(payload=memoryview(bytes(request.payload)))  # its place is used again
            self._slots.acquire()
            try:
                self._pool().submit(self._one, commands, request)
            except RuntimeError:  # the server ends, and its pool has
                self._slots.release()
                commands.answer([request])

    def _one(self, commands: Commands, request: Request) -> None:
        begun = time.monotonic()
        try:
            commands.for_one(request).answer([request])
        except LaminaError as error:
            log.debug("%s: %s", self.peer, error)  # the connection is gone: its own thread says so
        finally:
            self._took(time.monotonic() - begun)
            self._slots.release()

    def _wait_for_pool(self) -> None:
        for _ in range(_IN_POOL):
            self._slots.acquire()
        self._slots.release(_IN_POOL)
