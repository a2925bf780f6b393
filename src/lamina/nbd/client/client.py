"""The NBD client: one export of a server, for any number of threads.

    with Client.connect("nbd://localhost/disk") as client:
        head = client.read(0, 4096)

Requests are pipelined: threads share the connections, and one thread has many requests on their way with `start_*`. What
is too long for the server is split, a read or a question about status that is not aligned is widened; a change that is not
aligned is refused, since only a layer that orders requests can read, change and write a block (`lamina.open` has one).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

from ...errors import BlockIOError
from .. import wire
from ..channel import Channel
from ..uri import Target, parse
from .calls import Calls
from .connection import Check, enter, never
from .details import ExportDetails, HandshakeOptions
from .link import Link
from .request import Durability, Pending, Sent, take_leave
from .times import Times

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

#: Flags whose loss, after a reconnect, would break what callers were told.
_PROMISES: Final = (
    wire.FLAG_SEND_FLUSH
    | wire.FLAG_SEND_FUA
    | wire.FLAG_SEND_TRIM
    | wire.FLAG_SEND_WRITE_ZEROES
    | wire.FLAG_SEND_DF
    | wire.FLAG_CAN_MULTI_CONN
    | wire.FLAG_SEND_CACHE
    | wire.FLAG_SEND_FAST_ZERO
    | wire.FLAG_BLOCK_STATUS_PAYLOAD
)


class Client(Calls):
    """One export, over one or several connections. Offsets, lengths and sizes are bytes. Safe for any number of threads,
    except `close`. Made by `connect`.

    `size` is what the server announced. `minimum`, `preferred`, `maximum` are its block sizes, or what a client may assume
    where it told none (`block_sizes_known`). An export whose size is not a multiple of the minimum is read to its last byte,
    as far as the server lets one: the last request then ends at the size.

    All requests may be sent twice, since each, done twice, does what it does once: that is how `reconnect` works. Writes that
    were answered and not flushed when a connection was lost may be gone, if the server was restarted: the next `flush` says
    so, once, by failing (EIO). Errors are LaminaErrors: OutOfRange, ReadOnly, NotSupported, Closed, BlockIOError with the
    server's errno and text; EPROTO where it broke the protocol, ECONNRESET where it went away, ETIMEDOUT.
    """

    @classmethod
    def connect(
        cls,
        target: Target | str,
        *,
        contexts: Sequence[str] = (wire.BASE_ALLOCATION,),
        structured: bool = True,
        extended: bool = True,
        connections: int = 1,
        connect_timeout: float | None = None,
        handshake_timeout: float | None = None,
        open_timeout: float = 0.0,
        reconnect: float = 0.0,
        request_timeout: float | None = None,
    ) -> Self:
        """A client of the export that `target` (a URI, or a `Target`) names.

        `contexts`: queries for metadata contexts. `structured`, `extended`: whether these replies and headers are asked
        for. `connections`: that many, where the server says that several are coherent; else one. Times are seconds:
        `open_timeout`, how long to try to connect while nobody listens; `reconnect`, how long a request waits for a lost
        connection to come back, with pauses that double, 0: a loss is an error; `request_timeout`, how long the server may
        make no progress with what it was asked, before the connection counts as lost (None: 60, and 600 while it flushes,
        trims or zeroes; 0: for ever); `connect_timeout` and `handshake_timeout`, how long it may take for these (None: as
        `request_timeout`, else 10). Raises any LaminaError: NotFound where there is no such export or socket.
        """
        where = parse(target) if isinstance(target, str) else target
        wanted = HandshakeOptions(where.export, where.tls, tuple(contexts), structured, extended)
        times = Times.all(where.timeout if request_timeout is None else request_timeout)
        durability = Durability()

        def opened(patience: float, check: Check = never) -> tuple[Channel, ExportDetails]:
            return enter(
                where,
                wanted,
                connect_timeout=times.connect if connect_timeout is None else connect_timeout,
                timeout=times.connect if handshake_timeout is None else handshake_timeout,
                patience=patience,
                check=check,
            )

        def reopened(check: Check) -> tuple[Channel, ExportDetails]:
            channel, now = opened(reconnect, check)
            try:
                client._hold_against(now)
            except BaseException:
                channel.close()
                raise
            return channel, now

        def link(channel: Channel, details: ExportDetails) -> Link:
            return Link(where, channel, details, durability, reopen=reopened, patience=reconnect, times=times)

        channel, details = opened(open_timeout)
        try:
            client = cls(where, wanted, details, durability)
            client._links.append(link(channel, details))
        except BaseException:
            channel.close()
            raise
        try:
            for _ in range(connections - 1 if client.can_multi_conn else 0):
                channel, details = opened(0.0)
                try:
                    client._hold_against(details)
                    client._links.append(link(channel, details))
                except BaseException:
                    channel.close()
                    raise
        except BaseException:
            client.close()
            raise
        return client

    def _hold_against(self, now: ExportDetails) -> None:
        """Whether an export that was opened again is the one that callers know, or better."""
        known = self.details
        worse = [
            what
            for what, changed in (
                (f"it has {now.size} bytes now, and had {known.size}", now.size < known.size),
                ("it is read-only now", bool(now.flags & ~known.flags & wire.FLAG_READ_ONLY)),
                ("it lacks features that it had", bool(known.flags & ~now.flags & _PROMISES)),
                ("its blocks are larger", now.minimum > known.minimum),
                ("it takes less at once", now.maximum < self._most),
                ("its replies have another form", now.mode != known.mode),
                ("its metadata contexts are others", now.contexts != known.contexts),
                ("it is no longer encrypted", known.tls and not now.tls),
            )
            if changed
        ]
        if worse:
            message = f"the export is not what it was before the connection was lost: {', '.join(worse)}"
            raise BlockIOError(message, errno=errno.ESTALE, path=str(self.target), hint="open it again")

    # -- what it is

    @property
    def max_transfer(self) -> int:
        """The longest read or write that goes out as one request: what the server takes, and at most 32 MiB."""
        return self._most

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._links)

    # -- one at a time

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`."""
        self._check("read", offset, length)
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, view: Buffer, *, piece: int = wire.MAX_PAYLOAD) -> None:
        """Fill `view` with the bytes at `offset`. `piece` as for `start_read`."""
        started: list[Sent] = []
        try:  # as `_whole`, without its cost
            self._read(started, offset, view, piece).wait()
        except BaseException:
            take_leave(started)
            raise

    def write(self, offset: int, data: Buffer, fua: bool = False, *, piece: int = wire.MAX_PAYLOAD) -> None:
        """Make the bytes at `offset` equal to `data`; with `fua` they are on stable storage on return."""
        started: list[Sent] = []
        try:
            self._write(started, offset, data, fua, piece).wait()
        except BaseException:
            take_leave(started)
            raise

    def zero(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False) -> None:
        """Make the bytes read as zero. `no_hole`: their room stays allocated. `fast`: quickly, or NotSupported."""
        self._whole(lambda started: self._zero(started, offset, length, fua, no_hole, fast))

    def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """The bytes are no longer needed; what they read as afterwards is not defined."""
        self._whole(lambda started: self._trim(started, offset, length, fua))

    def cache(self, offset: int, length: int) -> None:
        """The bytes will be read soon."""
        self._whole(lambda started: self._cache(started, offset, length))

    def flush(self) -> None:
        """What was answered before, over any connection, is on stable storage on return. Where the server has no FLUSH,
        there is nothing to do. Fails once after a loss of unflushed writes (see the class)."""
        self._whole(self._flush)

    def block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> dict[str, list[tuple[int, int]]]:
        """(length, flags) of the extents from `offset` on, by context; never none, no longer than asked, perhaps less.
        `contexts`: only these (default: all that were selected). `one`: only the first extent of each. NotSupported where
        a context was not selected; BlockIOError (EPROTO) from a server that tells of a few bytes each time."""
        found: dict[str, list[tuple[int, int]]]
        found = self._whole(lambda started: self._status(started, offset, length, contexts, one))
        return found

    # -- many at a time

    def start_read(self, offset: int, view: Buffer, *, piece: int = wire.MAX_PAYLOAD) -> Pending:
        """Begin to fill `view`, which must live, and not be read, until `wait` returned. What is longer than `piece` bytes
        (a power of two, from 64 KiB) goes out in several requests, all at once and over all connections."""
        started: list[Sent] = []
        try:  # as `_begun`, without its cost
            return self._read(started, offset, view, piece)
        except BaseException:
            take_leave(started)
            raise

    def start_write(self, offset: int, data: Buffer, fua: bool = False, *, piece: int = wire.MAX_PAYLOAD) -> Pending:
        """Begin a write; `data` must not change until `wait` returned. `piece` as for `start_read`."""
        started: list[Sent] = []
        try:
            return self._write(started, offset, data, fua, piece)
        except BaseException:
            take_leave(started)
            raise

    def start_zero(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> Pending:
        """Begin to zero. Of what takes very many requests, only the last ones are on their way on return."""
        return self._begun(lambda started: self._zero(started, offset, length, fua, no_hole, fast))

    def start_trim(self, offset: int, length: int, fua: bool = False) -> Pending:
        """Begin to trim; as `start_zero`."""
        return self._begun(lambda started: self._trim(started, offset, length, fua))

    def start_cache(self, offset: int, length: int) -> Pending:
        """Begin to fetch into the server's cache; as `start_zero`."""
        return self._begun(lambda started: self._cache(started, offset, length))

    def start_flush(self) -> Pending:
        """Begin to flush: covers the requests that were answered before this call."""
        return self._begun(self._flush)

    def start_block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> Pending:
        """Begin to ask for block status; `wait` returns what `block_status` does."""
        return self._begun(lambda started: self._status(started, offset, length, contexts, one))

    # -- the end

    def close(self) -> None:
        """Wait for what is on its way (it is finished, or failed, on return), tell the server goodbye, and close. A server
        that makes no progress is waited for two seconds. From any thread; in a child of the process that opened it, only
        what the child has is given back, and the server notices nothing."""
        if any(link.inherited for link in self._links):
            self.forsake()
            return
        self._closed = True
        for link in self._links:
            link.hasten()
        first: BaseException | None = None
        for link in self._links:
            try:
                link.close()
            except BaseException as error:  # noqa: BLE001 - the other connections are closed, too
                first = first or error
        if first is not None:
            raise first

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def forsake(self) -> None:
        """Give the descriptors back in a process that only inherited this client by a fork; the server hears nothing."""
        self._closed = True
        for link in self._links:
            link.forsake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.target}: {self.size} bytes, {self.mode}{', tls' if self.tls else ''}>"
