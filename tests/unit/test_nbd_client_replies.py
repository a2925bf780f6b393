"""What the client makes of replies: their order, their content, and how few calls and copies they take."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from lamina.errors import LaminaError, NotFound, NotSupported
from lamina.nbd import wire
from lamina.nbd.client.details import Mode
from lamina.nbd.client.transmission import LARGE, MAX_PIECES, RECEIVE_BUFFER, Request, Transmission

from ..nbd_scripts import (
    STRUCTURED,
    Chunks,
    details,
    greeting,
    negotiate,
    option,
    read,
    refusal,
    simple,
    status,
    transmit,
)

STEPS = [1 << 30, 1, 7]
S, E = Chunks("structured"), Chunks("extended")
A, B = b"a" * 2048, b"b" * 2048


def write() -> Request:
    return Request(wire.CMD_WRITE, 4096, 512, payload=bytes(512))


def asked() -> Request:
    return status(0, 65536)


@pytest.mark.parametrize("step", STEPS)
def test_status_is_clipped_and_its_flags_are_kept(step: int) -> None:
    request = asked()
    script = E.status([(4096, 1 << 63 | 5), (1 << 40, 3)]) + E.status([(512, 1), (1024, 1)], 7, done=True)
    transmit(details("extended"), [request], script, step=step)
    assert request.status == {"base:allocation": [(4096, 1 << 63 | 5), (61440, 3)], "x:y": [(512, 1), (1024, 1)]}


@pytest.mark.parametrize("step", STEPS)
def test_replies_of_many_requests_come_in_any_order_and_mixed(step: int) -> None:
    first, second, third = read(0, 4096), write(), read(0, 4096)
    script = (
        S.data(0, A, cookie=3, done=False)
        + simple(2)
        + S.data(2048, B, cookie=1, done=False)
        + S.error(wire.EIO, b"late", cookie=3)
        + S.hole(0, 2048, cookie=1)
    )
    transmit(details(), [first, second, third], script, step=step)
    assert first.view == bytes(2048) + B
    assert (first.error, second.error) == (None, None)
    assert "late" in str(third.error)


def test_shutdown_is_noticed_and_the_request_may_be_put_aside() -> None:
    for postpone in (False, True):
        machine = Transmission(details(), postpone=postpone)
        request, other = write(), write()
        machine.start(request)
        machine.start(other)
        for piece in (S.error(wire.ESHUTDOWN, cookie=1), S.none(2)):
            machine.buffer()[: len(piece)] = piece
            machine.received(len(piece))
        assert machine.leaving
        assert request.done is not postpone
        assert machine.postponed == ([request] if postpone else [])
        assert other.done


@pytest.mark.parametrize("mode", ["simple", "structured", "extended"])
def test_large_reads_go_straight_into_the_view(mode: Mode) -> None:
    request = read(0, 4 * LARGE)
    content = bytes(range(256)) * (4 * LARGE // 256)
    script = simple(1, 0, content) if mode == "simple" else Chunks(mode).data(0, content)
    machine = Transmission(details(mode))
    machine.start(request)
    at = calls = 0
    while at < len(script):
        room = machine.buffer()
        count = min(len(room), len(script) - at)
        room[:count] = script[at : at + count]
        at += count
        calls += 1
        machine.received(count)
    assert request.done
    assert request.view == content
    assert calls == 2, "a header, then all of the bytes at once"


def test_small_replies_come_many_at_a_time() -> None:
    requests = [read(4096 * number, 4096) for number in range(24)]
    script = b"".join(S.data(4096 * n, bytes([n]) * 4096, cookie=n + 1) for n in range(24))
    machine = Transmission(details())
    for request in requests:
        machine.start(request)
    room = machine.buffer()
    assert len(script) < len(room) == RECEIVE_BUFFER
    room[: len(script)] = script
    assert machine.received(len(script)) == requests
    assert all(request.view == bytes([n]) * 4096 for n, request in enumerate(requests))


def test_a_read_in_too_many_pieces_ends() -> None:
    request = read(0, 4 * MAX_PIECES)
    script = b"".join(S.data(2 * number, b"x", done=False) for number in range(MAX_PIECES + 1))
    with pytest.raises(LaminaError, match="separate pieces"):
        transmit(details(), [request], script)


def test_a_long_status_does_not_fit_into_the_room() -> None:
    extents = [(1 + number % 2, number % 4) for number in range(40_000)]
    request = status(0, 1 << 20)
    script = S.status(extents) + S.status([(1, 0)], 7, done=True)
    assert len(script) > 2 * RECEIVE_BUFFER
    for step in (1 << 30, 4099):
        transmit(details(), [request], script, step=step)
        assert request.status is not None
        assert request.status["base:allocation"] == extents
        request.restart()


def test_a_request_for_some_contexts_is_answered_for_those() -> None:
    payload = struct.pack(">QI", 65536, 7)
    request = Request(wire.CMD_BLOCK_STATUS, 0, 65536, wire.CMD_FLAG_PAYLOAD_LEN, payload=payload)
    machine = Transmission(details("extended"))
    head = wire.EXTENDED_REQUEST.unpack(machine.start(request))
    assert (head.length, head.flags) == (12, wire.CMD_FLAG_PAYLOAD_LEN)
    reply = E.status([(512, 0)], 7, done=True)
    machine.buffer()[: len(reply)] = reply
    assert machine.received(len(reply)) == [request]


def test_kinds_of_errors() -> None:
    with pytest.raises(NotFound):
        negotiate(STRUCTURED + refusal(7, wire.REP_ERR_UNKNOWN))
    request = write()
    transmit(details(), [request], S.error(wire.ENOTSUP))
    assert isinstance(request.error, NotSupported)


def test_huge_announcements_allocate_nothing() -> None:
    """CVE-2017-2630 and its kin: a length is refused before there is room for it."""
    scripts = [greeting() + option(11, kind, length=0xFFFFFFFF) for kind in (1, 2, 3, 4, 0x80000001)]
    talks = [S.chunk(kind, bytes(8), length=0xFFFFFFFF) for kind in (0, 1, 2, 5, 6, 0x8001, 0x8002, 0x8003)]
    tracemalloc.start()
    try:
        for script in scripts:
            with pytest.raises(LaminaError):
                negotiate(script)
        for script in talks:
            with pytest.raises(LaminaError):
                transmit(details(), [read(0, 4096)], script)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
