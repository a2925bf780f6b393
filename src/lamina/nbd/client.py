"""The NBD client: one export of a server, for any number of threads.

    with Client.connect("nbd://localhost/disk") as client:
        head = client.read(0, 4096)

Requests are pipelined: threads share the connections, and one thread has many requests on their way with `start_*`. What
is too long for the server is split, a read or a question about status that is not aligned is widened; a change that is not
aligned is refused, since only a layer that orders requests can read, change and write a block (`lamina.open` has one).
"""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from ..errors import BlockIOError, Closed, LaminaError, NotSupported, OutOfRange, ReadOnly
from ..limits import GIB, MAX_SIZE, align_down, align_up
from . import wire
from .channel import Channel
from .client_connection import enter
from .client_facts import Facts, Wish
from .link import Durability, Link, Pending, Sent
from .uri import Target, parse

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

#: The longest effect of one request without payload where lengths have 32 bits; half of what fits, and of what broke servers.
_MAX_EFFECT: Final = 1 * GIB
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


class Group(Pending):
    """Several requests that are one to the caller: done when all are; `finish` makes the outcome."""

    __slots__ = ("_finish", "_outcome", "_parts")

    def __init__(self, parts: Sequence[Pending], finish: Callable[[list[Any]], Any] | None = None) -> None:
        self._parts = parts
        self._finish = finish
        self._outcome: tuple[Any] | None = None

    def wait(self) -> Any:
        if self._outcome is None:
            first: LaminaError | None = None
            outcomes = []
            # All are waited for, whatever happens: no reply may come into a view that the caller has back.
            for part in self._parts:
                try:
                    outcomes.append(part.wait())
                except LaminaError as error:
                    first = first or error
            if first is not None:
                raise first
            self._outcome = (self._finish(outcomes) if self._finish else None,)
        return self._outcome[0]


class Client:
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

    def __init__(self, target: Target, wish: Wish, facts: Facts, durability: Durability) -> None:
        self.target = target
        self.facts = facts
        self.size, self.flags = facts.size, facts.flags
        self.minimum, self.preferred, self.maximum = facts.minimum, facts.preferred, facts.maximum
        self.block_sizes_known = facts.block_sizes_known
        self.name, self.description = facts.name, facts.description
        self.contexts = facts.contexts
        self.mode, self.handshake, self.tls = facts.mode, facts.handshake, facts.tls
        self._wish = wish
        self._durability = durability
        self._links: list[Link] = []
        self._turn = itertools.count()
        self._closed = False
        #: The largest payload of one request: that of the server, as far as every peer takes it.
        self._most = max(align_down(min(facts.maximum, wire.MAX_PAYLOAD), facts.minimum), facts.minimum)
        self._effect = MAX_SIZE if facts.mode == "extended" else _MAX_EFFECT

    @classmethod
    def connect(
        cls,
        target: Target | str,
        *,
        contexts: Sequence[str] = (wire.BASE_ALLOCATION,),
        structured: bool = True,
        extended: bool = True,
        connections: int = 1,
        connect_timeout: float = 10.0,
        handshake_timeout: float = 10.0,
        open_timeout: float = 0.0,
        reconnect: float = 0.0,
        request_timeout: float | None = None,
    ) -> Self:
        """A client of the export that `target` (a URI, or a `Target`) names.

        `contexts`: queries for metadata contexts. `structured`, `extended`: whether these replies and headers are asked
        for. `connections`: that many, where the server says that several are coherent; else one. Times are seconds:
        `open_timeout`, how long to try to connect while nobody listens; `reconnect`, how long a request waits for a lost
        connection to come back, with pauses that double, 0: a loss is an error; `request_timeout`, how long for each reply:
        then the connection counts as lost. Raises any LaminaError: NotFound where there is no such export or socket.
        """
        where = parse(target) if isinstance(target, str) else target
        wish = Wish(where.export, where.tls, tuple(contexts), structured, extended)

        def opened(patience: float) -> tuple[Channel, Facts]:
            return enter(where, wish, connect_timeout=connect_timeout, timeout=handshake_timeout, patience=patience)

        durability = Durability()
        channel, facts = opened(open_timeout)
        client = cls(where, wish, facts, durability)

        def reopened() -> tuple[Channel, Facts]:
            channel, now = opened(reconnect)
            try:
                client._hold_against(now)
            except LaminaError:
                channel.close()
                raise
            return channel, now

        def link(channel: Channel, facts: Facts) -> Link:
            reopen = reopened if reconnect > 0 else None
            return Link(
                where, channel, facts, durability, reopen=reopen, patience=reconnect, request_timeout=request_timeout
            )

        client._links.append(link(channel, facts))
        try:
            for _ in range(connections - 1 if client.can_multi_conn else 0):
                channel, facts = opened(0.0)
                try:
                    client._hold_against(facts)
                except LaminaError:
                    channel.close()
                    raise
                client._links.append(link(channel, facts))
        except BaseException:
            client.close()
            raise
        return client

    def _hold_against(self, now: Facts) -> None:
        """Whether an export that was opened again is the one that callers know, or better."""
        known = self.facts
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

    def _has(flag: int) -> property:  # type: ignore[misc]
        return property(lambda self: bool(self.flags & flag))

    read_only = _has(wire.FLAG_READ_ONLY)
    is_rotational = _has(wire.FLAG_ROTATIONAL)
    can_flush = _has(wire.FLAG_SEND_FLUSH)
    can_fua = _has(wire.FLAG_SEND_FUA)
    can_trim = _has(wire.FLAG_SEND_TRIM)
    can_zero = _has(wire.FLAG_SEND_WRITE_ZEROES)
    can_fast_zero = _has(wire.FLAG_SEND_FAST_ZERO)
    can_cache = _has(wire.FLAG_SEND_CACHE)
    can_df = _has(wire.FLAG_SEND_DF)
    can_multi_conn = _has(wire.FLAG_CAN_MULTI_CONN)
    can_status_payload = _has(wire.FLAG_BLOCK_STATUS_PAYLOAD)

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
        self.start_read(offset, memoryview(data)).wait()
        return bytes(data)

    def read_into(self, offset: int, view: Buffer) -> None:
        """Fill `view` with the bytes at `offset`."""
        self.start_read(offset, view).wait()

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Make the bytes at `offset` equal to `data`; with `fua` they are on stable storage on return."""
        self.start_write(offset, data, fua).wait()

    def zero(self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False) -> None:
        """Make the bytes read as zero. `no_hole`: their room stays allocated. `fast`: quickly, or NotSupported."""
        self.start_zero(offset, length, fua=fua, no_hole=no_hole, fast=fast).wait()

    def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """The bytes are no longer needed; what they read as afterwards is not defined."""
        self.start_trim(offset, length, fua).wait()

    def cache(self, offset: int, length: int) -> None:
        """The bytes will be read soon."""
        self.start_cache(offset, length).wait()

    def flush(self) -> None:
        """What was answered before, over any connection, is on stable storage on return. Where the server has no FLUSH,
        there is nothing to do. Fails once after a loss of unflushed writes (see the class)."""
        self.start_flush().wait()

    def block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> dict[str, list[tuple[int, int]]]:
        """(length, flags) of the extents from `offset` on, by context; never none, no longer than asked, perhaps less.
        `contexts`: only these (default: all that were selected). `one`: only the first extent of each. NotSupported where
        a context was not selected."""
        found: dict[str, list[tuple[int, int]]]
        found = self.start_block_status(offset, length, contexts=contexts, one=one).wait()
        return found

    # -- many at a time

    def start_read(self, offset: int, view: Buffer, *, piece: int = wire.MAX_PAYLOAD) -> Pending:
        """Begin to fill `view`, which must live, and not be read, until `wait` returned. What is longer than `piece` bytes
        (a power of two, from 64 KiB) goes out in several requests, all at once and over all connections."""
        into = _flat(view)
        length = len(into)
        self._check("read", offset, length)
        most = min(self._most, piece)
        if length <= most and not (offset | length) & (self.minimum - 1):
            return self._start(wire.CMD_READ, offset, length, 0, into) if length else Group(())
        lo, hi = self._widened(offset, offset + length)
        if (lo, hi) == (offset, offset + length):
            return Group([self._start(wire.CMD_READ, lo + at, len(p), 0, p) for at, p in _pieces(into, lo, most)])
        room = memoryview(bytearray(hi - lo)) if hi - lo <= most else None
        if room is None:
            # Only the two ends are read through a buffer of their own.
            first, last = align_up(offset, self.minimum), align_down(offset + length, self.minimum)
            cuts = [offset, *sorted({first, last} - {offset, offset + length}), offset + length]
            return Group(
                [self.start_read(a, into[a - offset : b - offset], piece=piece) for a, b in itertools.pairwise(cuts)]
            )

        def finish(_: list[Any]) -> None:
            into[:] = room[offset - lo : offset - lo + length]

        return Group([self._start(wire.CMD_READ, lo, hi - lo, 0, room)], finish)

    def start_write(self, offset: int, data: Buffer, fua: bool = False, *, piece: int = wire.MAX_PAYLOAD) -> Pending:
        """Begin a write; `data` must not change until `wait` returned. `piece` as for `start_read`."""
        view = _flat(data)
        self._check_change("write", offset, len(view))
        flags = self._fua(fua)
        if self.mode == "extended":
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
        most = min(self._most, piece)
        if len(view) <= most:
            return self._start(wire.CMD_WRITE, offset, len(view), flags, payload=view) if len(view) else Group(())
        parts = _pieces(view, offset, most)
        return Group([self._start(wire.CMD_WRITE, offset + at, len(p), flags, payload=p) for at, p in parts])

    def start_zero(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> Pending:
        """Begin to zero."""
        self._need(self.can_zero, "WRITE_ZEROES", "zero")
        if fast:
            self._need(self.can_fast_zero, "FAST_ZERO", "zero")
        self._check_change("zero", offset, length)
        flags = self._fua(fua)
        flags |= wire.CMD_FLAG_NO_HOLE if no_hole else 0
        flags |= wire.CMD_FLAG_FAST_ZERO if fast else 0
        return self._effects(wire.CMD_WRITE_ZEROES, offset, length, flags)

    def start_trim(self, offset: int, length: int, fua: bool = False) -> Pending:
        """Begin to trim."""
        self._need(self.can_trim, "TRIM", "trim")
        self._check_change("trim", offset, length)
        return self._effects(wire.CMD_TRIM, offset, length, self._fua(fua))

    def start_cache(self, offset: int, length: int) -> Pending:
        """Begin to fetch into the server's cache."""
        self._need(self.can_cache, "CACHE", "cache")
        self._check("cache", offset, length)
        lo, hi = self._widened(offset, offset + length)
        return self._effects(wire.CMD_CACHE, lo, hi - lo, 0, self._most)

    def start_flush(self) -> Pending:
        """Begin to flush: covers the requests that were answered before this call."""
        self._open()
        durability = self._durability
        if durability.doubtful:
            raise durability.error()
        if not self.can_flush:
            return Group(())
        request = Sent(wire.CMD_FLUSH)
        request.covers, durability.answered = durability.answered, False
        self._link().submit(request)
        return request

    def start_block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> Pending:
        """Begin to ask for block status; `wait` returns what `block_status` does."""
        self._check("block status", offset, length)
        wanted = list(self.contexts if contexts is None else dict.fromkeys(contexts))
        missing = [name for name in wanted if name not in self.contexts]
        if missing or not wanted:
            what = f"metadata context {missing[0]}" if missing else "metadata context"
            raise NotSupported(f"the server gave no {what}", path=str(self.target), operation="block status")
        if not length:
            return Group((), lambda _: {name: [] for name in wanted})
        lo, hi = self._widened(offset, offset + length)
        if hi - lo > self.minimum:
            hi = align_down(
                min(hi, lo + self._effect), self.minimum
            )  # the odd tail of an export is a question of its own
        flags = wire.CMD_FLAG_REQ_ONE if one else 0
        payload = None
        if self.can_status_payload and len(wanted) < len(self.contexts):
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
            payload = struct.pack(f">Q{len(wanted)}I", hi - lo, *(self.contexts[name] for name in wanted))
        part = self._start(wire.CMD_BLOCK_STATUS, lo, hi - lo, flags, payload=payload)

        def finish(found: list[Any]) -> dict[str, list[tuple[int, int]]]:
            return {name: _cut(found[0][name], offset - lo, length) for name in wanted}

        return Group([part], finish)

    # -- how

    def _open(self) -> None:
        if self._closed:
            raise Closed("the client was closed", path=str(self.target))

    def _link(self) -> Link:
        links = self._links
        return links[0] if len(links) == 1 else links[next(self._turn) % len(links)]

    def _start(
        self,
        command: int,
        offset: int,
        length: int,
        flags: int,
        view: memoryview | None = None,
        payload: memoryview | bytes | None = None,
    ) -> Pending:
        request = Sent(command, offset, length, flags, view, payload)
        try:
            self._link().submit(request)
        except LaminaError as error:
            # `wait` tells: other parts of the same read may be on their way over other links, and must be waited for.
            request.error, request.done = error, True
        return request

    def _effects(self, command: int, offset: int, length: int, flags: int, most: int = 0) -> Pending:
        """A request without payload, in as many as it takes."""
        step = most or self._effect
        end = offset + length
        parts = [self._start(command, at, min(step, end - at), flags) for at in range(offset, end, step)]
        return parts[0] if len(parts) == 1 else Group(parts)

    def _widened(self, offset: int, end: int) -> tuple[int, int]:
        """The same in whole blocks; the end of the export counts as one."""
        return align_down(offset, self.minimum), min(align_up(end, self.minimum), self.size)

    def _fua(self, fua: bool) -> int:
        if fua:
            self._need(self.can_fua, "FUA", "write")
        return wire.CMD_FLAG_FUA if fua else 0

    def _need(self, has: bool, what: str, operation: str) -> None:
        if not has:
            raise NotSupported(f"the server has no {what}", path=str(self.target), operation=operation)

    def _check(self, operation: str, offset: int, length: int) -> None:
        self._open()
        if offset < 0 or length < 0 or offset > self.size or length > self.size - offset:
            raise self._outside(operation, offset, length)

    def _check_change(self, operation: str, offset: int, length: int) -> None:
        if self.read_only:
            hint = "open it for reading"
            raise ReadOnly("the export is read-only", path=str(self.target), operation=operation, hint=hint)
        self._check(operation, offset, length)
        end = offset + length
        if self.minimum > 1 and (offset % self.minimum or (end % self.minimum and end != self.size)):
            raise BlockIOError(
                f"the server takes only whole blocks of {self.minimum} bytes",
                errno=errno.EINVAL,
                path=str(self.target),
                operation=operation,
                offset=offset,
                length=length,
                hint="open it with lamina.open, which reads and rewrites blocks",
            )

    def _outside(self, operation: str, offset: int, length: int) -> OutOfRange:
        message = f"the request is not inside the {self.size} bytes of the export"
        return OutOfRange(message, path=str(self.target), operation=operation, offset=offset, length=length)

    # -- the end

    def close(self) -> None:
        """Wait for what is on its way (it is finished, or failed, on return), tell the server goodbye, and close."""
        self._closed = True
        for link in self._links:
            link.close()

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


def _flat(data: Buffer) -> memoryview:
    view = data if isinstance(data, memoryview) else memoryview(data)
    return view if view.format == "B" and view.ndim == 1 and view.contiguous else view.cast("B")


def _pieces(view: memoryview, offset: int, most: int) -> list[tuple[int, memoryview]]:
    """`view` cut into parts of at most `most` bytes, at multiples of `most` of the export where there is a choice."""
    first = most - offset % most
    cuts = [0, *range(first, len(view), most), len(view)] if first < len(view) else [0, len(view)]
    return [(a, view[a:b]) for a, b in itertools.pairwise(cuts)]


def _cut(extents: list[tuple[int, int]], skip: int, length: int) -> list[tuple[int, int]]:
    """The extents of `length` bytes behind the first `skip`, which were asked about only for the sake of whole blocks."""
    if skip == 0 and sum(size for size, _ in extents) <= length:
        return extents
    found = []
    for size, flags in extents:
        size, skip = size - min(size, skip), skip - min(size, skip)
        if size and length:
            found.append((min(size, length), flags))
            length -= min(size, length)
    return found
