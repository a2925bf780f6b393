"""The transmission phase of the server, without I/O: bytes become requests, results become buffers to send.

The caller receives into `buffer()`; `received(count)` returns the complete requests, checked against the rules of the
protocol. The methods `done`, `error`, `data`, `hole` and `status` make the replies; they have no state, so any number of
threads may call them. Sections of the specification: "Transmission", "Request types".

Requests are parsed in the receive buffer, and the data of a WRITE is a view of it, valid until the next call of `buffer()`. A
WRITE that does not fit is handed on in parts, so a client needs no more memory than this buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ...limits import KIB, align_down
from .. import wire

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

    from .negotiation import Agreed

#: The size of the receive buffer in bytes: one system call receives many requests.
RECEIVE_BUFFER: Final = 1024 * KIB
#: The approximate length of the parts of a long WRITE, and the alignment of their ends, so that no cluster is cut.
_PART, _PART_ALIGNMENT = 512 * KIB, 64 * KIB
#: The least free space of the receive buffer at a receive.
_SPARE = 64 * KIB
#: The longest payload of BLOCK_STATUS: the ids of a thousand contexts.
_MAX_SELECTION = 4 * KIB + 8
#: Types of requests that are no commands. REFUSED: the request breaks a rule; `payload` is (error, text). PART: a part of a
#: long WRITE; `payload` is (offset, bytes, whether it is the last part). The last part gets the reply.
REFUSED: Final = -1
PART: Final = -2

_FLAGS: Final = {
    wire.CMD_READ: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: wire.CMD_FLAG_FUA,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_CACHE: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_FUA | wire.CMD_FLAG_REQ_ONE,
}
_CHANGES: Final = frozenset({wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES})

_SIMPLE = wire.SIMPLE_REPLY.codec.pack
_CHUNK = wire.STRUCTURED_REPLY.codec
_CHUNK_EXT = wire.EXTENDED_REPLY.codec
#: A chunk's header and the offset that begins the payload of OFFSET_DATA; the same, and the length of OFFSET_HOLE.
_DATA = struct.Struct(_CHUNK.format + "Q").pack
_DATA_EXT = struct.Struct(_CHUNK_EXT.format + "Q").pack
_HOLE = struct.Struct(_CHUNK.format + "QI").pack
_HOLE_EXT = struct.Struct(_CHUNK_EXT.format + "QI").pack
#: A chunk's header and the payload of BLOCK_STATUS with one extent.
_STATUS = struct.Struct(_CHUNK.format + "III").pack
_STATUS_EXT = struct.Struct(_CHUNK_EXT.format + "IIQQ").pack


class Request(NamedTuple):
    """One request. `length`: the length of its range; `payload`: the data of a WRITE, the context ids of a BLOCK_STATUS
    (None: all selected contexts), or the payload of REFUSED and PART."""

    type: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: Any = None


class Transmission:
    """The transmission phase of one client. One thread at a time calls `received`; any number makes replies."""

    def __init__(self, agreed: Agreed) -> None:
        export = agreed.export
        self.extended = agreed.extended
        self.structured = agreed.structured
        #: The client disconnected, or broke a rule such that the stream cannot be parsed further.
        self.finished = False
        #: The violated rule, as a text.
        self.violation: str | None = None
        self._size = export.size
        self._read_only = export.read_only
        self._maximum = export.maximum
        # A client that negotiated block sizes must respect them; the request path aligns the requests of others.
        self._mask = export.minimum - 1 if agreed.aligned else 0
        self._contexts = frozenset(number for number, _ in agreed.contexts)
        self._allowed = dict(_FLAGS)
        if agreed.structured:
            self._allowed[wire.CMD_READ] |= wire.CMD_FLAG_DF
        #: The flags that a WRITE may have.
        self._write_flags = wire.CMD_FLAG_FUA | (wire.CMD_FLAG_PAYLOAD_LEN if agreed.extended else 0)
        self._header = wire.EXTENDED_REQUEST.codec if agreed.extended else wire.REQUEST.codec
        self._magic = wire.EXTENDED_REQUEST_MAGIC if agreed.extended else wire.REQUEST_MAGIC
        self._buffer = memoryview(bytearray(RECEIVE_BUFFER))
        self._begin = self._end = 0  # the received bytes that are not parsed
        self._need = self._header.size  # the length of the message that begins there
        self._waiting: Request | None = None  # the request whose payload is incomplete: a long WRITE, or a REFUSED one
        self._left = 0  # the missing bytes of that payload

    # -- bytes in

    def buffer(self) -> memoryview:
        """The buffer for the next receive; never empty. Views of earlier requests become invalid."""
        left = self._end - self._begin
        if not left:
            self._begin = self._end = 0
        elif RECEIVE_BUFFER - self._begin < self._need or RECEIVE_BUFFER - self._end < _SPARE:
            self._buffer[:left] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, left
        return self._buffer[self._end :]

    @property
    def partial(self) -> bool:
        """Whether an incomplete request was received."""
        return self._end > self._begin or self._waiting is not None

    def received(self, count: int) -> list[Request]:
        """The requests that `count` more bytes in `buffer()` completed. They get replies even if it is `finished`."""
        requests: list[Request] = []
        self._end += count
        if self._waiting is not None and not self._continue(self._waiting, requests):
            return requests
        buffer, end, finished = self._buffer, self._end, self.finished
        unpack, size, magic_here = self._header.unpack_from, self._header.size, self._magic
        disk, most, mask = self._size, self._maximum, self._mask
        # The short path accepts a WRITE only for a writable export.
        writable, asks = not self._read_only, bool(self._contexts)
        refused = ~self._write_flags
        make = tuple.__new__  # half the time of Request(...)
        while end - self._begin >= size and not finished:
            magic, flags, type, cookie, offset, length = unpack(buffer, self._begin)
            if magic != magic_here:
                self._break(f"{magic:#010x} where a request must begin")
                break
            if not (offset | length) & mask and 0 < length <= disk - offset:
                # The common cases have code of their own: 0.5 us less for a READ, 1.5 us less for a WRITE.
                if type == wire.CMD_READ and not flags and length <= most:
                    self._begin += size
                    requests.append(make(Request, (type, flags, cookie, offset, length, None)))
                    continue
                if type == wire.CMD_BLOCK_STATUS and asks and not flags & ~wire.CMD_FLAG_REQ_ONE:
                    self._begin += size
                    requests.append(make(Request, (type, flags, cookie, offset, length, None)))
                    continue
                at = self._begin + size
                if (
                    writable
                    and type == wire.CMD_WRITE
                    and not flags & refused
                    and length <= end - at
                    and length <= most
                ):
                    self._begin = at + length
                    requests.append(make(Request, (type, flags, cookie, offset, length, buffer[at : at + length])))
                    continue
            if not self._parse(Request(type, flags, cookie, offset, length), requests):
                break
            finished = self.finished
        else:
            self._need = size
        return requests

    def _break(self, violation: str) -> None:
        self.violation = violation
        self.finished = True

    def _continue(self, request: Request, requests: list[Request]) -> bool:
        """Consume the received part of the payload of `request`. Returns whether the payload is complete."""
        available = min(self._left, self._end - self._begin)
        if request.type == REFUSED:
            self._begin += available
            self._left -= available
            if not self._left:
                requests.append(request)
        else:
            at = request.offset + request.length - self._left
            if available < self._left:
                available = align_down(at + available, _PART_ALIGNMENT) - at if available >= _PART else 0
            if available > 0:
                data = self._buffer[self._begin : self._begin + available]
                self._begin += available
                self._left -= available
                requests.append(request._replace(type=PART, payload=(at, data, not self._left)))
            self._need = min(self._left, _PART)
        if self._left:
            return False
        self._waiting = None
        return True

    def _parse(self, request: Request, requests: list[Request]) -> bool:
        """Check the request whose header is at `_begin`. Returns False if more bytes are needed before the next one."""
        kind, flags, _, _, length, _ = request
        header = self._header.size
        if kind == wire.CMD_DISC:
            # Nothing may follow; its flags are ignored.
            self.finished = True
            requests.append(request)
            return False
        payload = 0
        # The client of QEMU 10.0 omits the required flag PAYLOAD_LEN of a WRITE, but sends the payload.
        if kind == wire.CMD_WRITE or (self.extended and flags & wire.CMD_FLAG_PAYLOAD_LEN):
            payload = length
            if self.extended and payload > max(self._maximum, wire.MAX_PAYLOAD):
                self._break(f"a payload of {payload} bytes")
                return False
        available = self._end - self._begin - header
        refusal = self._refusal(request, payload)
        if refusal is None and available < payload and header + payload <= RECEIVE_BUFFER:
            self._need = header + payload  # it stays in the buffer until it is complete
            return False
        self._begin += header
        if refusal is not None or available < payload:
            self._waiting = request if refusal is None else request._replace(type=REFUSED, payload=refusal)
            self._left = payload
            return self._continue(self._waiting, requests)
        data = self._buffer[self._begin : self._begin + payload]
        self._begin += payload
        if kind == wire.CMD_WRITE:
            request = request._replace(payload=data)
        elif payload:
            request = self._selection(request, data)
        requests.append(request)
        return True

    def _refusal(self, request: Request, payload: int) -> tuple[int, str] | None:
        """The rule that a request breaks, as (error number of the protocol, text), or None."""
        kind, flags, _, offset, length, _ = request
        allowed = self._allowed.get(kind)
        if allowed is None:
            return wire.EINVAL, f"there is no command {kind}"
        name = wire.COMMAND_NAMES[kind]
        if self.extended and (kind == wire.CMD_WRITE or (kind == wire.CMD_BLOCK_STATUS and self._contexts)):
            allowed |= wire.CMD_FLAG_PAYLOAD_LEN
        if flags & ~allowed:
            return wire.EINVAL, f"{name} does not take the flags {flags & ~allowed:#x}"
        if self._read_only and kind in _CHANGES:
            return wire.EPERM, "the export is read-only"
        if kind == wire.CMD_FLUSH:
            return (wire.EINVAL, "FLUSH takes neither offset nor length") if offset or length else None
        if kind == wire.CMD_BLOCK_STATUS:
            if not self._contexts:
                return wire.EINVAL, "no metadata context was selected"
            if payload:
                # The length of the range is in the payload, and is checked when that is complete.
                wrong = payload > _MAX_SELECTION or payload < 8 or payload % 4
                return (wire.EINVAL, "this is no list of contexts") if wrong else None
        return self._outside(kind, offset, length)

    def _outside(self, kind: int, offset: int, length: int) -> tuple[int, str] | None:
        name = wire.COMMAND_NAMES[kind]
        if kind in (wire.CMD_READ, wire.CMD_WRITE) and length > self._maximum:
            return wire.EINVAL, f"a {name} of {length} bytes is above the maximum of {self._maximum}"
        if offset > self._size or length > self._size - offset:
            error = wire.ENOSPC if kind in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES) else wire.EINVAL
            return error, f"{name} reaches past the end of the export at {self._size}"
        if (offset | length) & self._mask:
            return wire.EINVAL, f"{name} is not aligned to the minimum block of {self._mask + 1}"
        if kind == wire.CMD_BLOCK_STATUS and not length:
            return wire.EINVAL, "BLOCK_STATUS of no bytes"
        return None

    def _selection(self, request: Request, data: memoryview) -> Request:
        """A BLOCK_STATUS whose payload is the length of the range and context ids."""
        (length,) = struct.unpack_from(">Q", data)
        ids = struct.unpack_from(f">{(len(data) - 8) // 4}I", data, 8)
        refusal = self._outside(request.type, request.offset, length)
        if len(set(ids)) != len(ids) or not ids or not self._contexts.issuperset(ids):
            refusal = wire.EINVAL, "contexts are named that were not selected, or named twice"
        if refusal is not None:
            return request._replace(type=REFUSED, payload=refusal)
        return request._replace(length=length, payload=ids)

    # -- replies: buffers to send, in order and without others in between

    def done(self, request: Request) -> list[Buffer]:
        """The reply to a request that succeeded, without data, or after its data."""
        if self.extended:
            none = wire.REPLY_TYPE_NONE
            done = wire.REPLY_FLAG_DONE
            return [_CHUNK_EXT.pack(wire.EXTENDED_REPLY_MAGIC, done, none, request.cookie, request.offset, 0)]
        if self.structured and request.type == wire.CMD_READ:
            return [
                _CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, wire.REPLY_FLAG_DONE, wire.REPLY_TYPE_NONE, request.cookie, 0)
            ]
        return [_SIMPLE(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie)]

    def error(self, request: Request, error: int, text: str, at: int | None = None) -> list[Buffer]:
        """The reply to a request that failed: the error number of the protocol, a text, and the offset, if it is known."""
        if not self.structured:
            return [_SIMPLE(wire.SIMPLE_REPLY_MAGIC, error, request.cookie)]
        message = text.encode()[: wire.MAX_STRING].decode(errors="ignore").encode()
        payload = wire.ERROR.codec.pack(error, len(message)) + message
        kind = wire.REPLY_TYPE_ERROR
        if at is not None and request.offset <= at < request.offset + request.length:
            kind = wire.REPLY_TYPE_ERROR_OFFSET
            payload += at.to_bytes(8)
        return [self._header_of(request, kind, len(payload), last=True) + payload]

    def data(self, request: Request, offset: int, view: memoryview, *, last: bool) -> list[Buffer]:
        """Data of a READ, from `offset`; a simple reply has all of it. `last`: no further chunk follows."""
        if self.extended:
            kind, length = wire.REPLY_TYPE_OFFSET_DATA, len(view) + 8
            return [
                _DATA_EXT(wire.EXTENDED_REPLY_MAGIC, last, kind, request.cookie, request.offset, length, offset),
                view,
            ]
        if self.structured:
            kind, length = wire.REPLY_TYPE_OFFSET_DATA, len(view) + 8
            return [_DATA(wire.STRUCTURED_REPLY_MAGIC, last, kind, request.cookie, length, offset), view]
        return [_SIMPLE(wire.SIMPLE_REPLY_MAGIC, 0, request.cookie), view]

    def hole(self, request: Request, offset: int, length: int, *, last: bool) -> list[Buffer]:
        """A range of zeros of a READ, without data; only in structured replies."""
        kind = wire.REPLY_TYPE_OFFSET_HOLE
        if self.extended:
            magic = wire.EXTENDED_REPLY_MAGIC
            return [_HOLE_EXT(magic, last, kind, request.cookie, request.offset, 12, offset, length)]
        return [_HOLE(wire.STRUCTURED_REPLY_MAGIC, last, kind, request.cookie, 12, offset, length)]

    def status(self, request: Request, contexts: Sequence[tuple[int, int, bytes]]) -> list[Buffer]:
        """The reply to BLOCK_STATUS. `contexts`: the id of each context, the number of extents (at least 1), and the extents
        packed as `wire.EXTENT`, or with extended headers as `wire.EXTENT_EXT`."""
        out: list[Buffer] = []
        for number, (context, count, extents) in enumerate(contexts, 1):
            if self.extended:
                kind, payload = wire.REPLY_TYPE_BLOCK_STATUS_EXT, wire.STATUS_EXT.codec.pack(context, count) + extents
            else:
                kind, payload = wire.REPLY_TYPE_BLOCK_STATUS, context.to_bytes(4) + extents
            out += [self._header_of(request, kind, len(payload), last=number == len(contexts)), payload]
        return out

    def status_of_one(self, request: Request, context: int, length: int, status: int) -> list[Buffer]:
        """The same for one extent of one context."""
        done = wire.REPLY_FLAG_DONE
        if self.extended:
            magic, kind = wire.EXTENDED_REPLY_MAGIC, wire.REPLY_TYPE_BLOCK_STATUS_EXT
            return [_STATUS_EXT(magic, done, kind, request.cookie, request.offset, 24, context, 1, length, status)]
        kind = wire.REPLY_TYPE_BLOCK_STATUS
        return [_STATUS(wire.STRUCTURED_REPLY_MAGIC, done, kind, request.cookie, 12, context, length, status)]

    def _header_of(self, request: Request, kind: int, length: int, *, last: bool) -> bytes:
        if self.extended:
            return _CHUNK_EXT.pack(wire.EXTENDED_REPLY_MAGIC, last, kind, request.cookie, request.offset, length)
        return _CHUNK.pack(wire.STRUCTURED_REPLY_MAGIC, last, kind, request.cookie, length)
