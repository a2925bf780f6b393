"""One client of a server: its negotiation, then its requests, from the first byte to the last.

Which thread executes a request is said in the docstring of this package.

Memory: 1 MiB of requests (`transmission.ROOM`) and 1 MiB of replies (`commands.SLAB`) for each client, and up to 1 MiB more
for each of its 16 requests that are in the pool, or answered and not sent; all clients together have as much as the server
has (`pool.Memory`). The length that a client names allocates nothing.

Time: the thread that accepts clients looks at all of them now and then (`overdue`), and puts out those that stopped. A client
that does not take its replies is disconnected by the time limit of the socket.
"""

from __future__ import annotations

import logging
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from errno import ETIMEDOUT
from typing import TYPE_CHECKING, Final

from ...errors import BlockIOError, LaminaError
from ...limits import KIB
from .. import wire
from .commands import SLAB, STEP, STEPPED, Commands
from .loop import Loop
from .negotiation import Agreed, Negotiation, Phase
from .pool import Memory, Speed, StoragePool
from .transmission import PART, REFUSED, ROOM, Request, Transmission
from .waits import Waits

if TYPE_CHECKING:
    import ssl

    from ..channel import Buffer, PlainChannel
    from ..tls_channel import TlsChannel
    from .export import Export
    from .exports import VisibleExports

log = logging.getLogger("lamina.nbd")

#: Bytes from which on a request counts as long.
_LONG = 64 * KIB
#: Requests that the loop of several clients executes for one of them at a time.
_SOME = 256
#: So many of these are answered at once: the client works on them while the others are executed. (Of four clients with 16
#: requests each, 180,000 a second instead of 165,000.)
_PIECE = 8
#: Requests of one client that the pool has at a time, and how many of these may be long ones.
_IN_POOL, _LONG_ONES = 16, 2
#: What a client takes of the server's memory: where requests are received, and where replies are gathered.
CLIENT_MEMORY: Final = ROOM + SLAB


class Connection:
    """A client. `run` does everything, in a thread of its own; `drain` and `close` come from other threads.

    `view`: the exports, as this client may see them. `tls`: "off", "allow" or "require", with `context` for the handshake and
    `admit(names)` to say whom TLS lets in. `admitted()` is called when transmission begins; False: there is no room.
    """

    def __init__(
        self,
        channel: PlainChannel,
        view: VisibleExports,
        *,
        tls: str = "off",
        context: ssl.SSLContext | None = None,
        admit: Callable[[Sequence[str]], bool] = lambda names: True,
        handshake_time: float = 10.0,
        idle_time: float | None = None,
        stall_time: float | None = None,
        memory: Memory,
        admitted: Callable[[], bool] = lambda: True,
        pool: Callable[[Export], StoragePool],
        loop: Loop,
    ) -> None:
        self.channel: PlainChannel | TlsChannel = channel
        self._plain = channel
        self.peer = channel.peer
        #: Where the client is, without the port.
        self.origin = channel.peer.rpartition(":")[0] or channel.peer
        self.begun = time.monotonic()
        self.export_name: str | None = None
        #: That for which `pool` was asked.
        self.export: Export | None = None
        #: Requests by command, bytes read and written, requests that failed.
        self.counts = dict.fromkeys((*wire.COMMAND_NAMES.values(), "failed", "bytes_read", "bytes_written"), 0)
        self._counting = threading.Lock()  # threads of the pool count, too
        self._view = view
        self._tls, self._context, self._admit = tls, context, admit
        self._deadline = self.begun + handshake_time
        self._stall_time = stall_time
        #: How long the client lets the server wait.
        self.waits = Waits(self.begun, idle_time, stall_time)
        self._memory = memory
        #: Whether the server let it into transmission.
        self.admitted = False
        self._why: str | None = None
        self._admitted = admitted
        self._pool_of, self._loop = pool, loop
        self._pool = StoragePool()
        #: Of this client's questions for status alone: they say nothing of how fast others read.
        self.status_speed = Speed(0.0)
        self._negotiation: Negotiation | None = None
        self.draining = False
        #: Requests that are done in steps end before the next one.
        self.cutting = False
        self._slots, self._long_ones = threading.Semaphore(_IN_POOL), threading.Semaphore(_LONG_ONES)
        #: Held while an answer is sent that must not have others in between, if it takes several sends.
        self.sending = threading.RLock()
        #: What the pool has to say, with the memory it takes, and who sends it; None there: that is all.
        self._answers: queue.SimpleQueue[tuple[list[Buffer], int] | None] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None
        self.closing = False

    # -- life

    def run(self) -> None:
        """Serve the client until it leaves. Raises nothing: what goes wrong is this client's affair, and logged."""
        why = "left"
        try:
            agreed = self._negotiate()
            if agreed is not None:
                self.export_name = agreed.export.name
                log.info("%s: opened %r (%s)", self.peer, agreed.export.name, self._manner(agreed))
                self.channel.settimeout(self._stall_time)
                why = self._transmit(agreed)
        except LaminaError as error:
            why = "ended by the server" if self.draining else error.message
            if not self.draining and error.errno == ETIMEDOUT and self.transmitting:
                why = f"took no reply for {self._stall_time:g} s"
        except Exception:
            log.exception("%s: an error of the server itself", self.peer)
            why = "an error of the server itself"
        finally:
            self.channel.close()
            self._view.close()
        log.info("%s: %s after %.1f s, %s", self.peer, self._why or why, time.monotonic() - self.begun, self._summary())

    def drain(self) -> None:
        """The server ends: what was received is answered, new requests are refused, and no more is received."""
        self.draining = True
        if self._negotiation is not None:
            self._negotiation.shutting_down = True
        self._plain.end_input()

    def cut(self) -> None:
        """Let requests that are done in steps end before the next one."""
        self.cutting = True

    def close(self) -> None:
        """End it now."""
        self.closing = self.cutting = True
        self._plain.close()

    def forsake(self) -> None:
        """Give the descriptor back in a forked child; the connection is the parent's, and goes on."""
        self._plain.forsake()

    def put_out(self, why: str) -> None:
        """End it now, for a reason that is to be logged."""
        self._why = self._why or f"put out: {why}"
        self.close()

    def overdue(self) -> str | None:
        """Why the client is to be put out, if it is: it is over one of the time limits."""
        if self.closing or self.draining:
            return None
        if not self.transmitting:
            return "the negotiation took too long" if time.monotonic() > self._deadline else None
        why = self.waits.overdue()
        return why if self._pool_is_empty() or self.waits.stalled() else None

    def is_gone(self) -> bool:
        """Whether the client has left without waiting for replies. Asks the system; for requests that take long."""
        # Who only ends its own half of a Unix stream may wait for replies; with TCP the two look the same.
        ended = 0 if self._plain.family == socket.AF_UNIX else select.POLLRDHUP
        poll = select.poll()
        try:
            poll.register(self._plain.fileno(), ended)
            return any(events & (select.POLLHUP | select.POLLERR | ended) for _, events in poll.poll(0))
        except (OSError, ValueError):
            return True  # closed here

    def count(self, **amounts: int) -> None:
        """Add to `counts`. From any thread."""
        with self._counting:
            for name, amount in amounts.items():
                self.counts[name] += amount

    def count_one(self, name: str) -> None:
        """The same for one request; 0.4 us less."""
        with self._counting:
            self.counts[name] += 1

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
            if negotiation.phase is Phase.TRANSMISSION:
                self._enter()
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
            if not negotiation.keeps_export:
                self._view.release()
            view = negotiation.buffer()
            self.waits.listening = True
            count = self.channel.recv_into(view)
            self.waits.listening = False
            if not count:
                return None
            if count == len(view):
                self.waits.heard()
            negotiation.received(count)

    def _enter(self) -> None:
        self.admitted = self._admitted()
        if not self.admitted:
            raise BlockIOError("the server has as many clients as it may have, or memory for")

    def _keep_time(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BlockIOError("the negotiation took too long")
        self.channel.settimeout(left)

    def _secure(self, negotiation: Negotiation) -> None:
        from ..tls_channel import TlsChannel

        assert self._context is not None  # STARTTLS is refused without one
        left = max(self._deadline - time.monotonic(), 0.1)
        self.waits.heard()
        self.waits.listening = True
        secured = TlsChannel(self._plain, self._context, server_side=True, timeout=left)
        self.waits.listening = False
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

    def _transmit(self, agreed: Agreed) -> str:
        # Neither is an attribute: with what refers to this one in turn they would stay, megabytes, until the next collection.
        session = Transmission(agreed)
        commands = Commands(self, session, agreed, self._send)
        self._pool, self.export = self._pool_of(agreed.export), agreed.export
        self.waits.answered()
        try:
            while not session.finished:
                try:
                    count = self.channel.recv_into(session.buffer())
                except BlockIOError as error:
                    if error.errno != ETIMEDOUT:
                        raise
                    continue  # `overdue` judges
                if not count:
                    return "ended by the server" if self.draining else "gone without a farewell"
                requests = session.received(count)
                self.waits.took_in(session.halfway, requests, count)
                known = commands.known_reply(requests[0]) if len(requests) == 1 else None
                if known is not None:
                    self._send(known)
                    requests = []
                while requests:
                    requests = self._answer(session, commands, requests)
                self.waits.rest()
                commands.read_ahead()
        finally:
            self._wait_for_pool()
        return "left" if session.violation is None else f"dropped: {session.violation}"

    def _send(self, buffers: Sequence[Buffer]) -> None:
        with self.sending:
            self.channel.send(buffers)

    def _answer(self, session: Transmission, commands: Commands, requests: list[Request]) -> list[Request]:
        """See to it that these are answered: here and now while storage is quick, else in the pool. What was received
        meanwhile is returned, to be answered next."""
        first = requests[0]
        asks = first.type == wire.CMD_BLOCK_STATUS and len(requests) == 1
        if self.status_speed.slow if asks else self._pool.slow:
            self._answer_in_pool(commands, requests)
            return []
        # Long requests are spent in the system, side by side: only short ones meet at every call. A question for status may
        # take long, whatever its length: nobody waits for it.
        turn, alone = (None, True) if asks or first.length >= _LONG else self._loop.turn.take()
        begun = time.monotonic()
        try:
            answer = commands.answer(requests)
        finally:
            if turn is not None:
                turn.release()  # before it is sent: the next one wakes up meanwhile
        others = len(requests) - commands.status_requests
        if others:
            self._pool.took((time.monotonic() - begun - commands.status_time) / others)
        if answer:
            self._send(answer)
        if alone or session.finished or self.channel.secure or not self._pool_is_empty():
            return []
        self.waits.rest()
        stay = _LoopMember(self, self._plain, session, commands, self._pool, self._loop)
        self._loop.serve(stay)
        if stay.unsent:
            self._send(stay.unsent)
        return stay.left

    # -- the pool

    def _answer_in_pool(self, commands: Commands, requests: list[Request]) -> None:
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_all, name="nbd-answers", daemon=True)
            self._sender.start()
        for request in requests:
            if request.type == wire.CMD_BLOCK_STATUS and not self.status_speed.slow:
                self._answer_here(commands, request)
                continue
            long = request.type == wire.CMD_READ and request.length > SLAB
            if long or request.type in (PART, REFUSED, wire.CMD_DISC):
                self._answer_here(commands, request)
                continue
            cost = commands.room_for(request)
            if not self._memory.take(cost):
                self._answer_here(commands, request)
                continue
            if request.type == wire.CMD_WRITE:
                request = request._replace(payload=memoryview(bytes(request.payload)))  # its place is used again
            stepped = request.type in STEPPED and request.length > STEP
            if stepped:
                self._long_ones.acquire()
            self._slots.acquire()
            try:
                if stepped:
                    arguments = (commands, request, cost)
                    threading.Thread(target=self._long_one, args=arguments, name="nbd-request", daemon=True).start()
                else:
                    self._pool.submit(self._one, commands, request, cost)
            except RuntimeError:  # there are no more threads, or the server ends, and its pool has
                self._slots.release()
                if stepped:
                    self._long_ones.release()
                self._memory.give(cost)
                self._answer_here(commands, request)

    def _answer_here(self, commands: Commands, request: Request) -> None:
        answer = commands.answer([request])
        if answer:
            self._send(answer)

    def _one(self, commands: Commands, request: Request, cost: int) -> None:
        """Execute a request, in a thread of the pool."""
        begun = time.monotonic()
        answer: list[Buffer] = []
        try:
            answer += commands.for_one(request, answer.extend).answer([request])
        finally:
            if request.type != wire.CMD_BLOCK_STATUS:
                self._pool.took(time.monotonic() - begun)
            self._answers.put((answer, cost))

    def _long_one(self, commands: Commands, request: Request, cost: int) -> None:
        """Execute a request that is done in steps, in a thread of its own."""
        try:
            self._one(commands, request, cost)
        finally:
            self._long_ones.release()

    def _send_all(self) -> None:
        """Send what the pool has to say; a request leaves the pool when its answer is out."""
        while (item := self._answers.get()) is not None:
            answer, cost = item
            try:
                if answer:
                    self._send(answer)
                self.waits.answered()
            except LaminaError as error:
                log.debug("%s: %s", self.peer, error)
                if error.errno == ETIMEDOUT:
                    self._why = self._why or f"put out: it took no reply for {self._stall_time:g} s"
                self.close()  # wakes the thread of the connection, which says why
            finally:
                del item, answer
                self._memory.give(cost)
                self._slots.release()

    def _wait_for_pool(self) -> None:
        if self._sender is None:
            return
        for _ in range(_IN_POOL):
            self._slots.acquire()
        self._answers.put(None)
        self._sender.join()

    def _pool_is_empty(self) -> bool:
        """Whether nothing is in the pool, or answered there and not sent."""
        if self._sender is None:
            return True
        free = 0
        while free < _IN_POOL and self._slots.acquire(blocking=False):
            free += 1
        for _ in range(free):
            self._slots.release()
        return free == _IN_POOL


class _LoopMember:
    """A client while it is in the loop; nobody else sends to it then. When it leaves, `unsent` is what it did not take, to be
    sent next, and `left` the requests to be answered after that."""

    def __init__(
        self,
        connection: Connection,
        channel: PlainChannel,
        session: Transmission,
        commands: Commands,
        pool: StoragePool,
        loop: Loop,
    ) -> None:
        self._connection = connection
        self._channel, self._session, self._commands = channel, session, commands
        self._pool, self._turn = pool, loop.turn
        self.unsent: Sequence[Buffer] = ()
        self.left: list[Request] = []

    def fileno(self) -> int:
        return self._channel.fileno()

    def step(self) -> bool:
        """Answer what has come, unless that may take long, and send as much as the client takes."""
        session, channel, commands = self._session, self._channel, self._commands
        count = channel.receive_now(session.buffer())
        if count is None:
            return True
        requests = session.received(count)
        self._connection.waits.took_in(session.halfway, requests, count)
        if not count or session.finished or self._pool.slow or not _is_short(requests):
            self.left = requests
            return False
        if not requests:
            return True
        turn, _ = self._turn.take()
        try:
            begun = time.monotonic()
            for at in range(0, len(requests), _PIECE):
                self.unsent = channel.send_now(commands.answer(requests[at : at + _PIECE]))
                if self.unsent:
                    self.left = requests[at + _PIECE :]
                    break
            self._pool.took((time.monotonic() - begun) / len(requests))
        finally:
            turn.release()
        if not self.unsent:
            self._connection.waits.rest()
        return not self.unsent


def _is_short(requests: list[Request]) -> bool:
    """Whether all of this is done soon, and its answer has room: a few READs and WRITEs that are short, and wait for no
    disk."""
    room = SLAB
    for kind, flags, _, _, length, _ in requests:
        if length >= _LONG or flags or kind not in (wire.CMD_READ, wire.CMD_WRITE):
            return False
        room -= length
    return room >= 0 and len(requests) <= _SOME
