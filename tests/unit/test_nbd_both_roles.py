"""The client's machines against the server's, in memory: what both agree on is a disk, however the bytes are cut; and bytes
that change on the way end in an error of the client, or in nothing worse than what the change says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.errors import LaminaError
from lamina.limits import KIB, align_down
from lamina.nbd import Export, wire
from lamina.nbd.client.details import ExportDetails, HandshakeOptions
from lamina.nbd.client.negotiation import Negotiation
from lamina.nbd.client.transmission import Request, Transmission

from ..nbd_memory import MemoryServer

SIZE = 192 * KIB

wishes = st.builds(
    HandshakeOptions,
    export=st.sampled_from(["", "disk"]),
    contexts=st.sampled_from([(), ("base:allocation",), ("base:allocation", "lamina:exact", "x:unknown")]),
    structured=st.booleans(),
    extended=st.booleans(),
)
cuts = st.lists(st.sampled_from([1, 2, 7, 27, 28, 31, 33, 500, 4096, 1 << 20]), min_size=1, max_size=5)


@contextmanager
def exported(align: int, writable: bool = True) -> Iterator[tuple[Export, bytearray]]:
    options = {"driver": "blkdebug", "align": align, "image": {"driver": "memory", "size": SIZE}}
    with lamina.open(options, read_only=False) as image:
        content = bytearray(random.Random(3).randbytes(64 * KIB) + bytes(SIZE - 64 * KIB))
        image.write(0, content[: 64 * KIB])
        yield Export(image, "disk", description="a disk", writable=writable), content


class Left(Exception):
    """All that the server said was heard, and it waits for the client, which waits for it; or it is gone."""


class Wire:
    """Carries bytes between a server in memory and machines of a client, in pieces of the lengths in `lengths`; `change`
    may change what the server says."""

    def __init__(self, server: MemoryServer, lengths: list[int], change: dict[int, int] | None = None) -> None:
        self.server = server
        self._lengths, self._turn = lengths, 0
        self._change, self._said = change or {}, 0

    def deliver(self, machine: Negotiation | Transmission) -> list[Request]:
        """Hand over some of what the server said; the requests that it answered."""
        room = machine.buffer()
        length = self._lengths[self._turn % len(self._lengths)]
        self._turn += 1
        part = bytearray(self.server.out[: min(len(room), length)])
        del self.server.out[: len(part)]
        for at in range(len(part)):
            part[at] ^= self._change.get(self._said + at, 0)
        self._said += len(part)
        room[: len(part)] = part
        return machine.received(len(part)) or [] if part else []

    def send(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            length = self._lengths[self._turn % len(self._lengths)]
            self._turn += 1
            self.server.send(data[at : at + length])
            at += length

    def negotiate(self, wanted: HandshakeOptions) -> ExportDetails:
        machine = Negotiation(wanted)
        while not machine.done:
            silent = not self.server.out
            self.deliver(machine)
            said = b"".join(machine.to_send())
            if silent and not said:
                raise Left
            self.send(said)
        assert isinstance(machine.result, ExportDetails)
        return machine.result


@settings(max_examples=150)
@given(wanted=wishes, align=st.sampled_from([1, 512, 4096]), lengths=cuts, seed=st.integers(0, 1 << 32))
def test_they_agree_on_a_disk(wanted: HandshakeOptions, align: int, lengths: list[int], seed: int) -> None:
    rng = random.Random(seed)
    with exported(align) as (export, model):
        way = Wire(MemoryServer([export]), lengths)
        details = way.negotiate(wanted)
        assert (details.size, details.minimum) == (SIZE, align if details.block_sizes_known else 1)
        assert details.mode == ("extended" if wanted.extended else "structured" if wanted.structured else "simple")
        assert set(details.contexts) == (set(wanted.contexts) - {"x:unknown"} if details.mode != "simple" else set())
        session = Transmission(details)
        for _ in range(12):
            commands = [wire.CMD_READ, wire.CMD_WRITE, wire.CMD_WRITE_ZEROES, wire.CMD_FLUSH, wire.CMD_CACHE]
            command = rng.choice(commands + [wire.CMD_BLOCK_STATUS] * bool(details.contexts))
            request, data = made(command, details, rng)
            way.send(session.start(request) + bytes(request.payload or b""))
            while not request.done:
                assert way.server.out, "the server does not answer"
                way.deliver(session)
            assert request.error is None, request.error
            check(request, data, model, details)
        way.send(session.disconnect())
        assert way.server.closed
        assert way.server.failure is None
        assert not way.server.out


def made(command: int, details: ExportDetails, rng: random.Random) -> tuple[Request, bytes]:
    """A request somewhere on the disk, and the bytes that it writes."""
    if command == wire.CMD_FLUSH:
        return Request(command), b""
    offset = align_down(rng.randrange(SIZE), details.minimum)
    length = align_down(rng.randrange(SIZE - offset), details.minimum) or details.minimum
    flags, data, view = 0, b"", None
    if command == wire.CMD_READ:
        view = memoryview(bytearray(b"?" * length))
    elif command == wire.CMD_WRITE:
        data = rng.randbytes(length)
        flags = wire.CMD_FLAG_PAYLOAD_LEN if details.mode == "extended" else 0
    return Request(command, offset, length, flags, view, data or None), data


def check(request: Request, data: bytes, model: bytearray, details: ExportDetails) -> None:
    offset, end = request.offset, request.offset + request.length
    if request.command == wire.CMD_WRITE:
        model[offset:end] = data
    elif request.command == wire.CMD_WRITE_ZEROES:
        model[offset:end] = bytes(request.length)
    elif request.command == wire.CMD_READ:
        assert request.view == model[offset:end]
    elif request.command == wire.CMD_BLOCK_STATUS:
        assert request.status is not None
        assert set(request.status) == set(details.contexts)
        at = offset
        for length, flags in request.status["base:allocation"]:
            assert at % details.minimum == length % details.minimum == 0
            if flags & wire.STATE_ZERO:
                assert not any(model[at : at + length])
            at += length
        assert offset < at <= end


@settings(max_examples=250)
@given(
    wanted=wishes,
    change=st.dictionaries(st.integers(0, 1200), st.integers(1, 255), min_size=1, max_size=4),
    lengths=cuts,
    seed=st.integers(0, 1 << 32),
)
def test_what_changes_on_the_way_is_an_error_or_told(
    wanted: HandshakeOptions, change: dict[int, int], lengths: list[int], seed: int
) -> None:
    """Nothing but a LaminaError leaves the client; the server stands whatever the client then says, and serves the next."""
    rng = random.Random(seed)
    with exported(512) as (export, model):
        way = Wire(MemoryServer([export]), lengths, change)
        try:
            details = way.negotiate(wanted)
            session = Transmission(details)
            for _ in range(4):
                request = Request(wire.CMD_READ, 512 * rng.randrange(64), 512, 0, memoryview(bytearray(512)))
                way.send(session.start(request))
                while not request.done and way.server.out:
                    way.deliver(session)
        except (LaminaError, Left):
            pass  # those are the two ways to find out
        other = Wire(MemoryServer([export]), [1 << 20])
        session = Transmission(other.negotiate(HandshakeOptions("disk")))
        request = Request(wire.CMD_READ, 0, 4096, 0, memoryview(bytearray(4096)))
        other.send(session.start(request))
        while not request.done:
            other.deliver(session)
        assert request.view == model[:4096]
