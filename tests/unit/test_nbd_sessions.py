"""The server's machines, without threads and sockets: laws that hold for any conversation, however it is cut.

`MemoryServer` drives them and answers at once; `Raw` is the client, and holds every reply against the rules.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.limits import KIB, MIB
from lamina.nbd import Export
from lamina.nbd import wire as w
from lamina.nbd.server.negotiation import MAX_OPTION, Agreed, Negotiation, Phase
from lamina.nbd.server.transmission import PART, RECEIVE_BUFFER, REFUSED, Request, Transmission

from ..nbd_memory import MemoryServer, Shelf
from ..nbd_raw import CLIENT_FLAGS, Raw, info, meta, option_bytes

SIZE = 256 * KIB
MODES = ("simple", "structured", "extended")
modes = st.sampled_from(MODES)
CONTEXTS = ("base:allocation", "qemu:allocation-depth", "lamina:exact")


@contextmanager
def exported(size: int = SIZE, *, writable: bool = True, align: int = 1) -> Iterator[Export]:
    options: dict[str, Any] = {"driver": "memory", "size": size}
    if align > 1:
        options = {"driver": "blkdebug", "align": align, "image": options}
    with lamina.open(options, read_only=False) as image:
        image.write(0, random.Random(1).randbytes(min(size, 64 * KIB)))
        yield Export(image, "disk", writable=writable)


class Cut:
    """Sends what it is given in pieces of the lengths that it takes from a list, over and over."""

    def __init__(self, server: MemoryServer, lengths: Sequence[int]) -> None:
        self.server = server
        self._lengths, self._next = lengths, 0

    def send(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            length = self._lengths[self._next % len(self._lengths)]
            self._next += 1
            self.server.send(data[at : at + length])
            at += length

    def recv(self, length: int) -> bytes:
        return self.server.recv(length)

    def close(self) -> None:
        self.server.close()


cuts = st.lists(st.integers(1, 5000), min_size=1, max_size=20) | st.just([1]) | st.just([1 << 62])

# -- conversations that are valid


class Step(NamedTuple):
    """One request, valid or not, but such that the stream stays in step."""

    type: int
    offset: int
    length: int
    flags: int = 0


offsets = st.integers(0, SIZE + 2) | st.sampled_from([SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1])
lengths = st.integers(0, 4096) | st.sampled_from([SIZE, SIZE + 1, 0xFFFFFFFF])
steps = st.builds(
    Step,
    st.sampled_from([w.CMD_READ, w.CMD_WRITE_ZEROES, w.CMD_TRIM, w.CMD_CACHE, w.CMD_BLOCK_STATUS, w.CMD_FLUSH, 8, 77]),
    offsets,
    lengths,
    st.integers(0, 31) | st.just(0),
) | st.builds(Step, st.just(w.CMD_WRITE), offsets, st.integers(0, 4096), st.sampled_from([0, 0, 0, 1, 2]))

options = st.lists(
    st.sampled_from(
        [
            (w.OPT_LIST, b""),
            (w.OPT_LIST, b"x"),
            (w.OPT_INFO, info("disk", 0, 1, 2, 3)),
            (w.OPT_INFO, info("none")),
            (w.OPT_INFO, info("disk", count=7)),
            (w.OPT_GO, b""),
            (w.OPT_GO, info("none")),
            (w.OPT_STARTTLS, b""),
            (w.OPT_PEEK_EXPORT, b"disk"),
            (w.OPT_LIST_META_CONTEXT, meta("disk")),
            (w.OPT_SET_META_CONTEXT, meta("disk", "base:")),
            (w.OPT_SET_META_CONTEXT, meta("none", "base:allocation")),
            (99, b"data"),
        ]
    ),
    max_size=8,
)


@settings(max_examples=150)
@given(before=options, mode=modes, todo=st.lists(steps, max_size=40), pieces=cuts, asked=st.booleans())
def test_every_request_is_answered_once(
    before: list[tuple[int, bytes]], mode: str, todo: list[Step], pieces: list[int], asked: bool
) -> None:
    """Whatever options come first, whatever is asked, however it is cut: the stream stays in step, to the last byte."""
    source = random.Random(2)
    with exported() as export:
        server = MemoryServer([export])
        raw = Raw(Cut(server, pieces))
        raw.greet()
        for option, data in before:
            assert raw.option(option, data)
        agree = {"simple": [], "structured": [w.OPT_STRUCTURED_REPLY], "extended": [w.OPT_EXTENDED_HEADERS]}[mode]
        assert all(raw.option(option) == [(w.REP_ACK, b"")] for option in agree)
        if mode != "simple":
            raw.option(w.OPT_SET_META_CONTEXT, meta("disk", *CONTEXTS))
        assert raw.option(w.OPT_GO, info("disk", *[3] * asked))[-1][0] == w.REP_ACK
        message, model = b"", bytearray(export.image.read(0, SIZE))
        for step in todo:
            if step.type == w.CMD_WRITE:
                payload = source.randbytes(step.length)
                message += raw.write_bytes(step.offset, payload, flags=step.flags)
                if not step.flags & ~w.CMD_FLAG_FUA and step.offset + step.length <= SIZE:
                    model[step.offset : step.offset + step.length] = payload
            else:
                message += raw.request(step.type, step.offset, step.length, flags=step.flags, send=False)
        raw.stream.send(message)
        assert len(raw.collect()) == len(todo)
        if not {step.type for step in todo} & {w.CMD_WRITE_ZEROES, w.CMD_TRIM}:
            assert raw.read(0, SIZE) == model
        assert len(raw.read(0, 4096)) == 4096
        raw.disc()
        assert raw.ended()
        assert server.failure is None


def conversation(mode: str, source: random.Random, *, requests: int = 30) -> bytes:
    """All that a client says, from its flags to DISC."""
    raw = Raw(MemoryServer([]))
    raw.extended = mode == "extended"
    agree = {"simple": [], "structured": [w.OPT_STRUCTURED_REPLY], "extended": [w.OPT_EXTENDED_HEADERS]}[mode]
    said = [
        w.CLIENT_FLAGS.pack(flags=CLIENT_FLAGS),
        *(option_bytes(option) for option in agree),
        option_bytes(w.OPT_LIST),
        option_bytes(w.OPT_SET_META_CONTEXT, meta("disk", *CONTEXTS[:2])),
        option_bytes(99, bytes(100)),
        option_bytes(w.OPT_INFO, info("disk", 0, 1, 2, 3)),
        option_bytes(w.OPT_GO, info("disk", 3)),
    ]
    for _ in range(requests):
        kind = source.choice(
            [w.CMD_READ, w.CMD_WRITE, w.CMD_BLOCK_STATUS, w.CMD_WRITE_ZEROES, w.CMD_FLUSH, w.CMD_RESIZE]
        )
        offset, length = source.randrange(SIZE), source.randrange(1, 3000)
        if kind == w.CMD_WRITE:
            said.append(raw.write_bytes(offset, source.randbytes(length)))
        elif kind == w.CMD_FLUSH:
            said.append(raw.request(kind, send=False))
        else:
            said.append(raw.request(kind, offset, length, send=False))
    return b"".join([*said, raw.request(w.CMD_DISC, send=False)])


@settings(max_examples=60)
@given(mode=modes, number=st.integers(0, 1 << 30), pieces=cuts)
def test_the_same_bytes_give_the_same_replies(mode: str, number: int, pieces: list[int]) -> None:
    said = conversation(mode, random.Random(number))
    replies = []
    for lengths in ([1 << 62], pieces):
        with exported() as export:
            server = MemoryServer([export])
            Cut(server, lengths).send(said)
            replies.append((bytes(server.out), server.closed, [request[:5] for request in server.requests]))
    assert replies[0] == replies[1]
    assert replies[0][1]


@pytest.mark.parametrize("mode", MODES)
def test_cut_once_at_each_byte(mode: str) -> None:
    said = conversation(mode, random.Random(3), requests=6)
    expected = None
    for at in range(len(said)):
        with exported() as export:
            server = MemoryServer([export])
            server.send(said[:at])
            server.send(said[at:])
            expected = expected or bytes(server.out)
            assert bytes(server.out) == expected, f"cut at {at}"


# -- bytes that are anything


def _mutated(said: bytes, source: random.Random) -> bytes:
    mutant = bytearray(said)
    for _ in range(source.randrange(1, 6)):
        at, kind = source.randrange(len(mutant)), source.randrange(4)
        if kind == 0:
            mutant[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            del mutant[at : at + source.randrange(1, 40)]
        elif kind == 2:
            mutant[at:at] = source.randbytes(source.randrange(1, 40))
        else:
            mutant[at : at + 4] = struct.pack(">I", source.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    return bytes(mutant)


@settings(max_examples=300)
@given(mode=modes, number=st.integers(0, 1 << 60), pieces=cuts)
def test_anything_may_come(mode: str, number: int, pieces: list[int]) -> None:
    """Nothing is raised, and what is said remains whole messages."""
    source = random.Random(number)
    said = _mutated(conversation(mode, source, requests=10), source)
    with exported() as export:
        server = MemoryServer([export])
        Cut(server, pieces).send(said)
        for request in server.requests:
            assert request.type in w.COMMAND_NAMES or request.type in (REFUSED, PART)
            if request.type in (
                w.CMD_READ,
                w.CMD_WRITE,
                w.CMD_TRIM,
                w.CMD_WRITE_ZEROES,
                w.CMD_CACHE,
                w.CMD_BLOCK_STATUS,
            ):
                assert request.offset + request.length <= SIZE, "what gets through lies inside"
            if request.type == REFUSED:
                assert request.payload[0] in w.WIRE_ERRORS
        assert server.failure is None or server.closed


@settings(max_examples=100)
@given(data=st.binary(max_size=400), mode=modes, pieces=cuts)
def test_random_bytes(data: bytes, mode: str, pieces: list[int]) -> None:
    """After the greeting, after the flags, and in transmission."""
    with exported(writable=False) as export:
        for prefix in (
            b"",
            w.CLIENT_FLAGS.pack(flags=CLIENT_FLAGS),
            w.CLIENT_FLAGS.pack(flags=3) + w.OPTS_MAGIC.to_bytes(8),
        ):
            Cut(MemoryServer([export]), pieces).send(prefix + data)
        raw = Raw(server := MemoryServer([export])).begin("disk", mode)
        magic = w.EXTENDED_REQUEST_MAGIC if raw.extended else w.REQUEST_MAGIC
        Cut(server, pieces).send(magic.to_bytes(4) + data)


@settings(max_examples=200)
@given(number=st.integers(0, 1 << 60), extended=st.booleans())
def test_random_requests_never_change_a_read_only_disk(number: int, extended: bool) -> None:
    """Any command, flags, lengths and payloads: nothing that is to be executed changes a byte."""
    source = random.Random(number)
    with exported(writable=False) as export:
        agreed = Agreed(export, extended, extended, ((1, CONTEXTS[0]),), False)
        session = Transmission(agreed)
        header = w.EXTENDED_REQUEST.codec if extended else w.REQUEST.codec
        magic = w.EXTENDED_REQUEST_MAGIC if extended else w.REQUEST_MAGIC
        for _ in range(4):
            kind = source.choice([*range(9), 77])
            flags = source.choice([0, w.CMD_FLAG_PAYLOAD_LEN, source.randrange(1 << 16)])
            length = source.choice([0, 12, 512, 5000, 2 * MIB])
            message = header.pack(magic, flags, kind, 7, source.choice([0, 4096]), length)
            carries = kind == w.CMD_WRITE or (extended and flags & w.CMD_FLAG_PAYLOAD_LEN)
            for request in _feed(session, message + (bytes(length) if carries else b"")):
                assert request.type not in (w.CMD_WRITE, w.CMD_TRIM, w.CMD_WRITE_ZEROES, PART), request[:5]
            if session.finished:
                break


def _feed(session: Transmission, data: bytes) -> list[Request]:
    """Everything into the machine. The payloads of what comes out are kept: their place is used again."""
    found = []
    at = 0
    while at < len(data) and not session.finished:
        room = session.buffer()
        assert 0 < len(room) <= RECEIVE_BUFFER
        count = min(len(room), len(data) - at)
        room[:count] = data[at : at + count]
        at += count
        for request in session.received(count):
            if request.type == PART:
                begin, part, last = request.payload
                request = request._replace(payload=(begin, bytes(part), last))
            elif request.type == w.CMD_WRITE:
                request = request._replace(payload=bytes(request.payload))
            found.append(request)
    return found


# -- places and parts


@settings(max_examples=60)
@given(
    mode=modes,
    offset=st.integers(0, 3 * MIB),
    length=st.integers(0, 5 * MIB),
    lead=st.integers(0, 40),
    pieces=st.lists(st.integers(1, 2 * MIB), min_size=1, max_size=8),
)
def test_a_long_write_comes_in_parts(mode: str, offset: int, length: int, lead: int, pieces: list[int]) -> None:
    """In order, without a gap, none but the last says so; cut only at multiples of 64 KiB."""
    with exported(8 * MIB) as export:
        raw = Raw(MemoryServer([export])).begin("disk", mode)
        assert isinstance(raw.stream, MemoryServer)
        session = raw.stream.transmission
        assert session is not None
        payload = random.Random(length).randbytes(length)
        reads = b"".join(raw.request(w.CMD_READ, 0, 1, send=False) for _ in range(lead))
        message = reads + raw.write_bytes(offset, payload) + raw.request(w.CMD_FLUSH, send=False)
        found: list[Request] = []
        at, turn = 0, 0
        while at < len(message):
            count = min(pieces[turn % len(pieces)], len(message) - at)
            found += _feed(session, message[at : at + count])
            at, turn = at + count, turn + 1
    assert [request.type for request in found[:lead]] == [w.CMD_READ] * lead
    assert found[-1].type == w.CMD_FLUSH
    parts = found[lead:-1]
    if parts[0].type == w.CMD_WRITE:
        assert len(parts) == 1
        assert parts[0].payload == payload
        return
    end = offset
    for part in parts:
        begin, data, last = part.payload
        assert (begin, last) == (end, part is parts[-1])
        assert (part.offset, part.length, part.cookie) == (offset, length, parts[0].cookie)
        assert data == payload[begin - offset : begin - offset + len(data)]
        assert data
        end = begin + len(data)
        assert last or end % (64 * KIB) == 0
    assert end == offset + length


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_bounded(mode: str) -> None:
    """Whatever lengths a client names: one place of a mebibyte in transmission, and less in the negotiation."""
    with exported(64 * MIB) as export:
        tracemalloc.start(1)
        try:
            before = tracemalloc.get_traced_memory()[0]
            raw = Raw(MemoryServer([export]))
            raw.greet()
            for length in (MAX_OPTION, MAX_OPTION + 1, 32 * MIB):
                raw.stream.send(option_bytes(99, length=length))
                for _ in range(length // (64 * KIB)):
                    raw.stream.send(bytes(64 * KIB))
                raw.stream.send(bytes(length % (64 * KIB)))
                assert raw.option_replies(99)[0][0] == w.REP_ERR_UNSUP
            negotiation = tracemalloc.get_traced_memory()[1] - before
            assert isinstance(raw.stream, MemoryServer)
            agreed = Agreed(export, mode != "simple", mode == "extended", (), False)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            session = Transmission(agreed)
            raw.extended = mode == "extended"
            flags = w.CMD_FLAG_PAYLOAD_LEN if raw.extended else 0
            for kind in (w.CMD_WRITE, w.CMD_WRITE, 99):
                length = 32 * MIB if kind == w.CMD_WRITE else 32 * MIB * raw.extended
                _pour(session, raw.request(kind, 0, length, flags=flags, send=False), length)
            transmission = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
    assert negotiation < MIB
    assert transmission < 2.5 * MIB


def _pour(session: Transmission, header: bytes, length: int) -> None:
    """A header, and so many zeros, without ever holding them."""
    left = len(header) + length
    at = 0
    while left:
        room = session.buffer()
        count = min(len(room), left)
        if at < len(header):
            count = min(count, len(header) - at)
            room[:count] = header[at : at + count]
            at += count
        left -= count
        session.received(count)


@settings(max_examples=100)
@given(before=options, long=st.integers(0, 3 * MAX_OPTION), tls=st.sampled_from(["off", "allow", "require"]))
def test_a_negotiation_never_asks_for_more_than_the_message(
    before: list[tuple[int, bytes]], long: int, tls: str
) -> None:
    """So nothing that was sent in the clear behind STARTTLS is in our hands when TLS begins (CVE-2021-3716)."""
    with exported() as export:
        negotiation = Negotiation(Shelf([export]), tls=tls)
        messages = [w.CLIENT_FLAGS.pack(flags=CLIENT_FLAGS)]
        messages += [option_bytes(*option) for option in [(99, bytes(long)), *before, (w.OPT_STARTTLS, b"")]]
        for message in messages:
            at = 0
            while at < len(message):
                room = negotiation.buffer()
                assert 0 < len(room) <= len(message) - at
                room[:] = message[at : at + len(room)]
                at += len(room)
                negotiation.received(len(room))
            negotiation.take()
            if negotiation.phase is Phase.STARTTLS:
                negotiation.secured(Shelf([export]))
        assert negotiation.phase is Phase.OPTIONS


@pytest.mark.parametrize("extended", [False, True])
def test_a_stream_that_is_lost_says_so(extended: bool) -> None:
    """What stands where a request must begin is told, and nothing else is raised."""
    with exported() as export:
        session = Transmission(Agreed(export, extended, extended, (), False))
        room = session.buffer()
        room[:32] = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"[:32]
        assert session.received(32) == []
        assert session.finished
        assert session.violation is not None
        assert "0x47455420" in session.violation


def test_replies_have_no_state() -> None:
    """Any number of threads may answer at once: the same request is answered in the same bytes, whatever came between."""
    with exported() as export:
        session = Transmission(Agreed(export, True, False, (), False))
        request = Request(w.CMD_READ, 0, 42, 0, 4096)
        first = [session.done(request), session.error(request, w.EIO, "x", 7), session.hole(request, 0, 9, last=True)]
        session.buffer()[:4] = b"\0\0\0\0"
        again = [session.done(request), session.error(request, w.EIO, "x", 7), session.hole(request, 0, 9, last=True)]
        assert first == again


@pytest.mark.parametrize("text", ["", "é" * 4096, "x" * 10000, "a\0b"])
def test_texts_of_errors_fit(text: str) -> None:
    """At most 4096 bytes, cut between characters; an offset only where it lies inside the request."""
    with exported() as export:
        for extended in (False, True):
            session = Transmission(Agreed(export, True, extended, (), False))
            raw = Raw(server := MemoryServer([]))
            raw.structured, raw.extended = True, extended
            for at in (None, 0, 99, 100, 611, 612):
                server.out.clear()
                raw.request(w.CMD_READ, 100, 512, cookie=5, send=False)
                request = Request(w.CMD_READ, 0, 5, 100, 512)
                server.out += b"".join(session.error(request, w.EIO, text.replace("\0", ""), at))
                (reply,) = raw.collect()
                assert reply.error == w.EIO
                assert reply.at == (at if at in (100, 611) else None)
