"""One client of a server: its negotiation and its requests.

The docstring of this package says which thread executes a request.

Memory: each client has 1 MiB for requests (`transmission.RECEIVE_BUFFER`) and 1 MiB for replies (`commands.REPLY_BUFFER`),
and up to 1 MiB more for each of its 16 requests that are in the pool, or whose reply is not sent yet; all clients together
have the memory of the server (`pool.Memory`). A length that a client sends allocates nothing.

Time: the thread that accepts clients checks all of them periodically (`overdue`), and disconnects those that exceed a limit.
The time limit of the socket disconnects a client that does not receive its replies.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from errno import ETIMEDOUT
from typing import TYPE_CHECKING, Final

from ...errors import BlockIOError, LaminaError
from ...limits import KIB
from .. import wire
from .activity import ClientActivity
from .commands import REPLY_BUFFER, STEP, STEPPED, Commands
from .loop import Loop
from .negotiation import Agreed, Negotiation, Phase
from .pool import Memory, Speed, StoragePool
from .transmission import PART, RECEIVE_BUFFER, REFUSED, Request, Transmission

if TYPE_CHECKING:
    import ssl

    from ..channel import Buffer, PlainChannel
    from ..tls_channel import TlsChannel
    from .export import Export
    from .exports import VisibleExports

log = logging.getLogger("lamina.nbd")

#: The length in bytes from which a request counts as long.
_LONG = 64 * KIB
#: The most requests of one client that the loop executes at a time.
_SOME = 256
#: The number of replies after which the loop sends: the client processes them while the others are executed. (Four clients
#: with 16 requests each: 180,000 per second instead of 165,000.)
_PIECE = 8
#: The most requests of one client in the pool, and the most long ones among them.
_IN_POOL, _LONG_ONES = 16, 2
#: The interval in seconds at which a client that the server has no room for asks again.
_FULL = 0.01
#: The memory of one client: its receive buffer and its reply buffer.
CLIENT_MEMORY: Final = RECEIVE_BUFFER + REPLY_BUFFER


class Connection:
    """A client. `run` serves it, in a thread of its own; other threads call `drain` and `close`.

    `view`: the exports, as this client may see them. `tls`: "off", "allow" or "require", with `context` for the handshake and
    `admit(names)` to say whom TLS lets in. Transmission begins when `admitted()` returns True,
    which may be later, as clients leave; if it does not until the end of `handshake_time`, the client is refused.
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
        #: The address of the client, without the port.
        self.origin = channel.peer.rpartition(":")[0] or channel.peer
        self.begun = time.monotonic()
        self.export_name: str | None = None
        #: The export of the pool.
        self.export: Export | None = None
        #: Requests by command, bytes read and written, requests that failed.
        self.counts = dict.fromkeys((*wire.COMMAND_NAMES.values(), "failed", "bytes_read", "bytes_written"), 0)
        self._counting = threading.Lock()  # threads of the pool count, too
        self._view = view
        self._tls, self._context, self._admit = tls, context, admit
        self._deadline = self.begun + handshake_time
        self._stall_time = stall_time
        self.activity = ClientActivity(self.begun, idle_time, stall_time)
        self._memory = memory
        #: Whether the server let it into transmission, or had no room for it until its negotiation had to end.
        self.admitted = self.refused = False
        self._why: str | None = None
        self._admitted = admitted
        self._pool_of, self._loop = pool, loop
        self._pool = StoragePool()
        #: The speed of this client's BLOCK_STATUS requests, which says nothing about the speed of reads.
        self.status_speed = Speed(0.0)
        self._negotiation: Negotiation | None = None
        self.draining = False
        #: Requests that are executed in steps end after the current step.
        self.cutting = False
        self._slots, self._long_ones = threading.Semaphore(_IN_POOL), threading.Semaphore(_LONG_ONES)
        #: Held during the sends of one reply, so that no other reply is sent in between.
        self.sending = threading.RLock()
        #: The replies of the pool with the memory that they take, and the thread that sends them; None ends it.
        self._answers: queue.SimpleQueue[tuple[list[Buffer], int] | None] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None
        self.closing = False

    # -- life

    def run(self) -> None:
        """Serve the client until it disconnects. Raises nothing: errors end this connection, and are logged."""
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
        """The server ends: received requests get replies, further ones are refused, and nothing more is received."""
        self.draining = True
        if self._negotiation is not None:
            self._negotiation.shutting_down = True
        self._plain.end_input()

    def cut(self) -> None:
        """End requests that are executed in steps after their current step."""
        self.cutting = True

    def close(self) -> None:
        """Close the connection now."""
        self.closing = self.cutting = True
        self._plain.close()

    def forsake(self) -> None:
        """Close the descriptor in a forked child. The connection of the parent continues."""
        self._plain.forsake()

    def put_out(self, why: str) -> None:
        """Close the connection now; `why` is logged."""
        self._why = self._why or f"put out: {why}"
        self.close()

    def overdue(self) -> str | None:
        """The time limit that the client exceeded, as a text, or None."""
        if self.closing or self.draining:
            return None
        if not self.transmitting:
            return "the negotiation took too long" if time.monotonic() > self._deadline else None
        why = self.activity.overdue()
        return why if self._pool_is_empty() or self.activity.stalled() else None

    def is_gone(self) -> bool:
        """Whether the client has disconnected without waiting for replies. A system call, for long requests."""
        return self._plain.is_gone()

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
            self.activity.waiting = True
            count = self.channel.recv_into(view)
            self.activity.waiting = False
            if not count:
                return None
            if count == len(view):
                self.activity.message_received()
            negotiation.received(count)

    def _enter(self) -> None:
        # One that has just left may still be counted: its thread has not seen that it is gone.
        while not self._admitted():
            time.sleep(_FULL)
            ends = self.closing or self.draining or self.is_gone()
            if ends or time.monotonic() > self._deadline:
                self.refused = True
                raise BlockIOError("the server has as many clients as it may have, or memory for")
        self.admitted = True

    def _keep_time(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BlockIOError("the negotiation took too long")
        self.channel.settimeout(left)

    def _secure(self, negotiation: Negotiation) -> None:
        from ..tls_channel import TlsChannel

        assert self._context is not None  # STARTTLS is refused without one
        left = max(self._deadline - time.monotonic(), 0.1)
        self.activity.message_received()
        self.activity.waiting = True
        secured = TlsChannel(self._plain, self._context, server_side=True, timeout=left)
        self.activity.waiting = False
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
        # No attributes: as parts of a reference cycle, these megabytes would stay until the next garbage collection.
        session = Transmission(agreed)
        commands = Commands(self, session, agreed, self._send)
        self._pool, self.export = self._pool_of(agreed.export), agreed.export
        self.activity.reply_sent()
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
                self.activity.received(session.partial, requests, count)
                known = commands.known_reply(requests[0]) if len(requests) == 1 else None
                if known is not None:
                    self._send(known)
                    requests = []
                while requests:
                    requests = self._answer(session, commands, requests)
                self.activity.requests_done()
                commands.read_ahead()
        finally:
            self._wait_for_pool()
        return "left" if session.violation is None else f"dropped: {session.violation}"

    def _send(self, buffers: Sequence[Buffer]) -> None:
        with self.sending:
            self.channel.send(buffers)

    def _answer(self, session: Transmission, commands: Commands, requests: list[Request]) -> list[Request]:
        """Execute the requests: in this thread while the storage is fast, else in the pool. Returns requests that arrived
        meanwhile, which the caller executes next."""
        first = requests[0]
        asks = first.type == wire.CMD_BLOCK_STATUS and len(requests) == 1
        if self.status_speed.slow if asks else self._pool.slow:
            self._answer_in_pool(commands, requests)
            return []
        # Long requests spend their time in system calls, in parallel; threads with short ones compete for the interpreter.
        # BLOCK_STATUS may take long whatever its length, so it does not take the lock.
        lock, alone = (None, True) if asks or first.length >= _LONG else self._loop.execution.take()
        begun = time.monotonic()
        try:
            answer = commands.answer(requests)
        finally:
            if lock is not None:
                lock.release()  # before the send, so that the next thread wakes up meanwhile
        others = len(requests) - commands.status_requests
        if others:
            self._pool.took((time.monotonic() - begun - commands.status_time) / others)
        if answer:
            self._send(answer)
        if alone or session.finished or self.channel.secure or not self._pool_is_empty():
            return []
        self.activity.requests_done()
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
            long = request.type == wire.CMD_READ and request.length > REPLY_BUFFER
            if long or request.type in (PART, REFUSED, wire.CMD_DISC):
                self._answer_here(commands, request)
                continue
            cost = commands.memory_for(request)
            if not self._memory.take(cost):
                self._answer_here(commands, request)
                continue
            if request.type == wire.CMD_WRITE:
                request = request._replace(payload=memoryview(bytes(request.payload)))  # the receive buffer is reused
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
            except RuntimeError:  # no thread can be started, or the server has ended
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
        """Execute a request in a thread of the pool."""
        begun = time.monotonic()
        answer: list[Buffer] = []
        try:
            answer += commands.for_one(request, answer.extend).answer([request])
        finally:
            if request.type != wire.CMD_BLOCK_STATUS:
                self._pool.took(time.monotonic() - begun)
            self._answers.put((answer, cost))

    def _long_one(self, commands: Commands, request: Request, cost: int) -> None:
        """Execute a request in steps, in a thread of its own."""
        try:
            self._one(commands, request, cost)
        finally:
            self._long_ones.release()

    def _send_all(self) -> None:
        """Send the replies of the pool; a request leaves the pool when its reply is sent."""
        while (item := self._answers.get()) is not None:
            answer, cost = item
            try:
                if answer:
                    self._send(answer)
                self.activity.reply_sent()
            except LaminaError as error:
                log.debug("%s: %s", self.peer, error)
                if error.errno == ETIMEDOUT:
                    self._why = self._why or f"put out: it took no reply for {self._stall_time:g} s"
                self.close()  # wakes the thread of the connection, which logs the reason
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
        """Whether the pool has no request of this client, and no reply that is not sent."""
        if self._sender is None:
            return True
        free = 0
        while free < _IN_POOL and self._slots.acquire(blocking=False):
            free += 1
        for _ in range(free):
            self._slots.release()
        return free == _IN_POOL


class _LoopMember:
    """A client in the loop; no other thread sends to it. When it leaves the loop, `unsent` are buffers that the socket did
    not take, to be sent next, and `left` the requests to be executed after that."""

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
        self._pool, self._execution = pool, loop.execution
        self.unsent: Sequence[Buffer] = ()
        self.left: list[Request] = []

    def fileno(self) -> int:
        return self._channel.fileno()

    def step(self) -> bool:
        """Execute the received requests, unless that may take long, and send as much as the socket takes."""
        session, channel, commands = self._session, self._channel, self._commands
        count = channel.receive_now(session.buffer())
        if count is None:
            return True
        requests = session.received(count)
        self._connection.activity.received(session.partial, requests, count)
        if not count or session.finished or self._pool.slow or not _is_short(requests):
            self.left = requests
            return False
        if not requests:
            return True
        lock, _ = self._execution.take()
        try:
            begun = time.monotonic()
            for at in range(0, len(requests), _PIECE):
                self.unsent = channel.send_now(commands.answer(requests[at : at + _PIECE]))
                if self.unsent:
                    self.left = requests[at + _PIECE :]
                    break
            self._pool.took((time.monotonic() - begun) / len(requests))
        finally:
            lock.release()
        if not self.unsent:
            self._connection.activity.requests_done()
        return not self.unsent


def _is_short(requests: list[Request]) -> bool:
    """Whether these are a few short READs and WRITEs without flags, whose replies fit into the reply buffer."""
    left = REPLY_BUFFER
    for kind, flags, _, _, length, _ in requests:
        if length >= _LONG or flags or kind not in (wire.CMD_READ, wire.CMD_WRITE):
            return False
        left -= length
    return left >= 0 and len(requests) <= _SOME
