"""The client's half of NBD transmission, as a state machine without I/O.

`start` registers a request and gives the header to send; `buffer` says where the next bytes of the server go, and `received`
takes note of them and gives the requests that are now answered. The bytes of a large read go straight into the reader's own
view; small replies come many at a time.

Nothing is believed (proto.md, "Transmission phase"): a reply that no request asked for, a chunk outside its request, bytes
that come twice or not at all, an extent of no length, each ends the connection with an error (EPROTO), before a byte is put
where it does not belong. A request fails alone only where the server says that it failed.
"""

from __future__ import annotations

import errno
import os
import struct
from bisect import bisect_right
from collections.abc import Callable
from typing import Final, NoReturn

from ...errors import BlockIOError, LaminaError, NotSupported
from ...limits import KIB
from ...node import fill_zero
from .. import wire
from .details import ExportDetails, server_text, violation
from .request import CHANGES, Request

#: Replies are received this much at a time, unless large reads are on their way: then a header at a time, and the bytes
#: into their view. (Measured: 4 KiB reads want many replies in one call, 256 KiB reads want no copy.)
RECEIVE_BUFFER: Final = 128 * KIB
#: A read of this many bytes is large.
LARGE: Final = 32 * KIB
#: What is missing of a reply's bytes is received into its place if it is this much; less comes with what follows it.
DIRECT: Final = 16 * KIB
#: The most separate ranges in which the data of one READ may have arrived. A server that sends it in order needs one.
MAX_PIECES: Final = 1 << 14
#: Chunks of content in which a read may come, besides one for each 512 bytes: smaller ones SHOULD NOT be.
MAX_CHUNKS: Final = 1 << 16
#: The most extents of one context in a reply (SHOULD of the specification), and of all contexts together.
MAX_EXTENTS: Final = 1 << 20
MAX_ALL_EXTENTS: Final = 4 * MAX_EXTENTS
#: So many extents of a reply are kept, each of which takes a hundred bytes and more, divided among the contexts where there
#: are more than four: the answer then ends there, as if the server had said no more.
KEPT_EXTENTS: Final = 1 << 16
#: The longest chunk that tells of an error of a kind that is not known.
_MAX_ERROR: Final = 64 * KIB

_TOLD: Final = (wire.CMD_READ, wire.CMD_BLOCK_STATUS)
_SIMPLE: Final = struct.pack(">I", wire.SIMPLE_REPLY_MAGIC)
_OFFSET: Final = struct.Struct(">Q")
_RANGED: Final = (
    wire.CMD_READ,
    wire.CMD_WRITE,
    wire.CMD_TRIM,
    wire.CMD_CACHE,
    wire.CMD_WRITE_ZEROES,
    wire.CMD_BLOCK_STATUS,
)


class Transmission:
    """One connection after its handshake. `start` may be called beside `buffer` and `received`, which belong to one thread
    at a time; calls of `start` exclude each other.

    `in_flight`: requests that are not answered, by cookie, oldest first. `leaving`: the server said ESHUTDOWN, and no new
    request may be started. With `postpone`, a request that it refused for that reason is not answered, but put aside into
    `postponed`, for another connection. After an error of `received` the connection is to be closed.
    """

    def __init__(
        self, details: ExportDetails, *, postpone: bool = False, on_change: Callable[[Request], None] | None = None
    ) -> None:
        self.in_flight: dict[int, Request] = {}
        self.leaving = False
        self.postponed: list[Request] = []
        self._postpone = postpone
        self._on_change = on_change
        self._contexts = {number: name for name, number in details.contexts.items()}
        self._pack = (wire.EXTENDED_REQUEST if details.mode == "extended" else wire.REQUEST).codec.pack
        self._request_magic = wire.EXTENDED_REQUEST_MAGIC if details.mode == "extended" else wire.REQUEST_MAGIC
        self._extended = details.mode == "extended"
        self._parse = self._parse_simple if details.mode == "simple" else self._parse_chunks
        self._status_type = wire.REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else wire.REPLY_TYPE_BLOCK_STATUS
        layout = {"simple": wire.SIMPLE_REPLY, "structured": wire.STRUCTURED_REPLY, "extended": wire.EXTENDED_REPLY}
        self._head = layout[details.mode].size
        #: A header, with the offset that follows it in chunks of data.
        self._lead = self._head + (0 if details.mode == "simple" else _OFFSET.size)
        self._begins = struct.pack(">I", layout[details.mode]["magic"].default)
        self._cookie = 0
        # What is on its way is what was started (by senders) less what is done (by the receiver): two counters, since
        # either side may only change its own. Of all replies with bytes, and of large reads.
        self._reads_started = self._reads_done = 0
        self._large_started = self._large_done = 0
        self._buffer = bytearray(RECEIVE_BUFFER)
        self._view = memoryview(self._buffer)
        self._end = 0
        #: Bytes that still belong into `_into`; then `_finish` is called with the request and whether it is the last chunk.
        self._left = 0
        self._into = self._view
        self._of: Request | None = None
        self._last = False
        #: A chunk that does not fit into the buffer: its type, and all of its bytes.
        self._long: tuple[int, memoryview] | None = None
        self._answered: list[Request] = []

    # -- requests

    def start(self, request: Request) -> bytes:
        """Take `request` in flight: its header, to be sent at once with `request.payload` behind it."""
        self._cookie = cookie = self._cookie + 1
        request.cookie = cookie
        if request.command in _TOLD:
            self._reads_started += 1
            if request.length >= LARGE and request.command == wire.CMD_READ:
                self._large_started += 1
        self.in_flight[cookie] = request
        length = request.length
        if request.flags & wire.CMD_FLAG_PAYLOAD_LEN and request.payload is not None:
            length = len(request.payload)
        return self._pack(self._request_magic, request.flags, request.command, cookie, request.offset, length)

    def detach(self, request: Request) -> None:
        """The view of `request` is its owner's again: what still comes for it goes nowhere. Not beside `received`."""
        if request.view is None:
            return
        nowhere = memoryview(bytearray(request.length))
        if self._of is request and self._left and self._long is None:
            self._into = nowhere[: self._left]
        request.view = nowhere

    def disconnect(self) -> bytes:
        """The request that ends transmission; nothing may be sent after it."""
        return self._pack(self._request_magic, 0, wire.CMD_DISC, 0, 0, 0)

    # -- replies

    @property
    def reads(self) -> int:
        """How many requests whose replies carry bytes are on their way."""
        return self._reads_started - self._reads_done

    def buffer(self) -> memoryview:
        """Where the next bytes of the server go; never empty."""
        if self._left >= DIRECT or self._long is not None:
            return self._into
        if self._large_started != self._large_done and not self._left and self._end < self._lead:
            return self._view[self._end : self._lead]
        return self._view[self._end :]

    def received(self, count: int) -> list[Request]:
        """`count` bytes were put into `buffer()`: the requests that these answered."""
        self._answered = []
        if self._left >= DIRECT or self._long is not None:
            self._into = self._into[count:]
            self._left -= count
            if not self._left:
                self._complete()
            return self._answered
        self._end += count
        end = self._end
        position = 0
        if self._left:
            position = min(self._left, end)
            self._into[:position] = self._view[:position]
            self._into = self._into[position:]
            self._left -= position
            if not self._left:
                self._complete()
        if not self._left:
            position = self._parse(position, end)
        if position:
            # What is left is the beginning of one message; a copy through bytes, since the two may overlap.
            rest = bytes(self._view[position:end])
            self._buffer[: len(rest)] = rest
            self._end = len(rest)
        return self._answered

    def _take(self, position: int, end: int, into: memoryview) -> int:
        """Put what is there of the bytes that belong `into`; where the rest goes is noted. Returns the next position."""
        length = len(into)
        have = end - position
        if have >= length:
            into[:] = self._view[position : position + length]
            return position + length
        if have:
            into[:have] = self._view[position:end]
        self._into = into[have:]
        self._left = length - have
        return end

    def _complete(self) -> None:
        """The bytes that were missing are there."""
        request, last = self._of, self._last
        assert request is not None
        if self._long is not None:
            (kind, body), self._long = self._long, None
            self._chunk(request, kind, body, last)
        if last:
            self._finish(request)
        self._of, self._into = None, self._view

    def _parse_simple(self, position: int, end: int) -> int:
        in_flight, unpack, view = self.in_flight, wire.SIMPLE_REPLY.codec.unpack_from, self._buffer
        while end - position >= 16:
            magic, error, cookie = unpack(view, position)
            if magic != wire.SIMPLE_REPLY_MAGIC:
                raise violation(f"a reply begins with {magic:#x}")
            request = in_flight.get(cookie)
            if request is None:
                self._stray(cookie)
            position += 16
            if error:
                request.error = self._failure(request, error)
            elif request.command == wire.CMD_READ:
                request.bounds = [0, request.length]
                assert request.view is not None
                position = self._take(position, end, request.view)
                if self._left:
                    self._of, self._last = request, True
                    return position
            self._finish(request)
        if end - position >= 4 and self._buffer[position : position + 4] != _SIMPLE:
            raise violation(f"a reply begins with {self._buffer[position : position + 4].hex()}")
        return position

    def _parse_chunks(self, position: int, end: int) -> int:
        in_flight, head, room, extended = self.in_flight, self._head, self._buffer, self._extended
        unpack = (wire.EXTENDED_REPLY if extended else wire.STRUCTURED_REPLY).codec.unpack_from
        expected = wire.EXTENDED_REPLY_MAGIC if extended else wire.STRUCTURED_REPLY_MAGIC
        while True:
            have = end - position
            if have < head:
                # A simple reply is shorter than a chunk's header, and a peer that sends neither may never send so much.
                if have >= 4 and room[position : position + 4] != self._begins:
                    if extended or room[position : position + 4] != _SIMPLE:
                        raise violation(f"a reply begins with {room[position : position + 4].hex()}")
                    if have >= wire.SIMPLE_REPLY.size:
                        position = self._simple_among_chunks(position)
                        continue
                return position
            if extended:
                magic, flags, kind, cookie, offset, length = unpack(room, position)
            else:
                magic, flags, kind, cookie, length = unpack(room, position)
                offset = -1
            if magic != expected:
                if magic != wire.SIMPLE_REPLY_MAGIC or extended:
                    raise violation(f"a reply begins with {magic:#x}")
                position = self._simple_among_chunks(position)
                continue
            request = in_flight.get(cookie)
            if request is None:
                self._stray(cookie)
            if extended and offset != request.offset:
                raise violation(f"a reply for offset {offset} to a request for offset {request.offset}")
            last = bool(flags & wire.REPLY_FLAG_DONE)
            if kind == wire.REPLY_TYPE_OFFSET_DATA:
                if length < 9:
                    raise violation(f"a chunk of data of {length} bytes with its offset")
                if have < head + 8:
                    return position
                (at,) = _OFFSET.unpack_from(room, position + head)
                length -= 8
                if at == request.offset and length == request.length and not request.contents and request.view:
                    request.contents, request.bounds, part = 1, [0, length], request.view
                else:
                    part = self._claim(request, at, length)
                position = self._take(position + head + 8, end, part)
                if self._left:
                    self._of, self._last = request, last
                    return position
            else:
                self._check_length(request, kind, length, last)
                if have < head + length:
                    if head + length <= RECEIVE_BUFFER:
                        return position
                    body = memoryview(bytearray(length))
                    self._long, self._of, self._last = (kind, body), request, last
                    return self._take(position + head, end, body)
                position += head
                if length:
                    self._chunk(request, kind, self._view[position : position + length], last)
                    position += length
            if last:
                self._finish(request)

    def _simple_among_chunks(self, position: int) -> int:
        """A simple reply where chunks are spoken: allowed for what has no payload."""
        _, error, cookie = wire.SIMPLE_REPLY.codec.unpack_from(self._buffer, position)
        request = self.in_flight.get(cookie)
        if request is None:
            self._stray(cookie)
        if request.command == wire.CMD_READ or (request.command == wire.CMD_BLOCK_STATUS and not error):
            raise violation(f"a simple reply to {_name(request)}, though structured ones were agreed")
        if request.contents or request.status or request.error:
            raise violation(f"a simple reply to {_name(request)} behind chunks")
        if error:
            request.error = self._failure(request, error)
        self._finish(request)
        return position + wire.SIMPLE_REPLY.size

    def _check_length(self, request: Request, kind: int, length: int, last: bool) -> None:
        """Whether a chunk other than data can have this length, before it is waited for."""
        if kind & wire.REPLY_TYPE_ERROR_BIT:
            known = kind in (wire.REPLY_TYPE_ERROR, wire.REPLY_TYPE_ERROR_OFFSET)
            least = wire.ERROR.size + (_OFFSET.size if kind == wire.REPLY_TYPE_ERROR_OFFSET else 0)
            if not least <= length <= (least + wire.MAX_STRING if known else _MAX_ERROR):
                raise violation(f"a chunk of {length} bytes that tells of an error")
        elif kind == wire.REPLY_TYPE_NONE:
            if length or not last:
                raise violation(f"a chunk without content that has {length} bytes, or is not the last")
        elif kind == wire.REPLY_TYPE_OFFSET_HOLE:
            if request.command != wire.CMD_READ or length != wire.HOLE.size:
                raise violation(f"a hole in {length} bytes, in reply to {_name(request)}")
        elif kind == self._status_type:
            self._check_status_length(request, length)
        else:
            raise violation(f"a chunk of the unknown type {kind}, in reply to {_name(request)}")

    def _check_status_length(self, request: Request, length: int) -> None:
        layout, lead = (wire.EXTENT_EXT, wire.STATUS_EXT.size) if self._extended else (wire.EXTENT, 4)
        count, rest = divmod(length - lead, layout.size)
        if request.command != wire.CMD_BLOCK_STATUS or rest or count < 1:
            raise violation(f"block status in {length} bytes, in reply to {_name(request)}")
        if count > min(MAX_EXTENTS, request.length):
            raise violation(f"{count} extents in {request.length} bytes")
        if count > 1 and request.flags & wire.CMD_FLAG_REQ_ONE:
            raise violation(f"{count} extents, and one was asked for")
        request.told += count
        if request.told > MAX_ALL_EXTENTS:
            raise violation(f"more than {MAX_ALL_EXTENTS} extents in one reply")

    def _chunk(self, request: Request, kind: int, body: memoryview, last: bool) -> None:
        """A whole chunk whose length was checked: a hole, extents, or an error."""
        if kind == wire.REPLY_TYPE_OFFSET_HOLE:
            offset, length = wire.HOLE.codec.unpack(body)
            if not length:
                raise violation("a hole of no length")
            fill_zero(self._claim(request, offset, length))
        elif kind & wire.REPLY_TYPE_ERROR_BIT:
            self._error(request, kind, body)
        else:
            self._status(request, body)

    def _claim(self, request: Request, offset: int, length: int) -> memoryview:
        """The part of the reader's view for `length` bytes at `offset`, which no other chunk may have any more."""
        start = offset - request.offset
        if request.command != wire.CMD_READ or start < 0 or length > request.length - start:
            raise violation(f"bytes {offset} to {offset + length} in reply to {_name(request)}")
        request.contents += 1
        if request.contents > 1 and request.flags & wire.CMD_FLAG_DF:
            raise violation("several chunks of content, and one was asked for")
        if request.contents > MAX_CHUNKS + request.length // 512:
            raise violation(f"more than {request.contents - 1} chunks in reply to {_name(request)}")
        assert request.view is not None
        bounds = request.bounds
        stop = start + length
        if not bounds:
            request.bounds = [start, stop]
            return request.view[start:stop]
        # An odd place is inside a stretch that came already: each stretch has two bounds.
        place = bisect_right(bounds, start)
        if place & 1 or (place < len(bounds) and stop > bounds[place]):
            raise violation(f"bytes {offset} to {offset + length} came twice, in reply to {_name(request)}")
        joins_left = place > 0 and bounds[place - 1] == start
        joins_right = place < len(bounds) and bounds[place] == stop
        bounds[place - joins_left : place + joins_right] = [start][joins_left:] + [stop][joins_right:]
        if len(bounds) > 2 * MAX_PIECES:
            raise violation(f"a read comes in more than {MAX_PIECES} separate pieces")
        return request.view[start:stop]

    def _error(self, request: Request, kind: int, body: memoryview) -> None:
        error, length = wire.ERROR.codec.unpack_from(body)
        fixed = wire.ERROR.size
        at = None
        if kind == wire.REPLY_TYPE_ERROR_OFFSET:
            fixed += _OFFSET.size
        if length > len(body) - fixed or length > wire.MAX_STRING:
            raise violation(f"an error with a text of {length} bytes in a chunk of {len(body)}")
        if kind == wire.REPLY_TYPE_ERROR_OFFSET:
            (at,) = _OFFSET.unpack_from(body, wire.ERROR.size + length)
            if request.command in _RANGED and not 0 <= at - request.offset < max(request.length, 1):
                raise violation(f"an error at offset {at}, in reply to {_name(request)}")
        text = server_text(body[wire.ERROR.size : wire.ERROR.size + length])
        if request.error is not None:
            raise violation(f"several errors in reply to {_name(request)}")
        # An error without a number is one all the same.
        request.error = self._failure(request, error or wire.EINVAL, text, at)

    def _failure(self, request: Request, error: int, text: str = "", at: int | None = None) -> LaminaError:
        """The Lamina error for an error of the server."""
        if error == wire.ESHUTDOWN:
            self.leaving = True
        number = wire.from_wire(error)
        kind = NotSupported if number == errno.ENOTSUP else BlockIOError
        reason = os.strerror(number) if error in wire.WIRE_ERRORS else f"error {error}, which NBD does not have"
        place = {"offset": request.offset if at is None else at, "length": request.length}
        if request.command not in _RANGED:
            place = {}
        operation = wire.COMMAND_NAMES[request.command].lower().replace("_", " ")
        hint = "the server is shutting down" if error == wire.ESHUTDOWN else None
        message = f"the server says: {text} ({reason})" if text else f"the server says: {reason}"
        return kind(message, errno=number, operation=operation, hint=hint, **place)

    def _status(self, request: Request, body: memoryview) -> None:
        kept = min(KEPT_EXTENTS, max(4 * KEPT_EXTENTS // max(len(self._contexts), 1), 1))
        if self._extended:
            number, count = wire.STATUS_EXT.codec.unpack_from(body)
            rows = body[wire.STATUS_EXT.size :]
            sent = len(rows) // wire.EXTENT_EXT.size
            if count != sent:
                raise violation(f"{count} extents announced, {sent} sent")
            extents = list(wire.EXTENT_EXT.codec.iter_unpack(rows[: kept * wire.EXTENT_EXT.size]))
        else:
            (number,) = struct.unpack_from(">I", body)
            extents = list(wire.EXTENT.codec.iter_unpack(body[4 : 4 + kept * wire.EXTENT.size]))
        name = self._contexts.get(number)
        if name is None:
            raise violation(f"block status of the context number {number}, which was not selected")
        if request.status is None:
            request.status = {}
        if name in request.status:
            raise violation(f"two answers for the context {server_text(name.encode('utf-8', 'surrogateescape'))}")
        total = 0
        for length, _ in extents:
            if not length:
                raise violation("an extent of no length")
            if total >= request.length:
                raise violation(f"an extent past the {request.length} bytes that were asked about")
            total += length
        if total > request.length:
            # The last extent may end after the range of the request; the rest is dropped.
            length, flags = extents[-1]
            extents[-1] = (length - (total - request.length), flags)
        request.status[name] = extents

    def _finish(self, request: Request) -> None:
        """The last of a reply is there."""
        if request.error is None:
            if request.command == wire.CMD_READ:
                if request.bounds != [0, request.length]:
                    raise violation(f"not all bytes came, and no error, in reply to {_name(request)}")
            elif request.command == wire.CMD_BLOCK_STATUS:
                self._check_contexts(request)
        if request.command in _TOLD:
            self._reads_done += 1
            if request.length >= LARGE and request.command == wire.CMD_READ:
                self._large_done += 1
        # In this order an interrupt anywhere leaves no request that is neither done nor known here.
        if self._postpone and request.error is not None and request.error.errno == errno.ESHUTDOWN:
            self.postponed.append(request)
            del self.in_flight[request.cookie]
            return
        if self._on_change is not None and (request.command in CHANGES or request.command == wire.CMD_FLUSH):
            self._on_change(request)
        request.done = True
        self._answered.append(request)
        del self.in_flight[request.cookie]

    def _check_contexts(self, request: Request) -> None:
        asked = len(self._contexts)
        if request.flags & wire.CMD_FLAG_PAYLOAD_LEN:
            assert request.payload is not None
            asked = (len(request.payload) - _OFFSET.size) // 4
        if len(request.status or ()) != asked:
            raise violation(f"block status of {len(request.status or ())} contexts out of {asked}")

    def _stray(self, cookie: int) -> NoReturn:
        raise violation(f"a reply to the request {cookie}, which is not waiting for one")


def _name(request: Request) -> str:
    if request.command not in _RANGED:
        return wire.COMMAND_NAMES[request.command]
    return f"{wire.COMMAND_NAMES[request.command]} of {request.length} bytes at {request.offset}"
