"""The client's transmission with servers that are right, odd or hostile: every case is heard whole and byte by byte."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest

from lamina.errors import LaminaError
from lamina.nbd import wire
from lamina.nbd.client.details import Mode
from lamina.nbd.client.transmission import Request

from ..nbd_scripts import (
    Chunks,
    details,
    read,
    simple,
    status,
    transmit,
)

STEPS = [1 << 30, 1, 7]
S, E = Chunks("structured"), Chunks("extended")
TEXT = b"no\x1b[2Jpe\0"
A, B = b"a" * 2048, b"b" * 2048


# Transmission


class Talk(NamedTuple):
    """Replies: what they are to the request (default: READ of 4096 bytes at 0). `error`: the connection ends so.
    `failed`: the request fails so, and the connection goes on. Neither: it succeeds, with `content` if that is given."""

    name: str
    script: bytes
    error: str | None = None
    failed: str | None = None
    errno: int | None = None
    content: bytes | None = None
    mode: Mode = "structured"
    request: Callable[[], Request] = lambda: read(0, 4096)


ONE = wire.CMD_FLAG_REQ_ONE


def write() -> Request:
    return Request(wire.CMD_WRITE, 4096, 512, payload=bytes(512))


def flush() -> Request:
    return Request(wire.CMD_FLUSH)


def asked() -> Request:
    return status(0, 65536)


def asked_one() -> Request:
    return status(0, 65536, ONE)


def at_4096() -> Request:
    return read(4096, 4096)


def whole_read() -> Request:
    return read(0, 4096, wire.CMD_FLAG_DF)


OTHER = S.status([(65536, 0)], 7, done=True)
NESTED = wire.REPLY_TYPE_ERROR_BIT | 99
TALKS = [
    Talk("one chunk", S.data(0, A + B), content=A + B),
    Talk("two chunks", S.data(0, A, done=False) + S.data(2048, B), content=A + B),
    Talk("two chunks, the last first", S.data(2048, B, done=False) + S.data(0, A), content=A + B),
    Talk("chunks and NONE", S.data(0, A + B, done=False) + S.none(), content=A + B),
    Talk("data and hole", S.data(0, A, done=False) + S.hole(2048, 2048), content=A + bytes(2048)),
    Talk("only a hole", S.hole(0, 4096), content=bytes(4096)),
    Talk(
        "a piece between two",
        S.data(0, A[:1024], done=False) + S.data(3072, A[:1024], done=False) + S.hole(1024, 2048),
        content=A[:1024] + bytes(2048) + A[:1024],
    ),
    Talk("a missing half", S.data(0, A), "not all bytes"),
    Talk("a missing half, then NONE", S.data(0, A, done=False) + S.none(), "not all bytes"),
    Talk("a gap", S.data(0, A[:1000], done=False) + S.data(1001, b"x" * 3095), "not all bytes"),
    Talk("no content", S.none(), "not all bytes"),
    Talk("overlapping data", S.data(0, A, done=False) + S.data(2047, B), "came twice"),
    Talk("the same data twice", S.data(0, A, done=False) + S.data(0, A, done=False), "came twice"),
    Talk("data around other data", S.data(1024, A[:8], done=False) + S.data(0, A, done=False), "came twice"),
    Talk("a hole over data", S.data(0, A, done=False) + S.hole(0, 4096), "came twice"),
    Talk("data before the request", S.data(0, A), "reply to READ", request=at_4096),
    Talk("data past the request", S.data(2048, A + B), "reply to READ"),
    Talk("data at 2**64-1", S.data((1 << 64) - 1, A), "reply to READ"),
    Talk("data at 2**64-2048", S.data((1 << 64) - 2048, A), "reply to READ"),
    Talk("data of 2**32-1 bytes", S.chunk(1, bytes(8), length=(1 << 32) - 1), "reply to READ"),
    Talk("data of no byte", S.chunk(1, bytes(8)), "8 bytes"),
    Talk("data without an offset", S.chunk(1, bytes(3)), "3 bytes"),
    Talk("data to a write", S.data(4096, bytes(512)), "reply to WRITE", request=write),
    Talk("data to a flush", S.data(0, b"x"), "reply to FLUSH", request=flush),
    Talk("a hole of no length", S.hole(0, 0), "no length"),
    Talk("a hole past the request", S.hole(2048, 4096), "reply to READ"),
    Talk("a hole of 2**32-1 bytes", S.hole(0, 0xFFFFFFFF), "reply to READ"),
    Talk("a hole in 13 bytes", S.chunk(2, bytes(13)), "13 bytes"),
    Talk("a hole to a write", S.hole(4096, 512), "WRITE", request=write),
    Talk("one content chunk, as asked", S.data(0, A + B), content=A + B, request=whole_read),
    Talk("one hole, as asked", S.hole(0, 4096), content=bytes(4096), request=whole_read),
    Talk(
        "two content chunks, and one was asked for",
        S.data(0, A, done=False) + S.data(2048, B),
        "several",
        request=whole_read,
    ),
    Talk("NONE that is not the last", S.chunk(0, done=False), "not the last"),
    Talk("NONE with content", S.chunk(0, b"x"), "has 1 bytes"),
    Talk("NONE of 4 GiB", S.chunk(0, length=0xFFFFFFFF), "4294967295"),
    Talk("unknown type 99", S.chunk(99, b"x"), "unknown type 99"),
    Talk("extended status among structured", S.chunk(6, bytes(24)), "unknown type 6", request=asked),
    Talk("simple reply to a read", simple(1, 0, A + B), "simple reply to READ"),
    Talk("simple error to a read", simple(1, wire.EIO), "simple reply to READ"),
    Talk("simple reply to a write", simple(1), request=write),
    Talk("simple error to a write", simple(1, wire.ENOSPC), failed="No space", errno=28, request=write),
    Talk("simple success to block status", simple(1), "simple reply to BLOCK", request=asked),
    Talk("simple error to block status", simple(1, wire.EINVAL), failed="Invalid", errno=22, request=asked),
    Talk("simple reply behind a chunk", S.error(5, done=False, at=4100) + simple(1), "behind chunks", request=write),
    Talk("another magic", b"\xde\xad\xbe\xef" + bytes(16), "begins with"),
    Talk("extended among structured", E.none(), "begins with"),
    Talk("a reply to nobody", S.none(2), "request 2"),
    Talk("a simple reply to nobody", simple(0), "request 0"),
    Talk("a second reply", S.data(0, A + B) + S.none(), "request 1"),
    Talk("unknown flags of a chunk", S.data(0, A + B)[:5] + b"\xff" + S.data(0, A + B)[6:], content=A + B),
    Talk("an error", S.error(wire.EIO, TEXT), failed=r"no\\x1b\[2Jpe", errno=5),
    Talk("an error without text", S.error(wire.ENOMEM), failed="memory", errno=12),
    Talk("an error of the value 0", S.error(0), failed="Invalid", errno=22),
    Talk("an error that NBD does not have", S.error(9999), failed="error 9999", errno=22),
    Talk("an error before the end", S.error(wire.EIO, done=False) + S.none(), failed="Input", errno=5),
    Talk(
        "half of the data, then an error",
        S.data(0, A, done=False) + S.error(wire.EIO, at=2048),
        failed="offset 2048",
        errno=5,
    ),
    Talk("two errors", S.error(wire.EIO, at=0, done=False) + S.error(wire.EPERM), "several errors"),
    Talk("data behind an error", S.error(wire.EIO, at=0, done=False) + S.data(0, A + B), failed="Input", errno=5),
    Talk("EOVERFLOW", S.error(wire.EOVERFLOW), failed="large", errno=75, request=whole_read),
    Talk("an error outside the request", S.error(wire.EIO, at=4096), "error at offset 4096"),
    Talk("an error before the request", S.error(wire.EIO, at=4095), "error at offset 4095", request=write),
    Talk("an error at 2**64-1", S.error(wire.EIO, at=(1 << 64) - 1), "error at offset"),
    Talk("an error at an offset of a write", S.error(wire.EIO, at=4100), failed="offset 4100", errno=5, request=write),
    Talk("a text longer than its chunk", S.error(wire.EIO, b"abc", length=4), "text of 4 bytes"),
    Talk("a text over the offset", S.error(wire.EIO, b"abc", at=0, length=4), "text of 4 bytes"),
    Talk("a text of 4097 bytes", S.error(wire.EIO, b"x" * 4097), "4103 bytes"),
    Talk("a text of 4096 bytes", S.error(wire.EIO, b"x" * 4096), failed="xxx", errno=5),
    Talk("an error in 5 bytes", S.chunk(wire.REPLY_TYPE_ERROR, bytes(5)), "5 bytes"),
    Talk("an error with an offset in 13 bytes", S.chunk(wire.REPLY_TYPE_ERROR_OFFSET, bytes(13)), "13 bytes"),
    Talk("an error of 4 GiB", S.chunk(wire.REPLY_TYPE_ERROR, length=0xFFFFFFFF), "4294967295"),
    Talk("an unknown error", S.error(wire.ENOSPC, b"why", kind=NESTED), failed="why", errno=28),
    Talk(
        "an unknown error with more behind",
        S.chunk(NESTED, struct.pack(">IH", 28, 0) + bytes(100)),
        failed="space",
        errno=28,
    ),
    Talk("an unknown error of 1 MiB", S.chunk(NESTED, length=1 << 20), "1048576"),
    Talk("an unknown error whose text does not fit", S.error(5, b"", length=9, kind=NESTED), "text of 9"),
    Talk("status", S.status([(4096, 0), (61440, 3)]) + OTHER, request=asked),
    Talk(
        "data and a hole that are no whole blocks",
        S.data(0, b"x" * 1000, done=False) + S.hole(1000, 3096),
        content=b"x" * 1000 + bytes(3096),
    ),
    Talk("124 zeros behind GO", bytes(124) + S.data(0, A + B), "begins with 0"),
    Talk("one extent, overlong, as nobody may", S.status([(1 << 31, 3)]) + OTHER, request=asked_one),
    Talk("neighbours that say the same", S.status([(512, 3), (512, 3)]) + OTHER, request=asked),
    Talk("holes that do not read as zeros", S.status([(512, 1), (512, 0)]) + OTHER, request=asked),
    Talk("states that do not exist", S.status([(512, 0xFFFFFFFC)]) + OTHER, request=asked),
    Talk("status of less", S.status([(512, 0)]) + OTHER, request=asked),
    Talk("status in odd extents", S.status([(1000, 0), (24, 3)]) + OTHER, request=asked),
    Talk("the last extent overlong", S.status([(4096, 0), (1 << 31, 3)]) + OTHER, request=asked),
    Talk("an extent past the end", S.status([(65536, 0), (1, 3)]), "past the 65536", request=asked),
    Talk("an extent of no length", S.status([(0, 0)]), "no length", request=asked),
    Talk("an extent of no length behind", S.status([(512, 0), (0, 3)]), "no length", request=asked),
    Talk("status of nothing", S.status([]), "4 bytes", request=asked),
    Talk("status in 5 bytes", S.chunk(5, bytes(5)), "5 bytes", request=asked),
    Talk("status of an unknown context", S.status([(512, 0)], 99), "number 99", request=asked),
    Talk("status of one context twice", S.status([(512, 0)]) + S.status([(512, 0)]), "two answers", request=asked),
    Talk("status of one context missing", S.status([(512, 0)], done=True), "1 contexts out of 2", request=asked),
    Talk("no status", S.none(), "0 contexts", request=asked),
    Talk("status to a read", S.status([(512, 0)]), "reply to READ"),
    Talk("two extents, and one was asked for", S.status([(512, 0), (512, 3)]), "2 extents", request=asked_one),
    Talk("one extent, as asked", S.status([(512, 0)]) + OTHER, request=asked_one),
    Talk("more extents than bytes", S.status([(1, 0)] * 600), "600 extents", request=lambda: status(0, 512)),
    Talk("status of 4 GiB", S.chunk(5, length=0xFFFFFFFC), "extents in", request=lambda: status(0, 1 << 31)),
    Talk("extended: one chunk", E.data(0, A + B), content=A + B, mode="extended"),
    Talk("extended: a read for another offset", Chunks("extended", 512).data(0, A + B), "offset 512", mode="extended"),
    Talk("extended: structured chunk", S.data(0, A + B), "begins with", mode="extended"),
    Talk("extended: simple reply", simple(1), "begins with", mode="extended", request=write),
    Talk("extended: 2**64-1 bytes", E.chunk(1, bytes(8), length=(1 << 64) - 1), "reply to READ", mode="extended"),
    Talk("extended: status of 32 bits", E.chunk(5, bytes(12)), "unknown type 5", mode="extended", request=asked),
    Talk(
        "extended: status, flags of 64 bits",
        E.status([(512, 1 << 63), (512, 3)]) + E.status([(9, 0)], 7, done=True),
        mode="extended",
        request=asked,
    ),
    Talk("extended: other count", E.status([(512, 0)], count=2), "2 extents announced", mode="extended", request=asked),
    Talk(
        "extended: extents of 2**64-1",
        E.status([(512, 0), ((1 << 64) - 1, 3)]) + E.status([(9, 0)], 7, done=True),
        mode="extended",
        request=asked,
    ),
    Talk("extended: extent of no length", E.status([(0, 3)]), "no length", mode="extended", request=asked),
    Talk("extended: status of 2**64-8", E.chunk(6, length=(1 << 64) - 8), "extents in", mode="extended", request=asked),
    Talk("extended: error", E.error(wire.EIO, b"oh", at=17), failed="oh", errno=5, mode="extended"),
    Talk("simple: a read", simple(1, 0, A + B), content=A + B, mode="simple"),
    Talk("simple: an error has no payload", simple(1, wire.EIO), failed="Input", errno=5, mode="simple"),
    Talk("simple: an unknown error", simple(1, 0xFFFFFFFF), failed="4294967295", errno=22, mode="simple"),
    Talk("simple: structured chunk", S.data(0, A + B), "begins with", mode="simple"),
    Talk("simple: to nobody", simple(77), "request 77", mode="simple"),
    Talk("simple: a second reply", simple(1, 0, A + B) + simple(1), "request 1", mode="simple"),
    Talk("ENOTSUP", S.error(wire.ENOTSUP), failed="not supported", errno=95, request=write),
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", TALKS, ids=lambda case: case.name)
def test_replies(case: Talk, step: int) -> None:
    request = case.request()
    known = details(case.mode, contexts={} if case.mode == "simple" else {"base:allocation": 1, "x:y": 7})
    if case.error is not None:
        with pytest.raises(LaminaError, match=case.error) as raised:
            transmit(known, [request], case.script, step=step)
        assert raised.value.errno == 71
        assert not request.done or case.name.endswith("a second reply")
        return
    machine = transmit(known, [request], case.script, step=step)
    assert request.done
    assert not machine.in_flight
    if case.failed is None:
        assert request.error is None
        if case.content is not None:
            assert request.view == case.content
        if request.command == wire.CMD_BLOCK_STATUS:
            assert request.status is not None
            assert all(0 < sum(size for size, _ in found) <= request.length for found in request.status.values())
    else:
        assert isinstance(request.error, LaminaError)
        assert re.search(case.failed, str(request.error))
        assert request.error.errno == case.errno
        assert str(request.error).isprintable()
    # The connection goes on: the next request is answered.
    after = Request(wire.CMD_FLUSH)
    machine.start(after)
    reply = simple(2) if case.mode == "simple" else Chunks(case.mode).none(2)
    for byte in reply:
        machine.buffer()[:1] = bytes([byte])
        machine.received(1)
    assert after.done
    assert after.error is None
