"""A connected byte stream between a client and a server: what both kinds are, and the plain one (`tls_channel` is the other).

One thread at a time receives; any number of threads send beside it. Both kinds are blocking, know nothing of NBD, and
turn every failure into a `LaminaError` that names the peer. A channel whose `send` failed is torn: part of a message may
be out, so it never sends again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from errno import EAGAIN, EPIPE, ETIMEDOUT
from time import monotonic
from typing import Protocol

from ..capabilities import processors
from ..errors import BlockIOError, Closed, LaminaError, OptionError, printable
from .sockets import AF_UNIX, DONT_WAIT, NO_SIGNAL, PEEK, connected, is_gone, limit, peer_process, ready_for

Buffer = bytes | bytearray | memoryview

#: Buffers in one sendmsg (IOV_MAX of Linux).
MAX_BUFFERS = 1024
#: Bytes asked of the kernel for the buffers of a Unix socket. Its default of 208 KiB cost 256 KiB replies half their speed.
SOCKET_BUFFER = 2 << 20
#: Seconds that a TLS handshake may take, whatever the peer sends meanwhile.
HANDSHAKE_TIMEOUT = 10.0

#: The seconds for which a receiver polls before it sleeps. Waking a thread takes 20 to 30 us, longer than most requests.
#: One 4 KiB read after the other, over a Unix socket: 27,000 a second instead of 16,500.
_EAGER = 50e-6
#: The most receives that sleep at once after the search was in vain repeatedly.
_MOST_SKIPPED = 1024
#: Until when one thread does so: several would only take the interpreter from one another. A time instead of a lock, which an
#: interrupt could leave locked.
_eager_until = 0.0
_CPUS = processors()


class Channel(Protocol):
    """What the two ends of NBD need of a connection."""

    #: The peer, for messages: `192.0.2.1:40312`, `pid 71 of user 1000`.
    peer: str
    #: Whether bytes are encrypted on the way.
    secure: bool
    #: The names of the peer's certificate, where it was verified (`tls.peer_names`); else none.
    peer_names: tuple[str, ...]
    #: Called while a send waits for the peer: with the number of bytes that the peer has just taken, or 0 after each time
    #: that `settimeout` allows. It gives up by raising. None: the first such time is an error.
    watch: Callable[[int], None] | None

    def recv_into(self, view: memoryview) -> int:
        """Bytes put at the start of `view` (not empty): at least 1, or 0 when the peer ended the stream in good order.

        Blocks. For one thread at a time. BlockIOError (ETIMEDOUT: nothing came in time, and it may be tried again; else
        the connection is lost), Closed.
        """
        ...

    def receive_soon(self, view: memoryview, *, eager: bool = True) -> int | None:
        """As `recv_into`, but None if nothing comes within microseconds. Where answers come later as a rule, `eager` does not
        even look: then `wait_input` follows, and behind it a call without `eager`."""
        ...

    def wait_input(self) -> None:
        """Block until there is something to receive, or the time of `settimeout` is over. Nothing is taken: an exception that
        ends the wait loses no byte. BlockIOError, Closed."""
        ...

    def wait_ready(self, seconds: float) -> tuple[bool, bool]:
        """Block until the socket has something to receive or takes something, at most for `seconds`: whether it has, and
        whether it does. After `close` both are true."""
        ...

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all `buffers` (of single bytes) in order. Blocks. From any thread; two sends never mix.

        They are not copied without need, and free again on return. BlockIOError, Closed.
        """
        ...

    def settimeout(self, seconds: float | None) -> None:
        """Let no single wait for the peer last longer; None, as at first, waits without end."""
        ...

    def close(self) -> None:
        """Close the connection in both directions, and wake the threads that are blocked in it. From any thread, any number
        of times."""
        ...

    def forsake(self) -> None:
        """Give the descriptor back after a fork, in the child; the connection goes on, and is the parent's. Takes no lock."""
        ...

    def end_output(self) -> None:
        """Send nothing any more, so that the peer finds the end of the stream. From any thread; never blocks."""
        ...

    def fileno(self) -> int:
        """The socket's descriptor, or -1 after `close`."""
        ...


class PlainChannel:
    """A connected stream socket as it is. Takes the socket over."""

    secure = False
    peer_names: tuple[str, ...] = ()

    __slots__ = (
        "_closed",
        "_in_vain",
        "_peeked",
        "_receiving",
        "_recv_into",
        "_sending",
        "_sendmsg",
        "_skip",
        "_socket",
        "_torn",
        "peer",
        "watch",
    )

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock = connected(sock)
        self._recv_into, self._sendmsg = sock.recv_into, sock.sendmsg
        self._receiving, self._sending = threading.Lock(), threading.Lock()
        self._closed = self._torn = False
        self._peeked = memoryview(bytearray(1))
        self.watch: Callable[[int], None] | None = None
        #: Waits that are slept through, and after how many more vain ones the next is not.
        self._skip, self._in_vain = 0, 1
        self.peer = _name_of_peer(sock)
        if sock.family == AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        else:
            # TCP sizes its buffers itself, beyond what we may ask for; asking would end that. (Loopback: no difference.)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv_into(self, view: memoryview) -> int:
        with self._receiving:
            try:
                count = self._receive_eagerly(view)
                if count is None:
                    count = self._recv_into(view)
            except OSError as error:
                raise self._lost(error, "receive") from error
        if not count and self._closed:
            raise self.closed_here()
        return count

    def receive_soon(self, view: memoryview, *, eager: bool = True) -> int | None:
        with self._receiving:
            try:
                count = self._receive_eagerly(view) if eager else self._recv_into(view, 0, DONT_WAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._lost(error, "receive") from error
        if count == 0 and self._closed:
            raise self.closed_here()
        return count

    def _receive_eagerly(self, view: memoryview) -> int | None:
        """Receive without sleeping, if something comes soon; else None. While that fails, it is tried less and less often."""
        global _eager_until
        if self._skip:
            self._skip -= 1
            return None
        now = monotonic()
        if _CPUS == 1 or now < _eager_until:
            return None
        _eager_until = until = now + _EAGER
        while True:
            try:
                count = self._recv_into(view, 0, DONT_WAIT)
            except BlockingIOError:
                if monotonic() > until:
                    break
            else:
                _eager_until = 0.0
                self._in_vain = 1
                return count
        self._in_vain = min(2 * self._in_vain, _MOST_SKIPPED)
        self._skip = self._in_vain
        return None

    def wait_input(self) -> None:
        with self._receiving:
            try:
                self._recv_into(self._peeked, 1, PEEK)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lost(error, "receive") from error

    def wait_ready(self, seconds: float) -> tuple[bool, bool]:
        with self._sending:  # which keeps the descriptor from being closed, and its number from becoming another file's
            if self._torn:
                return True, True
            return ready_for(self._socket, max(0.001, seconds))

    def receive_now(self, view: memoryview) -> int | None:
        """As `recv_into`, but never waits: None if nothing has come."""
        with self._receiving:
            try:
                return self._recv_into(view, 0, DONT_WAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._lost(error, "receive") from error

    def send(self, buffers: Sequence[Buffer]) -> None:
        with self._sending:
            if self._torn:
                raise self._lost(OSError(EPIPE, ""), "send")
            # Until all is out: whatever exception ends this may come when part of a message is.
            self._torn = True
            try:
                try:
                    sent = self._sendmsg(buffers, (), NO_SIGNAL) if len(buffers) <= MAX_BUFFERS else 0
                except BlockingIOError:
                    if self.watch is None:
                        raise
                    sent = 0
                if sent != (len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))):
                    self._send_rest(buffers, sent)
            except LaminaError:
                raise
            except OSError as error:
                raise self._lost(error, "send") from error
            self._torn = self._closed

    def _send_some(self, buffers: Sequence[Buffer]) -> int:
        """How many bytes the peer takes; 0 if it took none in the time of `settimeout`, and `watch` goes on."""
        try:
            return self._sendmsg(buffers, (), NO_SIGNAL)
        except BlockingIOError:
            if self.watch is None:
                raise
            return 0

    def send_now(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """As `send` of at most MAX_BUFFERS, but never waits. What the peer did not take is returned: it must be the next that
        is sent."""
        with self._sending:
            if self._torn:
                raise self._lost(OSError(EPIPE, ""), "send")
            try:
                sent = self._sendmsg(buffers, (), NO_SIGNAL | DONT_WAIT)
            except BlockingIOError:
                return buffers
            except OSError as error:
                self._torn = True
                raise self._lost(error, "send") from error
        if sent == sum(map(len, buffers)):
            return ()
        first, sent = _position(buffers, sent)
        return [memoryview(buffers[first])[sent:], *buffers[first + 1 :]]

    def _send_rest(self, buffers: Sequence[Buffer], sent: int) -> None:
        """Send what `sent` bytes leave of `buffers`."""
        first = 0
        while True:
            first, sent = _position(buffers, sent, first)
            if first == len(buffers):
                return
            batch = list(buffers[first : first + MAX_BUFFERS])
            batch[0] = memoryview(batch[0])[sent:]
            count = self._send_some(batch)
            if self.watch is not None:
                self.watch(count)
            sent += count

    def settimeout(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            raise OptionError(f"the timeout is {seconds} s", hint="it is above 0, or None")
        try:
            limit(self._socket, seconds)
        except OSError as error:
            raise self._lost(error, "set the timeout") from error

    def end_input(self) -> None:
        """Receive what has arrived, and no more: then the stream is at its end. What is sent still goes out."""
        with contextlib.suppress(OSError):  # it is closed already, or the peer is gone
            self._socket.shutdown(socket.SHUT_RD)

    def end_output(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already, or the peer is gone
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._closed = True
        # A socket that is no longer connected counts as shut down. Blocked calls return.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # The descriptor is closed only when no thread uses it: its number may be reused at once.
        with self._receiving, self._sending:
            self._torn = True
            self._socket.close()

    def forsake(self) -> None:
        self._closed = self._torn = True
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def is_gone(self) -> bool:
        """Whether the peer has disconnected without waiting for replies. A system call."""
        try:
            return is_gone(self._socket)
        except (OSError, ValueError):
            return True  # closed here

    @property
    def family(self) -> int:
        """The address family of the socket."""
        return self._socket.family

    def closed_here(self) -> Closed:
        """The error for a use after `close`."""
        return Closed("the connection was closed on this side", path=self.peer)

    def _lost(self, error: OSError, operation: str) -> LaminaError:
        if self._closed:
            return self.closed_here()
        number = ETIMEDOUT if error.errno == EAGAIN else error.errno or EPIPE
        message = f"the connection failed ({operation}): {os.strerror(number)}"
        return BlockIOError(message, errno=number, path=self.peer)


def _position(buffers: Sequence[Buffer], at: int, first: int = 0) -> tuple[int, int]:
    """In which buffer, from `first` on, the byte `at` lies, and where there."""
    while first < len(buffers) and at >= len(buffers[first]):
        at -= len(buffers[first])
        first += 1
    return first, at


def _name_of_peer(sock: socket.socket) -> str:
    """The peer of `sock`, for messages; of a Unix socket its process."""
    try:
        if sock.family == AF_UNIX:
            return peer_process(sock)
        host, port = sock.getpeername()[:2]
    except OSError:
        return "a peer that is gone"
    return printable(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
