"""The storage node `nbd` above servers that do as the test says: long requests in pieces, losses, odd block status; TLS."""

from __future__ import annotations

import errno
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lamina
from lamina.cli.main import main
from lamina.errors import BlockIOError, ReadOnly
from lamina.nbd import Export, Server, node, wire
from lamina.nbd.client import Client
from lamina.nbd.node import PIECE
from lamina.nbd.tls import server_context

from ..certificates import write_certificates
from ..nbd_fake_server import CHUNKS, Asked, Behave, FakeServer, Serve, answer, exactly, requests, shake, starting
from ..nbd_scripts import greeting, option

#: Four pieces.
SIZE = 4 * PIECE
DISK = random.Random(11).randbytes(SIZE)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with starting(tmp_path) as start:
        yield start


def opened(server: FakeServer, *, read_only: bool = True, **options: object) -> lamina.Image:
    spec = {"driver": "nbd", "uri": server.uri, **options}
    return lamina.open({"driver": "raw", "file": spec}, read_only=read_only)


@pytest.mark.parametrize("connections", [1, 3])
def test_a_long_request_goes_out_in_pieces_all_at_once(serve: Serve, connections: int) -> None:
    disk, seen = bytearray(DISK), []
    gate = threading.Barrier(connections)

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            seen.append((number, asked))
            if connections == 3 and asked.length == PIECE and asked.command == wire.CMD_READ:
                gate.wait(10)  # nothing is answered before each connection has a piece
            sock.sendall(answer(disk, asked))

    with opened(serve(behave), read_only=False, connections=connections) as image:
        assert image.read(100, 3 * PIECE) == DISK[100 : 100 + 3 * PIECE] if connections == 1 else True
        assert image.read(0, 3 * PIECE) == DISK[: 3 * PIECE]
        image.write(5, DISK[: SIZE - 5], fua=True)
        assert disk[5:] == DISK[:-5]
    assert all(one.length <= PIECE for _, one in seen)
    writes = [one for _, one in seen if one.command == wire.CMD_WRITE]
    assert len(writes) == SIZE // PIECE
    assert all(one.flags & wire.CMD_FLAG_FUA for one in writes)
    assert len({number for number, one in seen if one.length == PIECE}) == connections


def test_a_piece_that_cannot_be_sent_does_not_leave_the_others_behind(serve: Serve) -> None:
    """One of two connections is dead: the error comes when what went over the other one is there, not before."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if number:
                return
            sock.sendall(answer(bytearray(DISK), asked))

    with Client.connect(serve(behave).uri, connections=2) as client:
        assert client.read(0, 1) == DISK[:1]
        with pytest.raises(BlockIOError):
            client.read(0, 1)
        view = bytearray(4 * 65536)
        pending = client.start_read(0, view, piece=65536)
        with pytest.raises(BlockIOError) as raised:
            pending.wait()
        assert raised.value.errno == errno.ECONNRESET
        assert [view[at : at + 65536] == DISK[at : at + 65536] for at in range(0, len(view), 65536)].count(True) == 2


def test_one_failed_piece_fails_the_conversion(serve: Serve, tmp_path: Path) -> None:
    """CVE-2022-0485: an error of a read that nobody looked at was a copy with garbage, and success."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            bad = asked.command == wire.CMD_READ and asked.offset == 2 * PIECE
            reply = CHUNKS.error(wire.EIO, b"bad block", cookie=asked.cookie) if bad else answer(bytearray(DISK), asked)
            sock.sendall(reply)

    for connections in "14":
        words = ["convert", "-q", "--connections", connections, "-f", "raw", "-O", "raw"]
        assert main([*words, serve(behave).uri, str(tmp_path / "out.raw")]) == 1
        assert not (tmp_path / "out.raw").exists()


def test_a_lost_connection_comes_back_within_the_delay(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for turn, asked in enumerate(requests(sock)):
            if number < 2 and turn == 1:
                return
            sock.sendall(answer(bytearray(DISK), asked))

    server = serve(behave)
    with opened(server, **{"reconnect-delay": 10}) as image:
        assert image.read(0, SIZE) == DISK
    assert server.connections >= 3
    with opened(serve(behave)) as image, pytest.raises(BlockIOError) as raised:
        image.read(0, SIZE)
    assert raised.value.errno == errno.ECONNRESET


def test_silence_ends_with_the_request_timeout(serve: Serve) -> None:
    stop = threading.Event()

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if number or asked.command != wire.CMD_READ:
                sock.sendall(answer(bytearray(DISK), asked))
            else:
                stop.wait(20)

    try:
        with opened(serve(behave), **{"request-timeout": 1}) as image:
            with pytest.raises(BlockIOError, match="no reply within 1 s") as raised:
                image.read(0, 10)
            assert raised.value.errno == errno.ETIMEDOUT
        with opened(serve(behave), **{"request-timeout": 1, "reconnect-delay": 10}) as image:
            assert image.read(3, 10) == DISK[3:13]
    finally:
        stop.set()


def with_status(extents: Callable[[Asked], list[tuple[int, int]]], asked_for: list[Asked]) -> Behave:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE, sizes=(512, 4096, 1 << 25))
        for asked in requests(sock):
            if asked.command == wire.CMD_BLOCK_STATUS:
                asked_for.append(asked)
                sock.sendall(CHUNKS.status(extents(asked), cookie=asked.cookie, done=True))
            else:
                sock.sendall(answer(bytearray(DISK), asked))

    return behave


def rows(server: FakeServer) -> list[tuple[int, int, bool, bool]]:
    with opened(server) as image:
        found = image.extents()
        assert (found.begin, found.end) == (0, SIZE)
        return [(row.start, row.length, row.data, row.zero) for row in found]


def test_a_hole_counts_as_zeros_only_where_the_server_says_so(serve: Serve) -> None:
    """HOLE without ZERO may read as anything, ZERO without HOLE is stored; bits that do not exist mean nothing."""
    states = [(65536, 1), (65536, 3), (65536, 2), (65536, 0xFFFFFFFC), (SIZE, 0xFFFFFFFF)]
    assert rows(serve(with_status(lambda asked: states, []))) == [
        (0, 65536, True, False),
        (65536, 65536, False, True),
        (131072, 65536, True, True),
        (196608, 65536, True, False),
        (262144, SIZE - 262144, False, True),
    ]


def test_extents_that_are_no_whole_blocks_are_taken(serve: Serve) -> None:
    """A server that says minimum 512 and then tells of 1000 and 24 bytes: nobody hangs, or asks without end."""
    seen: list[Asked] = []
    found = rows(serve(with_status(lambda asked: [(1000, 0), (24, 3)], seen)))
    assert sum(length for _, length, _, _ in found) == SIZE
    assert len(seen) <= SIZE // 1024 + 8
    assert all(one.offset % 512 == 0 and one.length % 512 == 0 for one in seen)


def test_a_server_that_tells_block_by_block_is_not_asked_for_ever(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_MAX_QUESTIONS", 50)
    seen: list[Asked] = []
    found = rows(serve(with_status(lambda asked: [(512, 3)], seen)))
    assert len(seen) <= 101  # `extents` may be asked in two windows
    assert found[-1][2], "the rest counts as data"


def test_full_sockets_do_not_wait_for_each_other_under_tls(serve: Serve, tmp_path: Path) -> None:
    """The server takes nothing before it has sent its reply, the client starts everything before it waits."""
    folder = write_certificates(tmp_path / "pki")
    context = server_context(folder)
    disk = bytearray(DISK)

    def behave(sock: socket.socket, number: int) -> None:
        sock.sendall(greeting())
        exactly(sock, 4)
        assert wire.OPTION.unpack(exactly(sock, wire.OPTION.size)).option == wire.OPT_STARTTLS
        sock.sendall(option(wire.OPT_STARTTLS))
        with context.wrap_socket(sock.dup(), server_side=True) as secured:
            # Under TLS come the options alone.
            swallowed = len(greeting())

            def send(data: bytes) -> None:
                nonlocal swallowed
                part, swallowed = data[swallowed:], max(swallowed - len(data), 0)
                secured.sendall(part)

            try:
                shake(_Prefixed(secured, bytes(4)), SIZE, send=send)  # type: ignore[arg-type]
                for asked in requests(secured):
                    secured.sendall(answer(disk, asked))
            except ssl.SSLError:
                return

    path = serve(behave).uri.partition("=")[2]
    where = f"nbds+unix:///x?socket={path}&tls-certificates={folder}&tls-hostname=localhost"
    with Client.connect(where, request_timeout=30) as client:
        assert client.tls
        views = [bytearray(SIZE // 2) for _ in range(12)]
        pending = []
        for view in views:
            pending.append(client.start_read(0, view))
            pending.append(client.start_write(SIZE // 2, DISK[SIZE // 2 :]))
        pending += [client.start_write(SIZE - 16, DISK[-16:]) for _ in range(500)]
        for one in pending:
            one.wait()
        assert all(view == DISK[: SIZE // 2] for view in views)


class _Prefixed:
    """A socket whose stream begins with bytes that are there already."""

    def __init__(self, sock: socket.socket, head: bytes) -> None:
        self._sock, self._head = sock, head

    def recv(self, count: int) -> bytes:
        part, self._head = self._head[:count], self._head[count:]
        return part or self._sock.recv(count)


def test_an_image_over_an_export_is_reopened_for_writing_and_back(tmp_path: Path) -> None:
    lamina.create(tmp_path / "disk.qcow2", "qcow2", 1 << 20)
    os.truncate(tmp_path / "disk.qcow2", 1 << 20)  # an export does not grow
    with lamina.open(tmp_path / "disk.qcow2", format="raw", read_only=False) as served:
        export = Export(served, writable=True)
        with Server([export], unix=str(tmp_path / "s")) as server:
            spec = {"driver": "qcow2", "file": {"driver": "nbd", "uri": server.uri}}
            with lamina.open(spec) as image:
                with pytest.raises(ReadOnly):
                    image.write(0, b"early")
                image.reopen(read_only=False)
                image.write(0, b"bytes")
                image.reopen(read_only=True)
                with pytest.raises(ReadOnly):
                    image.write(0, b"late!")
                assert image.read(0, 5) == b"bytes"
            with lamina.open(spec) as image:
                assert image.read(0, 5) == b"bytes"


def test_an_export_that_is_read_only_is_not_reopened_for_writing(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE, flags=wire.FLAG_HAS_FLAGS | wire.FLAG_READ_ONLY)
        for asked in requests(sock):
            sock.sendall(answer(bytearray(DISK), asked))

    with opened(serve(behave)) as image:
        with pytest.raises(ReadOnly, match="the server exports this read-only") as caught:
            image.reopen(read_only=False)
        assert caught.value.operation == "reopen"
        assert image.read_only
        assert image.read(0, 3) == DISK[:3]


def test_a_flush_that_fails_leaves_the_image_writable(serve: Serve) -> None:
    failing = [False]

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if asked.command == wire.CMD_FLUSH and failing[0]:
                sock.sendall(wire.SIMPLE_REPLY.codec.pack(wire.SIMPLE_REPLY_MAGIC, wire.EIO, asked.cookie))
            else:
                sock.sendall(answer(bytearray(DISK), asked))

    with opened(serve(behave), read_only=False) as image:
        image.write(0, b"x")
        failing[0] = True
        with pytest.raises(BlockIOError):
            image.reopen(read_only=True)
        assert not image.read_only
        failing[0] = False
        image.reopen(read_only=True)
