"""The client's machines hear whole conversations with some bytes changed: an error, or the truth, and nothing else."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import LaminaError
from lamina.nbd import wire
from lamina.nbd.client.details import ExportDetails, HandshakeOptions, Mode
from lamina.nbd.client.negotiation import Negotiation
from lamina.nbd.client.transmission import Request, Transmission

from ..nbd_scripts import (
    GO,
    SIZE,
    STRUCTURED,
    Chunks,
    context,
    details,
    greeting,
    info_export,
    info_sizes,
    option,
    read,
    refusal,
    simple,
    status,
    transmit,
)

OLD = wire.INIT_MAGIC.to_bytes(8, "big") + wire.OLDSTYLE_MAGIC.to_bytes(8, "big")
NUL = bytes(124)
S, E = Chunks("structured"), Chunks("extended")
A, B = b"a" * 2048, b"b" * 2048


def asked() -> Request:
    return status(0, 65536)


CONVERSATIONS = [
    STRUCTURED + option(7, 3, b"\0\1name") + info_sizes(512, 4096, 1 << 25) + info_export() + GO,
    greeting() + option(11) + context() + option(10) + info_export() + GO,
    greeting(1) + refusal(11, text=b"what?") + refusal(8) + refusal(7) + struct.pack(">QH", SIZE, 1) + NUL,
    OLD + struct.pack(">QI", SIZE, 1) + NUL,
]
REPLIES: list[tuple[Mode, bytes]] = [
    (
        "structured",
        S.data(0, A, done=False)
        + simple(2)
        + S.hole(2048, 2048)
        + S.status([(4096, 0), (61440, 3)], cookie=3)
        + S.status([(65536, 1)], 7, cookie=3, done=True)
        + S.error(wire.EIO, b"text", at=70, cookie=4),
    ),
    (
        "extended",
        E.data(0, A, done=False)
        + E.none(2)
        + E.hole(2048, 2048)
        + E.status([(4096, 0), (61440, 3)], cookie=3)
        + E.status([(65536, 1)], 7, cookie=3, done=True)
        + E.error(wire.EIO, b"text", at=70, cookie=4),
    ),
    ("simple", simple(1, 0, A + B) + simple(2) + simple(3, 22) + simple(4, 0, bytes(100))),
]
changes = st.lists(
    st.tuples(st.sampled_from(["set", "flip", "cut", "insert", "copy"]), st.integers(0, 1 << 16), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def mutated(script: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(script)
    for kind, place, value in edits:
        at = place % max(len(data), 1)
        if kind == "set" and data:
            data[at] = value
        elif kind == "flip" and data:
            data[at] ^= 1 << value % 8
        elif kind == "cut":
            del data[at : at + value % 9]
        elif kind == "insert":
            data[at:at] = bytes([value]) * (value % 9)
        else:
            data[at:at] = data[at : at + value]
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(CONVERSATIONS), changes, st.sampled_from([1, 5, 1 << 30]), st.sampled_from(["", "x"]), st.booleans()
)
def test_a_mangled_handshake_is_an_error_or_agreement(
    script: bytes, edits: list[tuple[str, int, int]], step: int, name: str, everything: bool
) -> None:
    wanted = HandshakeOptions(name, structured=everything, extended=everything)
    machine = Negotiation(wanted)
    rest, said = mutated(script, edits), ""
    try:
        while not machine.done and rest:
            room = machine.buffer()
            assert 0 < len(room) <= 8200
            part = rest[: min(len(room), step)]
            room[: len(part)] = part
            rest = rest[len(part) :]
            machine.received(len(part))
    except LaminaError as error:
        said = str(error)
    assert said.isprintable()
    if machine.done:
        assert isinstance(machine.result, ExportDetails)
        assert 0 <= machine.result.size < 1 << 63
    assert machine.farewell() is not None


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(REPLIES), changes, st.sampled_from([1, 5, 1 << 30]))
def test_mangled_replies_end_in_an_error_or_in_the_view(
    replies: tuple[Mode, bytes], edits: list[tuple[str, int, int]], step: int
) -> None:
    mode, script = replies
    read_twice = []
    for filler in b"#", b"?":
        room = bytearray(filler * 4116)
        first = Request(wire.CMD_READ, 0, 4096, 0, memoryview(room)[10:-10])
        requests = [first, Request(wire.CMD_WRITE, 0, 4096, payload=bytes(4096)), asked(), read(0, 100)]
        failure: LaminaError | None = None
        try:
            transmit(details(mode), requests, mutated(script, edits), step=step)
        except LaminaError as error:
            failure = error
        assert failure is None or (failure.errno == errno.EPROTO and str(failure).isprintable())
        assert room[:10] == room[-10:] == filler * 10, "bytes were put outside the view"
        read_twice.append(bytes(room[10:-10]) if first.done and first.error is None else b"")
    assert read_twice[0] == read_twice[1], "a read that succeeded left bytes of the view as they were"
    if requests[2].done and requests[2].error is None:
        assert requests[2].status is not None
        for found in requests[2].status.values():
            assert 0 < sum(size for size, _ in found) <= 65536
            assert all(size > 0 for size, _ in found)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_claims_of_a_read_are_those_of_a_set(data: st.DataObject) -> None:
    """Against a model that marks each byte: chunks in any order are taken if and only if no byte comes twice."""
    length = 24
    request = read(100, length)
    machine = Transmission(details())
    machine.start(request)
    seen: set[int] = set()
    for _ in range(data.draw(st.integers(1, 10))):
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start + 1, length))
        piece = S.data(100 + start, b"x" * (stop - start), done=False)
        machine.buffer()[: len(piece)] = piece
        if seen & set(range(start, stop)):
            with pytest.raises(LaminaError, match="came twice"):
                machine.received(len(piece))
            return
        machine.received(len(piece))
        seen |= set(range(start, stop))
    end = S.none()
    machine.buffer()[: len(end)] = end
    if len(seen) == length:
        assert machine.received(len(end)) == [request]
    else:
        with pytest.raises(LaminaError, match="not all bytes"):
            machine.received(len(end))
