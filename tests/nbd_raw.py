"""A client of NBD that can be as wrong as a test wants, and is strict about every byte that it receives.

It shares nothing with Lamina's own client: it sends what it is told to, in whatever order, and holds all replies against the
rules of the protocol, which is why `Raw.collect` is an assertion in itself. A stream carries it: a socket to a running
server (`dial`), or the server's machines in memory (`nbd_memory.MemoryServer`).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lamina.nbd import wire

#: Seconds after which a silent server has failed the test.
PATIENCE = 20.0
FIXED = wire.FLAG_C_FIXED_NEWSTYLE
#: Flags of a client that knows all there is to know.
CLIENT_FLAGS = FIXED | wire.FLAG_C_NO_ZEROES
#: Option replies that are followed by others.
_MORE = {wire.REP_SERVER, wire.REP_INFO, wire.REP_META_CONTEXT}
#: More than any chunk that a request of a test is answered with.
_MOST = wire.MAX_PAYLOAD + 4096


class Gone(Exception):
    """The server closed the connection."""


class Stream(Protocol):
    def send(self, data: bytes) -> None: ...
    def recv(self, length: int) -> bytes: ...
    def close(self) -> None: ...


class SocketStream:
    """Bytes through a Unix socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)  # without a timeout: it waits where the server has a queue
        self.sock.settimeout(PATIENCE)

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone from error

    def recv(self, length: int) -> bytes:
        """Exactly so many bytes. Raises Gone at the end of the stream, and fails if it ends within them."""
        parts, left = [], length
        while left:
            try:
                part = self.sock.recv(min(left, 1 << 20))
            except ConnectionResetError as error:
                raise Gone from error
            if not part:
                assert left == length, (
                    f"the server left in the middle of a message: {left} of {length} bytes are missing"
                )
                raise Gone
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def rest(self) -> bytes:
        """All that the server says until it closes."""
        parts = []
        try:
            while part := self.sock.recv(1 << 16):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    def finish(self) -> None:
        """No more is sent; what the server says is still read."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


class Chunk(NamedTuple):
    """One chunk of a reply; a simple reply is one chunk of type None."""

    type: int | None
    flags: int
    payload: bytes


@dataclass
class Reply:
    """All that answered one request."""

    cookie: int
    error: int = 0
    text: str = ""
    at: int | None = None  #: the offset of an error that names one
    simple: bool = False
    chunks: list[Chunk] = field(default_factory=list)
    #: (offset, length, bytes or None for a hole) of a READ
    content: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    #: [(length, status)] of each context id of a BLOCK_STATUS
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        """The bytes of a READ that succeeded."""
        assert not self.error, f"error {self.error}: {self.text}"
        return b"".join(bytes(length) if part is None else part for _, length, part in sorted(self.content, key=_first))


def _first(item: tuple[int, int, bytes | None]) -> int:
    return item[0]


class Asked(NamedTuple):
    type: int
    flags: int
    offset: int
    length: int


class Raw:
    """One connection. Not thread-safe. `minimum` and the contexts are learnt in the negotiation."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.structured = self.extended = False
        self.size = self.flags = 0
        self.minimum = 1  #: every boundary in a reply is held against it
        self.contexts: dict[str, int] = {}
        self.asked: dict[int, Asked] = {}
        self._cookie = 0x1122334400000000
        self._fragments: dict[int, Reply] = {}

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    # -- negotiation

    def greet(self, flags: int | None = CLIENT_FLAGS) -> int:
        """The server's handshake flags; the client's are sent, if any."""
        magic, style, offered = wire.GREETING.codec.unpack(self.stream.recv(wire.GREETING.size))
        assert (magic, style) == (wire.INIT_MAGIC, wire.OPTS_MAGIC)
        if flags is not None:
            self.stream.send(wire.CLIENT_FLAGS.pack(flags=flags))
        return int(offered)

    def send_option(
        self, option: int, data: bytes = b"", *, length: int | None = None, magic: int = wire.OPTS_MAGIC
    ) -> None:
        self.stream.send(option_bytes(option, data, length=length, magic=magic))

    def option_replies(self, option: int) -> list[tuple[int, bytes]]:
        """(type, data) of each reply to one option, up to the one that ends it. An error's text is held to the rules."""
        replies = []
        while True:
            magic, answered, type, length = wire.OPTION_REPLY.codec.unpack(self.stream.recv(wire.OPTION_REPLY.size))
            assert (magic, answered) == (wire.OPTION_REPLY_MAGIC, option)
            assert length <= 16 << 10, f"a reply of {length} bytes"
            data = self.stream.recv(length) if length else b""
            replies.append((type, data))
            if type & wire.REP_FLAG_ERROR:
                assert type in wire.REP_ERROR_NAMES, f"unknown error {type:#x}"
                assert len(data) <= wire.MAX_STRING
                assert data.decode().isprintable(), data
            if type not in _MORE:
                assert type == wire.REP_ACK or type & wire.REP_FLAG_ERROR, f"reply of type {type:#x}"
                assert type != wire.REP_ACK or not data, "an ACK has no data"
                return replies

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        self.send_option(option, data)
        replies = self.option_replies(option)
        if replies[-1][0] == wire.REP_ACK:
            self._agreed(option, replies)
        return replies

    def _agreed(self, option: int, replies: list[tuple[int, bytes]]) -> None:
        if option == wire.OPT_STRUCTURED_REPLY:
            self.structured = True
        elif option == wire.OPT_EXTENDED_HEADERS:
            self.structured = self.extended = True
        elif option == wire.OPT_SET_META_CONTEXT:
            self.contexts = {data[4:].decode(): int.from_bytes(data[:4]) for _, data in replies[:-1]}
        elif option in (wire.OPT_GO, wire.OPT_INFO):
            details = items(replies)
            self.size, self.flags = struct.unpack(">QH", details[wire.INFO_EXPORT])
            if wire.INFO_BLOCK_SIZE in details:
                self.minimum = struct.unpack(">III", details[wire.INFO_BLOCK_SIZE])[0]

    def begin(
        self, name: str, mode: str = "structured", contexts: Sequence[str] = (), *, block_sizes: bool = True
    ) -> Raw:
        """The whole negotiation of a client that behaves. `mode`: "simple", "structured" or "extended"."""
        self.greet()
        if mode != "simple":
            option = wire.OPT_EXTENDED_HEADERS if mode == "extended" else wire.OPT_STRUCTURED_REPLY
            assert self.option(option) == [(wire.REP_ACK, b"")]
        if contexts:
            self.option(wire.OPT_SET_META_CONTEXT, meta(name, *contexts))
            assert set(self.contexts) == set(contexts)
        replies = self.option(wire.OPT_GO, info(name, *([wire.INFO_BLOCK_SIZE] if block_sizes else [])))
        assert replies[-1][0] == wire.REP_ACK, replies
        return self

    # -- transmission

    def request(
        self,
        type: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
        effect: int | None = None,
        send: bool = True,
    ) -> bytes:
        """Send one request, and know that it was sent. `effect`: the length of what it is about, where that is not
        `length` (a payload of BLOCK_STATUS). Returns its bytes; `send` False only that."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        self.asked[cookie] = Asked(type, flags, offset, length if effect is None else effect)
        codec = wire.EXTENDED_REQUEST.codec if self.extended else wire.REQUEST.codec
        magic = wire.EXTENDED_REQUEST_MAGIC if self.extended else wire.REQUEST_MAGIC
        message = codec.pack(magic, flags, type, cookie, offset, length) + payload
        if send:
            self.stream.send(message)
        return message

    def write_bytes(self, offset: int, payload: bytes, *, flags: int = 0) -> bytes:
        """The message of a WRITE, with the flag that extended headers want; counted as sent."""
        flags |= wire.CMD_FLAG_PAYLOAD_LEN if self.extended else 0
        return self.request(wire.CMD_WRITE, offset, len(payload), flags=flags, payload=payload, send=False)

    def disc(self) -> None:
        self.request(wire.CMD_DISC)
        self.asked.popitem()

    def collect(self, count: int | None = None) -> list[Reply]:
        """The next `count` replies that are whole (all that are due by default), in the order they ended in."""
        whole: list[Reply] = []
        while self.asked if count is None else len(whole) < count:
            reply = self._chunk()
            if reply is not None:
                whole.append(reply)
        return whole

    def ask(self, type: int, offset: int = 0, length: int = 0, **more: Any) -> Reply:
        """One request and its reply, with nothing else under way."""
        assert not self.asked
        self.request(type, offset, length, **more)
        return self.collect()[0]

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        return self.ask(wire.CMD_READ, offset, length, flags=flags).data

    def write(self, offset: int, payload: bytes, flags: int = 0) -> Reply:
        assert not self.asked
        self.stream.send(self.write_bytes(offset, payload, flags=flags))
        return self.collect()[0]

    def block_status(self, offset: int, length: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        reply = self.ask(wire.CMD_BLOCK_STATUS, offset, length, flags=flags)
        assert not reply.error, reply.text
        names = {number: name for name, number in self.contexts.items()}
        return {names[number]: extents for number, extents in reply.status.items()}

    def ended(self) -> bool:
        """Whether the server has nothing more to say and closes."""
        try:
            data = self.stream.recv(1)
        except Gone:
            return True
        raise AssertionError(f"the server says more, beginning with {data!r}")

    def _chunk(self) -> Reply | None:
        magic = int.from_bytes(head := self.stream.recv(4))
        if magic == wire.SIMPLE_REPLY_MAGIC:
            return self._simple(head)
        layout = wire.EXTENDED_REPLY if self.extended else wire.STRUCTURED_REPLY
        assert self.structured, f"{magic:#x} where a simple reply must begin"
        fields = layout.codec.unpack(head + self.stream.recv(layout.size - 4))
        assert magic == fields[0] == (wire.EXTENDED_REPLY_MAGIC if self.extended else wire.STRUCTURED_REPLY_MAGIC)
        _, flags, type, cookie, *offset, length = fields
        assert cookie in self.asked, f"a reply with the cookie {cookie:#x}, which nobody waits for"
        asked = self.asked[cookie]
        assert not offset or offset[0] == asked.offset, "an extended reply repeats the offset of its request"
        assert flags & ~wire.REPLY_FLAG_DONE == 0
        assert length <= _MOST
        chunk = Chunk(type, flags, self.stream.recv(length) if length else b"")
        reply = self._fragments.setdefault(cookie, Reply(cookie))
        reply.chunks.append(chunk)
        self._take(reply, asked, chunk)
        if not flags & wire.REPLY_FLAG_DONE:
            return None
        del self._fragments[cookie], self.asked[cookie]
        self._judge(reply, asked)
        return reply

    def _simple(self, head: bytes) -> Reply:
        _, error, cookie = wire.SIMPLE_REPLY.codec.unpack(head + self.stream.recv(wire.SIMPLE_REPLY.size - 4))
        assert not self.extended, "extended headers have no simple replies"
        assert cookie in self.asked, f"a reply with the cookie {cookie:#x}, which nobody waits for"
        assert cookie not in self._fragments, "a simple reply among the chunks of a structured one"
        asked = self.asked.pop(cookie)
        assert not self.structured or asked.type not in (wire.CMD_READ, wire.CMD_BLOCK_STATUS), "chunks were agreed"
        assert error == 0 or error in wire.WIRE_ERRORS, f"{error} is no error of the protocol"
        reply = Reply(cookie, error, simple=True, chunks=[Chunk(None, wire.REPLY_FLAG_DONE, b"")])
        if asked.type == wire.CMD_READ and not error and asked.length:
            reply.content.append((asked.offset, asked.length, self.stream.recv(asked.length)))
        return reply

    def _take(self, reply: Reply, asked: Asked, chunk: Chunk) -> None:
        payload = chunk.payload
        if chunk.type == wire.REPLY_TYPE_NONE:
            assert chunk.flags & wire.REPLY_FLAG_DONE, "a chunk of type NONE is the last"
            assert not payload
        elif chunk.type == wire.REPLY_TYPE_OFFSET_DATA:
            assert len(payload) >= 9, "a data chunk has data"
            assert asked.type == wire.CMD_READ
            reply.content.append((int.from_bytes(payload[:8]), len(payload) - 8, payload[8:]))
        elif chunk.type == wire.REPLY_TYPE_OFFSET_HOLE:
            offset, length = wire.HOLE.codec.unpack(payload)
            assert length, "a hole has a length"
            assert asked.type == wire.CMD_READ
            reply.content.append((offset, length, None))
        elif chunk.type in (wire.REPLY_TYPE_BLOCK_STATUS, wire.REPLY_TYPE_BLOCK_STATUS_EXT):
            assert asked.type == wire.CMD_BLOCK_STATUS
            self._status(reply, chunk)
        else:
            assert chunk.type in (wire.REPLY_TYPE_ERROR, wire.REPLY_TYPE_ERROR_OFFSET), f"a chunk of type {chunk.type}"
            error, length = wire.ERROR.codec.unpack_from(payload)
            text = payload[wire.ERROR.size : wire.ERROR.size + length]
            assert error in wire.WIRE_ERRORS, f"{error} is no error of the protocol"
            assert length <= wire.MAX_STRING
            rest = payload[wire.ERROR.size + length :]
            assert len(rest) == (8 if chunk.type == wire.REPLY_TYPE_ERROR_OFFSET else 0)
            reply.error, reply.text = error, text.decode()
            assert "\0" not in reply.text
            if rest:
                reply.at = int.from_bytes(rest)
                assert asked.offset <= reply.at < asked.offset + asked.length, "an error outside its request"

    def _status(self, reply: Reply, chunk: Chunk) -> None:
        payload = chunk.payload
        if self.extended:
            assert chunk.type == wire.REPLY_TYPE_BLOCK_STATUS_EXT, "the only status with extended headers"
            context, count = wire.STATUS_EXT.codec.unpack_from(payload)
            extents = list(wire.EXTENT_EXT.codec.iter_unpack(payload[wire.STATUS_EXT.size :]))
            assert count == len(extents)
        else:
            assert chunk.type == wire.REPLY_TYPE_BLOCK_STATUS
            context = int.from_bytes(payload[:4])
            extents = list(wire.EXTENT.codec.iter_unpack(payload[4:]))
        assert context in self.contexts.values(), f"context {context} was not selected"
        assert context not in reply.status, "one chunk for each context"
        assert extents, "at least one extent"
        assert len(extents) <= 1 << 20
        assert all(length for length, _ in extents), "extents have a length"
        assert all(status < 1 << 32 for _, status in extents)
        reply.status[context] = extents

    def _judge(self, reply: Reply, asked: Asked) -> None:
        """A reply is whole: does it add up?"""
        end, at = asked.offset + asked.length, asked.offset
        for offset, length, _ in sorted(reply.content, key=_first):
            assert offset >= at, "chunks overlap, or begin before the request"
            assert reply.error or offset == at, f"the bytes from {at} to {offset} are missing"
            at = offset + length
            assert at <= end, "a chunk past the request"
            for edge in (offset, at):
                assert edge % self.minimum == 0 or edge in (asked.offset, end), f"{edge} in a minimum of {self.minimum}"
        if reply.error:
            assert [chunk.type for chunk in reply.chunks].count(wire.REPLY_TYPE_ERROR) <= 1
        elif asked.type == wire.CMD_READ:
            assert at == end, f"the bytes from {at} to {end} are missing"
            assert not asked.flags & wire.CMD_FLAG_DF or len(reply.content) <= 1, "DF: one content chunk at most"
        elif asked.type == wire.CMD_BLOCK_STATUS:
            assert reply.status
            assert asked.flags & wire.CMD_FLAG_PAYLOAD_LEN or set(reply.status) == set(self.contexts.values())
            finer = self.contexts.get(wire.EXACT)
            for context, extents in reply.status.items():
                lengths = [length for length, _ in extents]
                assert not asked.flags & wire.CMD_FLAG_REQ_ONE or (len(lengths) == 1 and lengths[0] <= asked.length)
                assert sum(lengths) <= asked.length
                aligned = context == finer or (asked.offset | asked.length) % self.minimum
                assert aligned or not any(length % self.minimum for length in lengths), (self.minimum, extents)
        else:
            assert not reply.content
            assert not reply.status


# -- messages


def option_bytes(option: int, data: bytes = b"", *, length: int | None = None, magic: int = wire.OPTS_MAGIC) -> bytes:
    return wire.OPTION.codec.pack(magic, option, len(data) if length is None else length) + data


def sized(data: bytes | str, length: int | None = None) -> bytes:
    """A string with its length before it: the true one, or another."""
    data = data.encode() if isinstance(data, str) else data
    return (len(data) if length is None else length).to_bytes(4) + data


def info(name: bytes | str, *wanted: int, length: int | None = None, count: int | None = None) -> bytes:
    """The data of INFO and GO; `length` and `count` are lies, if given."""
    number = len(wanted) if count is None else count
    return sized(name, length) + number.to_bytes(2) + b"".join(item.to_bytes(2) for item in wanted)


def meta(name: bytes | str, *queries: bytes | str, length: int | None = None, count: int | None = None) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    number = len(queries) if count is None else count
    return sized(name, length) + number.to_bytes(4) + b"".join(map(sized, queries))


def items(replies: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
    """The items of the INFO replies, each at most once."""
    found: dict[int, bytes] = {}
    for type, data in replies:
        if type == wire.REP_INFO:
            number = int.from_bytes(data[:2])
            assert number not in found, f"item {number} is told twice"
            found[number] = data[2:]
    return found


def dial(path: object) -> Raw:
    """A connection to a server's Unix socket."""
    return Raw(SocketStream(str(path)))


def await_server(path: object, patience: float = PATIENCE) -> None:
    """Return when the server has greeted somebody: by then it has opened all the files that serving takes."""
    with dial(path) as raw:
        assert isinstance(raw.stream, SocketStream)
        raw.stream.sock.settimeout(patience)
        raw.greet(None)
