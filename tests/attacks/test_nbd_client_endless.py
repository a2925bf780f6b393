"""Servers that never come to an end: each answer, and each list, is bounded; then the connection is closed with EPROTO."""

from __future__ import annotations

import errno
import itertools
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import LaminaError
from lamina.nbd import wire
from lamina.nbd.client import Client, negotiation, transmission
from lamina.nbd.inspect import inspect, list_exports

from ..nbd_fake_server import CHUNKS, Asked, Behave, Serve, exactly, requests, shake, starting
from ..nbd_scripts import SIZE, context, export, greeting, info_export, option, refusal, simple, status, transmit
from ..nbd_scripts import details as agreed


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with starting(tmp_path) as start:
        yield start


def endless(pieces: Callable[[Asked], Iterator[bytes]], *, of: int = wire.CMD_READ, size: int = SIZE) -> Behave:
    """Answers requests `of` one kind with `pieces`, for ever; others as is right."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, size)
        for asked in requests(sock):
            if asked.command == of:
                for piece in pieces(asked):
                    sock.sendall(piece)
            elif asked.command == wire.CMD_BLOCK_STATUS:
                sock.sendall(CHUNKS.status([(asked.length, 0)], cookie=asked.cookie, done=True))
            else:
                sock.sendall(simple(asked.cookie))

    return behave


def fails(server_uri: str, call: Callable[[Client], object], words: str) -> None:
    """`call` ends with a violation of the protocol, soon, in little memory, and so does what comes after it."""
    outcome: list[LaminaError] = []

    def work() -> None:
        with Client.connect(server_uri, request_timeout=20) as client:
            for _ in range(2):
                try:
                    call(client)
                except LaminaError as error:
                    outcome.append(error)

    tracemalloc.start()
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(30)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not thread.is_alive(), "it hangs"
    assert len(outcome) == 2
    for error in outcome:
        assert error.errno == errno.EPROTO
        assert words in str(error)
        assert server_uri in str(error)
    assert peak < 64 << 20


READS: dict[str, tuple[Callable[[Asked], Iterator[bytes]], str]] = {
    "errors": (
        lambda asked: itertools.repeat(CHUNKS.error(5, b"oh", cookie=asked.cookie, done=False)),
        "several errors",
    ),
    "errors of an unknown kind": (
        lambda asked: itertools.repeat(CHUNKS.error(5, b"oh", cookie=asked.cookie, done=False, kind=0x8123)),
        "several errors",
    ),
    "unknown chunks": (
        lambda asked: itertools.repeat(CHUNKS.chunk(99, b"", cookie=asked.cookie, done=False)),
        "unknown type 99",
    ),
    "chunks without content": (
        lambda asked: itertools.repeat(CHUNKS.chunk(0, cookie=asked.cookie, done=False)),
        "not the last",
    ),
    "single bytes": (
        lambda asked: (
            CHUNKS.data(asked.offset + at, b"x", cookie=asked.cookie, done=False) for at in range(asked.length)
        ),
        "chunks in reply to READ",
    ),
    "single bytes of a hole": (
        lambda asked: (
            CHUNKS.hole(asked.offset + at, 1, cookie=asked.cookie, done=False) for at in range(asked.length)
        ),
        "chunks in reply to READ",
    ),
    "replies that nobody waits for": (
        lambda asked: itertools.repeat(simple(asked.cookie + 77)),
        "not waiting for one",
    ),
}


@pytest.mark.parametrize("kind", READS)
def test_a_reply_without_end(serve: Serve, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(transmission, "MAX_CHUNKS", 512)
    pieces, words = READS[kind]
    fails(serve(endless(pieces)).uri, lambda client: client.read(0, 65536), words)


def test_the_extents_of_all_contexts_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from ..nbd_scripts import Chunks

    monkeypatch.setattr(transmission, "MAX_ALL_EXTENTS", 100)
    chunks = Chunks("structured")
    extents = [(512, 0)] * 60
    with pytest.raises(LaminaError, match="more than 100 extents"):
        transmit(agreed(), [status(0, SIZE)], chunks.status(extents) + chunks.status(extents, 7, done=True))


def test_a_long_answer_about_status_is_cut_where_it_takes_too_much_memory() -> None:
    from ..nbd_scripts import Chunks

    rows = [(1, number % 2) for number in range(1 << 19)]
    request = status(0, SIZE)
    script = Chunks("structured").status(rows) + Chunks("structured").status([(512, 0)], 7, done=True)
    tracemalloc.start()
    try:
        transmit(agreed(), [request], script, step=1 << 16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert request.status is not None
    assert request.status["base:allocation"] == rows[: transmission.KEPT_EXTENTS]
    assert peak < 32 << 20


def one_byte(asked: Asked) -> Iterator[bytes]:
    yield CHUNKS.status([(1, asked.offset % 2)], cookie=asked.cookie, done=True)


def test_status_byte_by_byte(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A map of such an export would have as many rows as bytes: an error. A copy reads it all instead."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if asked.command == wire.CMD_READ:
                sock.sendall(CHUNKS.data(asked.offset, b"d" * asked.length, cookie=asked.cookie))
            else:
                sock.sendall(b"".join(one_byte(asked)))

    uri = serve(behave).uri
    assert main(["map", "--context", "base:allocation", uri]) == 1
    assert "tell of less than 4096 bytes" in capsys.readouterr().err
    assert main(["convert", "-f", "raw", "-O", "raw", uri, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == b"d" * SIZE
    assert main(["copy", uri, str(tmp_path / "out2")]) == 0
    assert (tmp_path / "out2").read_bytes() == b"d" * SIZE
    with lamina.open({"driver": "raw", "file": uri}) as image:
        for _ in range(3):
            found = image.extents()
            assert found.begin == 0


def test_a_map_has_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.cli import map_nbd

    monkeypatch.setattr(map_nbd, "MOST_ROWS", 100)
    monkeypatch.setattr(map_nbd, "MOST_KINDS", 100)
    stretches = [(1, (number,)) for number in range(200)]
    with pytest.raises(LaminaError, match="more than 100 ranges"):
        list(map_nbd.joined(iter(stretches)))
    with pytest.raises(LaminaError, match="more than 100 different statuses"):
        map_nbd.summed(iter(stretches), 200)


def talks(answer_to: Callable[[int], Iterator[bytes]]) -> Behave:
    """A handshake in which each option is answered by `answer_to`."""

    def behave(sock: socket.socket, number: int) -> None:
        sock.sendall(greeting())
        exactly(sock, 4)
        while True:
            head = wire.OPTION.unpack(exactly(sock, wire.OPTION.size))
            exactly(sock, head.length)
            if head.option == wire.OPT_ABORT:
                return
            for piece in answer_to(head.option):
                sock.sendall(piece)

    return behave


def usual(number: int) -> Iterator[bytes]:
    if number in (wire.OPT_INFO, wire.OPT_GO):
        yield info_export(number=number) + option(number)
    elif number == wire.OPT_STRUCTURED_REPLY:
        yield option(number)
    elif number in (wire.OPT_SET_META_CONTEXT, wire.OPT_LIST_META_CONTEXT):
        yield context(of=number) + option(number)
    elif number == wire.OPT_LIST:
        yield export(b"x") + option(number)
    else:
        yield refusal(number)


def test_options_without_end(serve: Serve) -> None:
    """Exports, metadata contexts, and items of information that never end; names of gigabytes."""
    flood = bytes(wire.MAX_STRING)

    def without_end(of: int, piece: Callable[[int], bytes]) -> Behave:
        return talks(lambda number: map(piece, itertools.count()) if number == of else usual(number))

    word = struct.Struct(">H")
    cases: list[tuple[int, Callable[[int], bytes], Callable[[str], object]]] = [
        (wire.OPT_LIST, lambda n: export(b"%d" % n), list_exports),
        (wire.OPT_LIST, lambda n: export(b"%d" % n, flood[:4000]), list_exports),
        (wire.OPT_LIST_META_CONTEXT, lambda n: context(b"x:%d" % n, n, wire.OPT_LIST_META_CONTEXT), inspect),
        (wire.OPT_SET_META_CONTEXT, lambda n: context(b"x:%d" % n, n), Client.connect),
        (wire.OPT_GO, lambda n: option(wire.OPT_GO, wire.REP_INFO, word.pack(n % 60000 + 9)), Client.connect),
        (wire.OPT_GO, lambda n: info_export(), Client.connect),
    ]
    for of, piece, call in cases:
        with pytest.raises(LaminaError, match="more than") as raised:
            call(serve(without_end(of, piece)).uri)
        assert raised.value.errno == errno.EPROTO


def test_contexts_that_nobody_asked_for(serve: Serve) -> None:
    def answer_to(number: int) -> Iterator[bytes]:
        if number != wire.OPT_SET_META_CONTEXT:
            return usual(number)
        many = b"".join(context(b"x:%d" % n, n) for n in range(100))
        return iter((many + option(number),))

    with pytest.raises(LaminaError, match="100 metadata contexts, and 1 were asked for"):
        Client.connect(serve(talks(answer_to)).uri)


def test_many_exports_with_much_to_say_of_each(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is short enough; together they are gigabytes."""
    monkeypatch.setattr(negotiation, "MAX_ALL_BYTES", 1 << 20)

    def answer_to(number: int) -> Iterator[bytes]:
        if number == wire.OPT_LIST:
            return iter([*(export(b"%d" % n) for n in range(1000)), option(number)])
        if number == wire.OPT_LIST_META_CONTEXT:
            return iter([*(context(b"x:%d" % n * 200, n, number) for n in range(50)), option(number)])
        return usual(number)

    with pytest.raises(LaminaError, match="replies to all options") as raised:
        inspect(serve(talks(answer_to)).uri, exports=True)
    assert raised.value.errno == errno.EPROTO


def test_a_zeroing_of_the_whole_of_a_huge_export_takes_little_memory(serve: Serve) -> None:
    """Where lengths have 32 bits it is very many requests, of which a few are on their way at once."""
    most = waiting = 0

    def behave(sock: socket.socket, number: int) -> None:
        nonlocal most, waiting
        shake(sock, 2000 << 30)
        for asked in requests(sock):
            waiting += 1
            most = max(most, waiting)
            sock.sendall(simple(asked.cookie))
            waiting -= 1

    with Client.connect(serve(behave).uri) as client:
        tracemalloc.start()
        try:
            client.zero(0, 2000 << 30)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 2 << 20
