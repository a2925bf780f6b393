"""The commands of the server: each executes a request on the export and makes the reply.

The data of several READs is collected in one buffer, which is reused after each send. If replies are structured, zeros are
sent as holes, in ranges that begin and end at multiples of the minimum block. An error ends only its own request; file names
are logged, and not sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from errno import ESHUTDOWN
from typing import TYPE_CHECKING, Any, Final

from ...errors import BlockIOError, LaminaError, NotSupported
from ...limits import GIB, KIB, MIB, align_down
from .. import wire
from .contexts import CONTEXTS, Context
from .export import MAX_EXTENTS
from .readahead import StatusReadahead
from .transmission import PART, REFUSED, Request, Transmission

if TYPE_CHECKING:
    from ..channel import Buffer
    from .connection import Connection
    from .negotiation import Agreed

log = logging.getLogger("lamina.nbd")

#: The bytes of replies that are collected before a send. Longer READs are answered in pieces of this length.
REPLY_BUFFER: Final = 1 * MIB
#: Commands without a payload, whose range may be long. They are executed in steps, which end at multiples of STEP bytes: the
#: first step has that length, and the next ones are longer while the steps are quick, up to MOST.
STEPPED: Final = frozenset({wire.CMD_WRITE_ZEROES, wire.CMD_TRIM})
STEP: Final = 64 * MIB
MOST: Final = 16 * GIB
#: Seconds: a step that took less doubles the next one, one that took longer halves it.
_QUICK, _LONG = 0.05, 0.2
#: The block size of the search for zeros in a READ, in bytes: the largest minimum block of the protocol.
_LOOK = 64 * KIB
_ZEROS = bytes(_LOOK)
#: The most buffers of one send.
_BUFFERS = 1000


class Commands:
    """Executes the requests of one connection, for one thread. `send` sends replies, whose data is in a buffer of `size`
    bytes, which is reused afterwards. Another thread needs an object of its own, from `for_one`."""

    def __init__(
        self,
        connection: Connection,
        session: Transmission,
        agreed: Agreed,
        send: Callable[[list[Buffer]], object],
        size: int = REPLY_BUFFER,
    ) -> None:
        self._connection = connection
        self._session = session
        self._agreed = agreed
        self._export = agreed.export
        self._send = send
        self._count = connection.count
        self._buffer = memoryview(bytearray(size))
        self._contexts = dict(agreed.contexts)
        self._part_failed: tuple[int, str] | None = None
        #: The metadata context and its number, if the client selected exactly one.
        self._only: tuple[int, Context] | None = None
        if len(agreed.contexts) == 1 and agreed.contexts[0][1] in CONTEXTS:
            self._only = agreed.contexts[0][0], CONTEXTS[agreed.contexts[0][1]]
        #: The readahead for such a client.
        self._readahead = None if self._only is None else StatusReadahead(agreed.export, self._only[1])
        #: The end and the status of the last extent that was sent alone.
        self._last_extent = (-1, 0)
        #: The number of BLOCK_STATUS requests in the last call of `answer`, and the seconds that they took.
        self.status_requests, self.status_time = 0, 0.0

    def for_one(self, request: Request, send: Callable[[list[Buffer]], object]) -> Commands:
        """The same for another thread, with a buffer for this request: at most REPLY_BUFFER bytes of a READ, so that no reply
        overwrites an earlier one."""
        size = min(request.length, REPLY_BUFFER) if request.type in (wire.CMD_READ, wire.CMD_CACHE) else 0
        return Commands(self._connection, self._session, self._agreed, send, size)

    def memory_for(self, request: Request) -> int:
        """The most bytes that `for_one`, the payload and the reply of this request take."""
        kind = request.type
        if kind in (wire.CMD_READ, wire.CMD_CACHE, wire.CMD_WRITE):
            return min(request.length, REPLY_BUFFER)
        if kind == wire.CMD_BLOCK_STATUS:
            rows = 1 if request.flags & wire.CMD_FLAG_REQ_ONE else min(request.length, MAX_EXTENTS)
            return rows * wire.EXTENT_EXT.size * len(self._contexts)
        return 0

    def answer(self, requests: list[Request]) -> list[Buffer]:
        """Execute all `requests`, and return their replies, which the caller sends before the next call. When the buffer is
        full, the replies so far are sent here. Raises a LaminaError if that fails."""
        out: list[Buffer] = []
        if self._connection.draining:
            for request in requests:
                out += self._too_late(request)
            return out
        session, read_into, buffer = self._session, self._export.read_into, self._buffer
        data, structured, is_zero = session.data, session.structured, _ZEROS.startswith
        size = len(buffer)
        write, done, clock = self._export.write, session.done, time.monotonic
        used = reads = amount = writes = written = status_requests = answered = 0
        status_time = 0.0
        for request in requests:
            kind, flags, _, offset, length, _ = request
            if kind == wire.CMD_READ and 0 < length <= _LOOK and not flags:
                if used + length > size or len(out) > _BUFFERS:
                    self._send(out)
                    out = []
                    used = 0
                view = buffer[used : used + length]
                try:
                    read_into(offset, view)
                except Exception as error:  # noqa: BLE001 - the client gets a reply in any case
                    out += self._failed(request, error)
                    continue
                reads += 1
                amount += length
                if structured and is_zero(view):
                    out += session.hole(request, offset, length, last=True)
                else:
                    out += data(request, offset, view, last=True)
                    used += length
                continue
            if kind == wire.CMD_WRITE and length:
                try:
                    write(offset, request.payload, flags)
                except Exception as error:  # noqa: BLE001 - as above
                    out += self._failed(request, error)
                    continue
                writes += 1
                written += length
                out += done(request)
                continue
            if kind == wire.CMD_BLOCK_STATUS:
                begun = clock()
                try:
                    found = self._status_of_few(request)
                except Exception as error:  # noqa: BLE001 - as above
                    found = self._failed(request, error)
                took = clock() - begun
                self._connection.status_speed.took(took)
                status_requests += 1
                status_time += took
                if found is not None:
                    answered += 1
                    out += found
                    continue
                if out:
                    self._send(out)
                    out, used = [], 0
                begun = clock()
                out += self._perform(request)
                status_time += clock() - begun
                continue
            if out:
                self._send(out)  # what follows may take long, or use the buffer
                out, used = [], 0
            out += self._perform(request)
        self.status_requests, self.status_time = status_requests, status_time
        if answered:
            self._count(BLOCK_STATUS=answered)
        if reads:
            self._count(READ=reads, bytes_read=amount)
        if writes:
            self._count(WRITE=writes, bytes_written=written)
        return out

    def _status_of_few(self, request: Request) -> list[Buffer] | None:
        """The reply to BLOCK_STATUS if a few extents are enough; else None."""
        if self._only is not None and request.flags & wire.CMD_FLAG_REQ_ONE and request.payload is None:
            if self._readahead is not None and (reply := self._known_reply(request, self._readahead)) is not None:
                return reply
            number, context = self._only
            found = self._export.status_of_first(context, request.offset, request.length)
            # A client that continues at the end of the last extent, and would get the same status, gets longer extents.
            if found is not None and self._last_extent != (request.offset, found[1]):
                return self._tell(request, number, *found)
        chosen = request.payload or self._contexts
        session, contexts = self._session, self._contexts
        answers = self._export.status_of_few(
            [contexts[number] for number in chosen],
            request.offset,
            request.length,
            one=bool(request.flags & wire.CMD_FLAG_REQ_ONE),
            wide=session.extended,
        )
        if answers is None:
            return None
        return session.status(request, [(number, *answer) for number, answer in zip(chosen, answers, strict=True)])

    def known_reply(self, request: Request) -> list[Buffer] | None:
        """The reply to a BLOCK_STATUS that was read ahead; else None."""
        readahead = self._readahead
        if readahead is None or not readahead.known or self._connection.draining:
            return None
        reply = self._known_reply(request, readahead)
        if reply is not None:
            self._connection.count_one("BLOCK_STATUS")
        return reply

    def _known_reply(self, request: Request, readahead: StatusReadahead) -> list[Buffer] | None:
        found = readahead.reply(request)
        if found is None or self._only is None:
            return None
        length, status = found
        self._last_extent = request.offset + length, status
        return self._session.status_of_one(request, self._only[0], length, status)

    def read_ahead(self) -> None:
        """Look up the extents that the client will probably ask for, while it processes the last reply."""
        readahead, speed = self._readahead, self._connection.status_speed
        if readahead is not None and readahead.walks and not readahead.known and not speed.slow:
            begun = time.monotonic()
            readahead.fetch()
            speed.took(time.monotonic() - begun)

    def _tell(self, request: Request, number: int, length: int, status: int) -> list[Buffer]:
        """The reply that tells of one extent in the only context."""
        end = request.offset + length
        self._last_extent = end, status
        if self._readahead is not None:
            self._readahead.told(request.offset, end)
        return self._session.status_of_one(request, number, length, status)

    def _too_late(self, request: Request) -> list[Buffer]:
        if request.type == wire.CMD_DISC or (request.type == PART and not request.payload[2]):
            return []
        return self._session.error(request, wire.ESHUTDOWN, "the server is about to end")

    def _perform(self, request: Request) -> list[Buffer]:
        kind = request.type
        if kind == REFUSED:
            self._count(failed=1)
            return self._session.error(request, *request.payload)
        if kind == wire.CMD_DISC:
            return []
        try:
            return _COMMANDS[kind](self, request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            return self._failed(request, error)

    def _failed(self, request: Request, error: Exception, at: int | None = None) -> list[Buffer]:
        self._count(failed=1)
        return self._session.error(request, *self._told(request, error), at)

    def _told(self, request: Request, error: Exception) -> tuple[int, str]:
        """The protocol's number for `error`, and a text without file names."""
        if isinstance(error, NotSupported) and request.flags & wire.CMD_FLAG_FAST_ZERO:
            return wire.ENOTSUP, "this cannot be zeroed quickly"
        if isinstance(error, LaminaError):
            log.warning("%s: %s", self._connection.peer, error)
            return wire.to_wire(error.errno), error.message
        log.error("%s: %s failed", self._connection.peer, request[:5], exc_info=error)
        return wire.EIO, "an error of the server itself"

    def _done(self, request: Request, name: str) -> list[Buffer]:
        self._count(**{name: 1})
        return self._session.done(request)

    # -- reading

    def _read(self, request: Request) -> list[Buffer]:
        """A READ that is long or has flags: answered in pieces of the buffer, zeros as holes."""
        session, offset, length = self._session, request.offset, request.length
        if not length:
            return self._done(request, "READ")
        if request.flags & wire.CMD_FLAG_DF and length > REPLY_BUFFER:
            self._count(failed=1)
            return session.error(request, wire.EOVERFLOW, f"an unfragmented READ is at most {REPLY_BUFFER} bytes long")
        out: list[Buffer] = []
        if not session.structured:
            out = self._read_simply(request)
        elif request.flags & wire.CMD_FLAG_DF:
            view = self._buffer[:length]
            self._export.read_into(offset, view)
            out = session.data(request, offset, view, last=True)
        else:
            end = offset + length
            while offset < end:
                if out:
                    self._send(out)
                stop = end if end - offset <= len(self._buffer) else align_down(offset + REPLY_BUFFER, _LOOK)
                try:
                    out = self._pieces(request, offset, stop, last=stop == end)
                except Exception as error:  # noqa: BLE001 - as in `_perform`; here the offset is known
                    return self._failed(request, error, offset)
                offset = stop
        # The buffer is sent before it is reused.
        if out:
            self._send(out)
        self._count(READ=1, bytes_read=length)
        return []

    def _read_simply(self, request: Request) -> list[Buffer]:
        """A simple reply reports success before all data is read; an error after that can only end the connection. Therefore
        the server reads as much as the buffer holds first. No other reply may be sent in between."""
        offset, end = request.offset, request.offset + request.length
        view = self._buffer[: end - offset]
        self._export.read_into(offset, view)
        first = self._session.data(request, offset, view, last=True)
        if len(view) == request.length:
            return first
        with self._connection.sending:
            self._send(first)
            for at in range(offset + len(view), end, REPLY_BUFFER):
                view = self._buffer[: end - at]
                try:
                    self._export.read_into(at, view)
                except Exception:
                    log.exception("%s: a read failed when its answer had begun", self._connection.peer)
                    self._connection.close()
                    return []
                self._send([view])
        return []

    def _pieces(self, request: Request, offset: int, end: int, *, last: bool) -> list[Buffer]:
        """Chunks for this range, which fits into the buffer; cut at multiples of _LOOK, and so of the minimum block."""
        session = self._session
        if self._export.reads_zero(offset, end - offset):
            return session.hole(request, offset, end - offset, last=last)
        buffer = self._buffer[: end - offset]
        self._export.read_into(offset, buffer)
        runs: list[tuple[bool, int, int]] = []
        at = offset
        while at < end:
            stop = min(align_down(at + _LOOK, _LOOK), end)
            zero = _ZEROS.startswith(buffer[at - offset : stop - offset])
            if runs and runs[-1][0] == zero:
                runs[-1] = (zero, runs[-1][1], stop)
            else:
                runs.append((zero, at, stop))
            at = stop
        out: list[Buffer] = []
        for zero, start, stop in runs:
            final = last and stop == end
            if zero:
                out += session.hole(request, start, stop - start, last=final)
            else:
                out += session.data(request, start, buffer[start - offset : stop - offset], last=final)
        return out

    def _cache(self, request: Request) -> list[Buffer]:
        self._export.cache(request.offset, request.length, self._buffer)
        return self._done(request, "CACHE")

    def _block_status(self, request: Request) -> list[Buffer]:
        chosen = request.payload or tuple(self._contexts)
        answers = self._export.status_of_many(
            [self._contexts[number] for number in chosen],
            request.offset,
            request.length,
            one=bool(request.flags & wire.CMD_FLAG_REQ_ONE),
            wide=self._session.extended,
        )
        self._count(BLOCK_STATUS=1)
        return self._session.status(
            request, [(number, *answer) for number, answer in zip(chosen, answers, strict=True)]
        )

    # -- writing

    def _write(self, request: Request) -> list[Buffer]:
        """A WRITE of length 0; `answer` executes the others."""
        if request.flags & wire.CMD_FLAG_FUA:
            self._export.flush()
        return self._done(request, "WRITE")

    def _part(self, request: Request) -> list[Buffer]:
        """A part of a long WRITE. After a failure the other parts are not written; the reply follows the last part."""
        at, data, last = request.payload
        if self._part_failed is None:
            try:
                self._export.write(at, data)
                if last and request.flags & wire.CMD_FLAG_FUA:
                    self._export.flush()
            except Exception as error:  # noqa: BLE001 - as in `_perform`; told when all parts are there
                self._part_failed = self._told(request, error)
        if not last:
            return []
        failure, self._part_failed = self._part_failed, None
        if failure is not None:
            self._count(failed=1)
            return self._session.error(request, *failure)
        self._count(bytes_written=request.length)
        return self._done(request, "WRITE")

    def _in_steps(self, request: Request, act: Callable[[int, int, int], None]) -> None:
        """Call `act(offset, length, flags)` for each step of the request. FUA becomes a flush at the end; FAST_ZERO applies
        to the first step: if that succeeds, the others must succeed. BlockIOError (ESHUTDOWN) if the request is cut short
        between two steps."""
        offset, flags = request.offset, request.flags
        end, step = offset + request.length, STEP
        if request.length <= step:
            act(offset, request.length, flags)
            return
        connection = self._connection
        clock = time.monotonic
        flags &= ~wire.CMD_FLAG_FUA
        while offset < end:
            begun = clock()
            stop = min(align_down(offset + step, STEP), end)
            act(offset, stop - offset, flags)
            flags &= ~wire.CMD_FLAG_FAST_ZERO
            offset = stop
            took = clock() - begun
            if took < _QUICK:
                step = min(step * 2, MOST)
            elif took > _LONG:
                step = max(step // 2, STEP)
            if offset < end and (connection.cutting or connection.is_gone()):
                raise BlockIOError("cut short: the server is about to end, or the client is gone", errno=ESHUTDOWN)
        if request.flags & wire.CMD_FLAG_FUA:
            self._export.flush()

    def _zero(self, request: Request) -> list[Buffer]:
        self._in_steps(request, self._export.zero)
        return self._done(request, "WRITE_ZEROES")

    def _trim(self, request: Request) -> list[Buffer]:
        self._in_steps(request, self._export.trim)
        return self._done(request, "TRIM")

    def _flush(self, request: Request) -> list[Buffer]:
        self._export.flush()
        return self._done(request, "FLUSH")


_COMMANDS: dict[int, Callable[[Commands, Request], list[Any]]] = {
    wire.CMD_READ: Commands._read,
    wire.CMD_WRITE: Commands._write,
    PART: Commands._part,
    wire.CMD_FLUSH: Commands._flush,
    wire.CMD_TRIM: Commands._trim,
    wire.CMD_CACHE: Commands._cache,
    wire.CMD_WRITE_ZEROES: Commands._zero,
    wire.CMD_BLOCK_STATUS: Commands._block_status,
}
