"""A connected byte stream that is encrypted with TLS: the same to its users as a plain one (`channel`)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from errno import ECONNRESET, EPIPE, EPROTO, ETIMEDOUT
from typing import TYPE_CHECKING

from ..errors import BlockIOError, LaminaError
from .channel import HANDSHAKE_TIMEOUT, Buffer, PlainChannel
from .sockets import DONT_WAIT, NO_SIGNAL

if TYPE_CHECKING:
    import socket
    import ssl

#: The plaintext of one TLS record is at most this long.
_RECORD = 1 << 14
#: Plaintext that is encrypted before anything is sent. See `TlsChannel._encrypted`.
_BATCH = 256 << 10
#: Ciphertext received at once.
_CIPHERTEXT = 256 << 10
#: Answers that TLS itself wants to send (alerts, key updates) and the peer does not read are at most this many bytes.
_MAX_UNSENT = 64 << 10


class TlsChannel:
    """TLS over a connected stream: a socket or a plain channel, which belongs to this channel from then on, and serves its
    owner only to `close` it. The constructor does the handshake.

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
        "_talk",
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
        self._talk = 0  # bytes in `_outgoing` that TLS itself wants to say; the others are a sending thread's
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
                if self._talk:
                    self._answer()
                if count or self._ended:
                    return count
                if self._failed is None:
                    self._receive()

    def receive_soon(self, view: memoryview, *, eager: bool = True) -> int | None:
        with self._receiving:
            while True:
                if self._failed is not None:
                    raise self._failed
                count = 0 if self._ended else self._decrypt_into(view)
                if self._talk:
                    self._answer()
                if count or self._ended:
                    return count
                if self._failed is None and not self._receive(wait=False, eager=eager):
                    return None

    def wait_input(self) -> None:
        self._plain.wait_input()

    def wait_ready(self, seconds: float) -> tuple[bool, bool]:
        return self._plain.wait_ready(seconds)

    @property
    def watch(self) -> Callable[[int], None] | None:
        """As that of the plain channel."""
        return self._plain.watch

    @watch.setter
    def watch(self, watch: Callable[[int], None] | None) -> None:
        self._plain.watch = watch

    def _receive(self, *, wait: bool = True, eager: bool = False) -> bool:
        """Put what comes from the peer, at least a byte, into `_incoming`. False if not `wait` and nothing has come."""
        plain, view = self._plain, self._ciphertext
        try:
            received = plain.recv_into(view) if wait else plain.receive_soon(view, eager=eager)
        except BlockIOError as error:
            if error.errno == ECONNRESET:
                error.hint = self._suspicion()
            raise
        if received is None:
            return False
        if not received:
            from .tls import truncated

            self._failed = truncated(self.peer)
            self._failed.hint = self._suspicion() or self._failed.hint
            raise self._failed
        self._fresh = False
        with self._state:
            self._incoming.write(self._ciphertext[:received])
        return True

    def _decrypt_into(self, view: memoryview) -> int:
        """Bytes put into `view` of what was received; with 0 see whether `_ended` or `_failed` became true."""
        filled, room = 0, len(view)
        with self._state:
            read, waiting, pending = self._object.read, self._incoming, self._object.pending
            said_before = self._outgoing.pending
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
            self._talk += self._outgoing.pending - said_before
        return filled

    def _answer(self) -> None:
        """Send the messages of TLS itself, unless another thread is sending, which then sends them with its next bytes."""
        if self._sending.acquire(blocking=False):
            try:
                with self._state:
                    data, self._talk = self._outgoing.read(), 0
                self._plain.send((data,))
            finally:
                self._sending.release()
        elif self._talk > _MAX_UNSENT:
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
            self._talk = 0
            return self._outgoing.read()

    def _encrypt(self, data: Buffer) -> None:
        """Put `data` (at most _BATCH) as records into `_outgoing`, in one call: a call for each record, that others may get
        the lock between them, cost a quarter more."""
        view = memoryview(data)
        start, end = 0, len(view)
        with self._state:
            try:
                while start < end:
                    start += self._object.write(view[start:])
            except self._ssl.SSLError as error:
                raise self._failure(error) from error

    def settimeout(self, seconds: float | None) -> None:
        self._plain.settimeout(seconds)

    def end_output(self) -> None:
        self._plain.end_output()

    def close(self) -> None:
        self._plain._closed = True
        # The close_notify tells the peer that the stream is complete. It is left out if a sender is blocked.
        if self._sending.acquire(blocking=False):
            try:
                self._farewell()
            finally:
                self._sending.release()
        self._plain.close()

    def forsake(self) -> None:
        self._plain.forsake()

    def fileno(self) -> int:
        return self._plain.fileno()

    def _farewell(self) -> None:
        with self._state:
            # WantRead: the close_notify of the peer has not arrived, and is not needed. Others: the channel failed before.
            with contextlib.suppress(self._ssl.SSLError, ValueError):
                self._object.unwrap()
            data = self._outgoing.read()
        with contextlib.suppress(OSError):
            self._plain._socket.send(data, DONT_WAIT | NO_SIGNAL)

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
