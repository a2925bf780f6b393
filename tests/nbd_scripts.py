"""What a server says, byte for byte, right or wrong: building blocks for scripts, and the client's machines that hear them.

Nothing here knows what a right server is. A script is bytes; it is delivered in pieces of any size.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lamina.nbd import wire
from lamina.nbd.client.details import ExportDetails, HandshakeOptions, Mode
from lamina.nbd.client.negotiation import Negotiation, Task
from lamina.nbd.client.transmission import Request, Transmission

FIXED = wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
ALL_FLAGS = 0x1FFF & ~(wire.FLAG_READ_ONLY | wire.FLAG_SEND_RESIZE | wire.FLAG_ROTATIONAL)
SIZE = 1 << 20


class Cut(Exception):
    """The script ended before the client had what it needs."""


def greeting(flags: int = FIXED) -> bytes:
    return wire.GREETING.pack(flags=flags)


def option(number: int, kind: int = wire.REP_ACK, data: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return wire.OPTION_REPLY.pack(option=number, type=kind, length=size) + data


def refusal(number: int, kind: int = wire.REP_ERR_UNSUP, text: bytes = b"") -> bytes:
    return option(number, kind, text)


def info_export(size: int = SIZE, flags: int = ALL_FLAGS, number: int = wire.OPT_GO) -> bytes:
    return option(number, wire.REP_INFO, struct.pack(">HQH", wire.INFO_EXPORT, size, flags))


def info_sizes(minimum: int, preferred: int, maximum: int, number: int = wire.OPT_GO) -> bytes:
    return option(number, wire.REP_INFO, struct.pack(">HIII", wire.INFO_BLOCK_SIZE, minimum, preferred, maximum))


def context(name: bytes = b"base:allocation", number: int = 1, of: int = wire.OPT_SET_META_CONTEXT) -> bytes:
    return option(of, wire.REP_META_CONTEXT, struct.pack(">I", number) + name)


def export(name: bytes, description: bytes = b"") -> bytes:
    return option(wire.OPT_LIST, wire.REP_SERVER, struct.pack(">I", len(name)) + name + description)


#: The usual answers up to GO: extended headers are refused, structured replies and one context agreed.
STRUCTURED = (
    greeting()
    + refusal(wire.OPT_EXTENDED_HEADERS)
    + option(wire.OPT_STRUCTURED_REPLY)
    + context()
    + option(wire.OPT_SET_META_CONTEXT)
)
GO = option(wire.OPT_GO)


def negotiate(
    script: bytes, wanted: HandshakeOptions | None = None, task: Task = "enter", *, step: int = 1 << 30
) -> Negotiation:
    """A negotiation that heard all of `script`, or as much as it wants; Cut if it wants more."""
    machine = Negotiation(wanted or HandshakeOptions("x"), task, all_exports=task == "describe" and wanted is None)
    at = 0
    while not machine.done:
        if machine.wants_tls:
            machine.tls_started()
            continue
        room = machine.buffer()
        part = script[at : at + min(len(room), step)]
        if not part:
            raise Cut
        room[: len(part)] = part
        at += len(part)
        machine.received(len(part))
    assert at == len(script), "it did not listen to the end"
    return machine


def details(mode: Mode = "structured", **fields: object) -> ExportDetails:
    """What was agreed, for a transmission."""
    known = ExportDetails(
        "x", SIZE, ALL_FLAGS, mode, "newstyle-fixed", False, contexts={"base:allocation": 1, "x:y": 7}
    )
    return known._replace(**fields)  # type: ignore[arg-type]


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return wire.SIMPLE_REPLY.pack(error=error, cookie=cookie) + data


class Chunks:
    """Chunks of replies, structured or extended; `offset` is that of all requests they answer."""

    def __init__(self, mode: Mode, offset: int = 0) -> None:
        self.extended = mode == "extended"
        self.offset = offset

    def chunk(
        self, kind: int, data: bytes = b"", *, cookie: int = 1, done: bool = True, length: int | None = None
    ) -> bytes:
        size = len(data) if length is None else length
        flags = wire.REPLY_FLAG_DONE if done else 0
        if self.extended:
            head = wire.EXTENDED_REPLY.pack(flags=flags, type=kind, cookie=cookie, offset=self.offset, length=size)
        else:
            head = wire.STRUCTURED_REPLY.pack(flags=flags, type=kind, cookie=cookie, length=size)
        return head + data

    def data(self, offset: int, data: bytes, *, cookie: int = 1, done: bool = True) -> bytes:
        packed = struct.pack(">Q", offset) + data
        return self.chunk(wire.REPLY_TYPE_OFFSET_DATA, packed, cookie=cookie, done=done)

    def hole(self, offset: int, length: int, *, cookie: int = 1, done: bool = True) -> bytes:
        packed = struct.pack(">QI", offset, length)
        return self.chunk(wire.REPLY_TYPE_OFFSET_HOLE, packed, cookie=cookie, done=done)

    def none(self, cookie: int = 1) -> bytes:
        return self.chunk(wire.REPLY_TYPE_NONE, cookie=cookie)

    def error(
        self,
        error: int,
        text: bytes = b"",
        *,
        at: int | None = None,
        cookie: int = 1,
        done: bool = True,
        length: int | None = None,
        kind: int | None = None,
    ) -> bytes:
        data = struct.pack(">IH", error, len(text) if length is None else length) + text
        usual = wire.REPLY_TYPE_ERROR
        if at is not None:
            data += struct.pack(">Q", at)
            usual = wire.REPLY_TYPE_ERROR_OFFSET
        return self.chunk(usual if kind is None else kind, data, cookie=cookie, done=done)

    def status(
        self,
        extents: Sequence[tuple[int, int]],
        number: int = 1,
        *,
        cookie: int = 1,
        done: bool = False,
        count: int | None = None,
    ) -> bytes:
        if self.extended:
            data = struct.pack(">II", number, len(extents) if count is None else count)
            data += b"".join(struct.pack(">QQ", *extent) for extent in extents)
            return self.chunk(wire.REPLY_TYPE_BLOCK_STATUS_EXT, data, cookie=cookie, done=done)
        data = struct.pack(">I", number) + b"".join(struct.pack(">II", *extent) for extent in extents)
        return self.chunk(wire.REPLY_TYPE_BLOCK_STATUS, data, cookie=cookie, done=done)


def read(offset: int, length: int, flags: int = 0) -> Request:
    return Request(wire.CMD_READ, offset, length, flags, memoryview(bytearray(b"?" * length)))


def status(offset: int, length: int, flags: int = 0) -> Request:
    return Request(wire.CMD_BLOCK_STATUS, offset, length, flags)


def transmit(known: ExportDetails, requests: Sequence[Request], script: bytes, *, step: int = 1 << 30) -> Transmission:
    """A transmission in which `requests` were started (with the cookies 1, 2, ...) and that heard `script`."""
    machine = Transmission(known)
    for request in requests:
        machine.start(request)
    answered: list[Request] = []
    at = 0
    while at < len(script):
        room = machine.buffer()
        part = script[at : at + min(len(room), step)]
        room[: len(part)] = part
        at += len(part)
        answered += machine.received(len(part))
    assert [request for request in requests if request.done] == sorted(answered, key=lambda r: r.cookie)
    return machine
