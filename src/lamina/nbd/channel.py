"""A connected byte stream between a client and a server: plain, or encrypted with TLS.

One thread at a time receives; any number of threads send beside it. Both kinds are blocking, know nothing of NBD, and
turn every failure into a `LaminaError` that names the peer. A channel whose `send` failed is torn: part of a message may
be out, so it never sends again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from errno import EAGAIN, ECONNRESET, EPIPE, EPROTO, ETIMEDOUT
from typing import TYPE_CHECKING, Protocol

from ..errors import BlockIOError, Closed, LaminaError, OptionError, printable

if TYPE_CHECKING:
    import ssl

Buffer = bytes | bytearray | memoryview

#: Buffers in one sendmsg (IOV_MAX of Linux).
MAX_BUFFERS = 1024
#: Bytes asked of the kernel for the buffers of a Unix socket. Its default of 208 KiB cost 256 KiB replies half their speed.
SOCKET_BUFFER = 2 << 20
#: Seconds that a TLS handshake may take, whatever the peer sends meanwhile.
HANDSHAKE_TIMEOUT = 10.0

# Programs in a pipeline may have given SIGPIPE its deadly meaning back. An int: the enum's member is slower to pass.
_NO_SIGNAL = int(socket.MSG_NOSIGNAL)
#: The plaintext of one TLS record is at most this long.
_RECORD = 1 << 14
#: Plaintext that is encrypted before anything is sent. See `TlsChannel._encrypted`.
_BATCH = 256 << 10
#: Ciphertext received at once.
_CIPHERTEXT = 256 << 10
#: Answers that TLS itself wants to send (alerts, key updates) and the peer does not read are at most this many bytes.
_MAX_UNSENT = 64 << 10


class Channel(Protocol):
    """What the two ends of NBD need of a connection."""

    #: Who is at the other end, for people: `192.0.2.1:40312`, `pid 71 of user 1000`.
    peer: str
    #: Whether bytes are encrypted on the way.
    secure: bool
    #: The names of the peer's certificate, where it was verified (`tls.peer_names`); else none.
    peer_names: tuple[str, ...]

    def recv_into(self, view: memoryview) -> int:
        """Bytes put at the start of `view` (not empty): at least 1, or 0 when the peer ended the stream in good order.

        Blocks. For one thread at a time. BlockIOError (ETIMEDOUT: nothing came in time, and it may be tried again; else
        the connection is lost), Closed.
        """
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
        """End the connection, both ways, waking whoever is blocked in it. From any thread, any number of times."""
        ...

    def fileno(self) -> int:
        """The socket's descriptor, or -1 after `close`."""
        ...


class PlainChannel:
    """A connected stream socket as it is. Takes the socket over."""

    secure = False
    peer_names: tuple[str, ...] = ()

    __slots__ = ("_closed", "_receiving", "_recv_into", "_sending", "_sendmsg", "_socket", "_torn", "peer")

    def __init__(self, sock: socket.socket) -> None:
        # Python's own timeouts would poll before each call; the kernel's (see `settimeout`) cost nothing.
        sock.settimeout(None)
        self._socket = sock
        self._recv_into, self._sendmsg = sock.recv_into, sock.sendmsg
        self._receiving, self._sending = threading.Lock(), threading.Lock()
        self._closed = self._torn = False
        self.peer = _name_of_peer(sock)
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        else:
            # TCP sizes its buffers itself, beyond what we may ask for; asking would end that. (Loopback: no difference.)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv_into(self, view: memoryview) -> int:
        with self._receiving:
            try:
                count = self._recv_into(view)
            except OSError as error:
                raise self._lost(error, "receive") from error
        if not count and self._closed:
            raise self.closed_here()
        return count

    def send(self, buffers: Sequence[Buffer]) -> None:
        with self._sending:
            if self._torn:
                raise self._lost(OSError(EPIPE, ""), "send")
            try:
                if len(buffers) <= MAX_BUFFERS:
                    sent = self._sendmsg(buffers, (), _NO_SIGNAL)
                    if sent == sum(map(len, buffers)):
                        return
                else:
                    sent = 0
                self._send_rest(buffers, sent)
            except OSError as error:
                self._torn = True
                raise self._lost(error, "send") from error

    def _send_rest(self, buffers: Sequence[Buffer], sent: int) -> None:
        """Send what `sent` bytes leave of `buffers`."""
        first = 0
        while True:
            while first < len(buffers) and sent >= len(buffers[first]):
                sent -= len(buffers[first])
                first += 1
            if first == len(buffers):
                return
            batch = list(buffers[first : first + MAX_BUFFERS])
            batch[0] = memoryview(batch[0])[sent:]
            sent += self._sendmsg(batch, (), _NO_SIGNAL)

    def settimeout(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            raise OptionError(f"the timeout is {seconds} s", hint="it is above 0, or None")
        # At least a microsecond: to the kernel, 0 means no timeout.
        micros = 0 if seconds is None else max(1, int(seconds * 1_000_000))
        value = struct.pack("ll", *divmod(micros, 1_000_000))
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError as error:
            raise self._lost(error, "set the timeout") from error

    def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None = None,
        buffered: Buffer = b"",
        timeout: float = HANDSHAKE_TIMEOUT,
    ) -> TlsChannel:
        """The encrypted channel over this one, after a handshake; this one then only serves to `close` it."""
        return TlsChannel(self, context, server_side=server_side, hostname=hostname, buffered=buffered, timeout=timeout)

    def end_input(self) -> None:
        """Receive what has arrived, and no more: then the stream is at its end. What is sent still goes out."""
        with contextlib.suppress(OSError):  # it is closed already, or the peer is gone
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._closed = True
        # Not connected any more is as good as shut down. Whoever is inside a call now comes out of it.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # The descriptor is given back only when nobody uses it: its number may at once be another file's.
        with self._receiving, self._sending:
            self._torn = True
            self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def closed_here(self) -> Closed:
        """The error for a use after `close`."""
        return Closed("the connection was closed on this side", path=self.peer)

    def _lost(self, error: OSError, operation: str) -> LaminaError:
        if self._closed:
            return self.closed_here()
        number = ETIMEDOUT if error.errno == EAGAIN else error.errno or EPIPE
        message = f"the connection failed ({operation}): {os.strerror(number)}"
        return BlockIOError(message, errno=number, path=self.peer)


class TlsChannel:
    """TLS over a connected stream. Takes the socket, or the plain channel, over; the constructor does the handshake.

    `ssl.SSLSocket` cannot receive in one thread while others send. This drives an `ssl.SSLObject`, which works on memory
    alone, under a lock that is never held during a wait.

    `hostname`: the name that a server's certificate must have, if the context checks names. `buffered`: bytes that the
    caller received and did not use before TLS began. There must be none: they came from anybody (CVE-2021-3716), and are
    refused like a failed handshake: with a BlockIOError, the connection closed.
    """

    secure = True

    __slots__ = (
        "_ciphertext",
        "_ended",
        "_failed",
        "_fresh",
        "_incoming",
        "_object",
        "_outgoing",
        "_plain",
        "_receiving",
        "_sending",
        "_server_side",
        "_ssl",
        "_state",
        "cipher",
        "hostname",
        "peer",
        "peer_names",
        "version",
    )

    def __init__(
        self,
        stream: socket.socket | PlainChannel,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None = None,
        buffered: Buffer = b"",
        timeout: float = HANDSHAKE_TIMEOUT,
    ) -> None:
        import ssl

        self._ssl = ssl
        self._plain = stream if isinstance(stream, PlainChannel) else PlainChannel(stream)
        self.peer = self._plain.peer
        self.hostname = hostname
        self._server_side = server_side
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        #: `_state` guards the three objects of ssl; `_sending` keeps the order of what they give out.
        self._state, self._sending, self._receiving = threading.Lock(), threading.Lock(), threading.Lock()
        self._ciphertext = memoryview(bytearray(_CIPHERTEXT))
        self._failed: LaminaError | None = None
        #: The peer said farewell; nothing came yet since the handshake.
        self._ended, self._fresh = False, True
        try:
            if buffered:
                hint = "somebody may have put them there; nothing of this connection can be trusted"
                message = f"{len(buffered)} bytes came before TLS began"
                raise BlockIOError(message, errno=EPROTO, path=self.peer, hint=hint)
            self._object = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname
            )
            self._handshake(timeout)
        except BaseException:
            self._plain.close()
            raise

    def recv_into(self, view: memoryview) -> int:
        with self._receiving:
            while True:
                if self._failed is not None:
                    raise self._failed
                count = 0 if self._ended else self._decrypt_into(view)
                if self._outgoing.pending:
                    self._answer()
                if count or self._ended:
                    return count
                if self._failed is None:
                    self._receive()

    def _receive(self) -> None:
        """Put what comes from the peer, at least a byte, into `_incoming`."""
        try:
            received = self._plain.recv_into(self._ciphertext)
        except BlockIOError as error:
            if error.errno == ECONNRESET:
                error.hint = self._suspicion()
            raise
        if not received:
            from .tls import truncated

            self._failed = truncated(self.peer)
            self._failed.hint = self._suspicion() or self._failed.hint
            raise self._failed
        self._fresh = False
        with self._state:
            self._incoming.write(self._ciphertext[:received])

    def _decrypt_into(self, view: memoryview) -> int:
        """Bytes put into `view` of what was received; with 0 see whether `_ended` or `_failed` became true."""
        filled, room = 0, len(view)
        with self._state:
            read, waiting, pending = self._object.read, self._incoming, self._object.pending
            # One read gives one record. Asking when nothing is there would cost an exception each time.
            while filled < room and (waiting.pending or pending()):
                try:
                    count = int(read(room - filled, view[filled:] if filled else view))
                except self._ssl.SSLWantReadError:
                    break
                except self._ssl.SSLError as error:
                    self._failed = self._failure(error)
                    self._failed.__cause__ = error
                    break
                if not count:
                    self._ended = True
                    break
                filled += count
        return filled

    def _answer(self) -> None:
        """Send what TLS itself wants to say, unless somebody is sending: their next bytes then carry it along."""
        if self._sending.acquire(blocking=False):
            try:
                with self._state:
                    data = self._outgoing.read()
                self._plain.send((data,))
            finally:
                self._sending.release()
        elif self._outgoing.pending > _MAX_UNSENT:
            raise BlockIOError("the peer makes TLS talk and does not listen", errno=EPROTO, path=self.peer)

    def send(self, buffers: Sequence[Buffer]) -> None:
        with self._sending:
            if self._plain._closed:
                raise self._plain.closed_here()
            try:
                for data in self._encrypted(buffers):
                    self._plain.send((data,))
            except BlockIOError as error:
                # A peer that refuses our certificate says so, and goes: its last words tell more than a broken pipe.
                if error.errno in (EPIPE, ECONNRESET):
                    said = self._last_words()
                    if said is not None:
                        raise said from error
                    error.hint = self._suspicion()
                raise

    def _encrypted(self, buffers: Sequence[Buffer]) -> Iterator[bytes]:
        """The ciphertext of `buffers`, in pieces to send one after the other.

        Small buffers are joined into full records first; large ones are encrypted where they are.
        """
        small: list[Buffer] = []
        length = 0
        for buffer in buffers:
            if len(buffer) >= _RECORD:
                if small:
                    self._encrypt(b"".join(small))
                    small, length = [], 0
                whole = memoryview(buffer)
                for start in range(0, len(whole), _BATCH):
                    yield self._encrypt_out(whole[start : start + _BATCH])
            else:
                small.append(buffer)
                length += len(buffer)
                if length >= _BATCH:
                    yield self._encrypt_out(b"".join(small))
                    small, length = [], 0
        if small:
            yield self._encrypt_out(b"".join(small))

    def _encrypt_out(self, data: Buffer) -> bytes:
        self._encrypt(data)
        with self._state:
            return self._outgoing.read()

    def _encrypt(self, data: Buffer) -> None:
        """Put `data` as records into `_outgoing`. The lock is let go between them: the receiver must not starve."""
        view = memoryview(data)
        start, end = 0, len(view)
        while start < end:
            with self._state:
                try:
                    start += self._object.write(view[start : start + _RECORD])
                except self._ssl.SSLError as error:
                    raise self._failure(error) from error

    def settimeout(self, seconds: float | None) -> None:
        self._plain.settimeout(seconds)

    def close(self) -> None:
        self._plain._closed = True
        # The farewell tells the peer that nobody cut the stream. If a sender is stuck there is no waiting for it.
        if self._sending.acquire(blocking=False):
            try:
                self._farewell()
            finally:
                self._sending.release()
        self._plain.close()

    def fileno(self) -> int:
        return self._plain.fileno()

    def _farewell(self) -> None:
        with self._state:
            # WantRead: the peer's own farewell is not there yet, and nobody waits for it. Others: it failed long ago.
            with contextlib.suppress(self._ssl.SSLError, ValueError):
                self._object.unwrap()
            data = self._outgoing.read()
        with contextlib.suppress(OSError):
            self._plain._socket.send(data, socket.MSG_DONTWAIT | _NO_SIGNAL)

    def _handshake(self, timeout: float) -> None:
        from . import tls

        deadline = time.monotonic() + timeout
        while True:
            done, failed = False, None
            try:
                self._object.do_handshake()
                done = True
            except self._ssl.SSLWantReadError:
                pass
            except self._ssl.SSLError as error:
                failed = error
            left = deadline - time.monotonic()
            if left <= 0 and not failed:
                raise tls.late(self.peer, timeout)
            self._plain.settimeout(max(left, 0.1))
            data = self._outgoing.read()
            try:
                if data:
                    self._plain.send((data,))
                if not done and not failed:
                    self._receive_handshake()
            except BlockIOError as error:
                if not failed:
                    raise (tls.late(self.peer, timeout) if error.errno == ETIMEDOUT else error) from error
            if failed:
                raise self._failure(failed) from failed
            if done:
                break
        self._plain.settimeout(None)
        self.peer_names = tls.peer_names(self._object.getpeercert())
        #: The version of TLS ("TLSv1.3") and the name of the cipher, for people.
        self.version = self._object.version() or ""
        self.cipher = (self._object.cipher() or ("",))[0]

    def _receive_handshake(self) -> None:
        received = self._plain.recv_into(self._ciphertext)
        if not received:
            message = "the connection ended during the TLS handshake"
            raise BlockIOError(message, errno=ECONNRESET, path=self.peer, hint="the other side may say why")
        self._incoming.write(self._ciphertext[:received])

    def _suspicion(self) -> str | None:
        """A hint for a connection that ended without a word. GnuTLS's servers leave so after a certificate they refuse,
        which they see, with TLS 1.3, when the client's handshake is long done."""
        if self._server_side or not self._fresh:
            return None
        return "it said nothing since the TLS handshake: it may ask for another client certificate, or for one"

    def _last_words(self) -> LaminaError | None:
        """The alert that the peer sent before it went, as an error: if it is the first that came, and is there."""
        if not self._receiving.acquire(blocking=False):
            return None
        try:
            if self._fresh:
                self._plain.settimeout(0.1)
                while self._failed is None and not self._ended:
                    self._receive()
                    self._decrypt_into(memoryview(bytearray(_RECORD)))
        except LaminaError:
            return None  # nothing was said: the caller has an error of its own to raise
        finally:
            self._receiving.release()
        return self._failed

    def _failure(self, error: ssl.SSLError) -> LaminaError:
        from .tls import failure

        if self._plain._closed:
            return self._plain.closed_here()
        return failure(error, peer=self.peer, server_side=self._server_side, hostname=self.hostname)


def _name_of_peer(sock: socket.socket) -> str:
    """Who is at the other end of `sock`; Unix sockets tell the process."""
    try:
        if sock.family == socket.AF_UNIX:
            pid, user, _ = struct.unpack("iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return f"pid {pid} of user {user}"
        host, port = sock.getpeername()[:2]
    except OSError:
        return "a peer that is gone"
    return printable(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
