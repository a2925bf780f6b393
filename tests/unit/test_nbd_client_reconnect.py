"""A lost connection: what is sent again, what fails, what a flush then says; and a conversation cut at every byte."""

from __future__ import annotations

import errno
import itertools
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.errors import BlockIOError, LaminaError
from lamina.nbd import wire
from lamina.nbd.client import Client
from lamina.nbd.inspect import inspect

from ..nbd_fake_server import CHUNKS, Behave, FakeServer, Gone, Serve, answer, requests, shake, starting
from ..nbd_scripts import ALL_FLAGS, SIZE, export, greeting, info_export, option, refusal, simple

DISK = bytes(random.Random(9).randbytes(SIZE))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with starting(tmp_path) as start:
        yield start


def dies_after(disk: bytearray, counts: dict[int, int], **options: object) -> Behave:
    """The connection number N ends once it was asked `counts[N]` times, without an answer to the last; others live."""

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, len(disk), **options)  # type: ignore[arg-type]
        for turn, asked in enumerate(requests(sock), 1):
            if turn == counts.get(number):
                return
            sock.sendall(answer(disk, asked))

    return behave


def test_without_reconnect_a_loss_fails_all_that_is_on_its_way(serve: Serve) -> None:
    server = serve(dies_after(bytearray(DISK), {0: 3}))
    with Client.connect(server.uri) as client:
        views = [bytearray(512) for _ in range(6)]
        pending = [client.start_read(0, view) for view in views]
        done = []
        for one in pending:
            try:
                one.wait()
                done.append(True)
            except BlockIOError as error:
                done.append(False)
                number = error.errno
        assert done == [True, True, False, False, False, False]
        assert number == errno.ECONNRESET
        with pytest.raises(BlockIOError):
            client.read(0, 1)
    assert server.connections == 1


def test_what_was_on_its_way_is_sent_again(serve: Serve) -> None:
    disk = bytearray(DISK)
    server = serve(dies_after(disk, {0: 5, 1: 1, 2: 40}))
    with Client.connect(server.uri, reconnect=10) as client:
        views = [bytearray(4096) for _ in range(64)]
        pending = []
        for number, view in enumerate(views):
            pending.append(client.start_read(4096 * number, view))
            pending.append(client.start_write(SIZE // 2 + 4096 * number, bytes([number]) * 4096))
        for one in pending:
            one.wait()
        assert b"".join(views) == DISK[: 64 * 4096]
        assert disk[SIZE // 2 : SIZE // 2 + 64 * 4096] == b"".join(bytes([n]) * 4096 for n in range(64))
    assert server.connections == 4


def test_threads_go_on_over_losses(serve: Serve) -> None:
    disk = bytearray(SIZE)
    server = serve(dies_after(disk, {number: 7 + 3 * number for number in range(12)}))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(25):
                place = (number * 25 + turn) * 1024
                client.write(place, bytes([number + 1]) * 1024)
                assert client.read(place, 1024) == bytes([number + 1]) * 1024
        except BaseException as error:
            errors.append(error)
            raise

    with Client.connect(server.uri, connections=2, reconnect=20) as client:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert not errors
    assert server.connections > 5


def test_a_flush_tells_of_writes_that_may_be_lost_once(serve: Serve) -> None:
    """The server may have been restarted without what it had not written: the flush that covers it must not succeed."""
    for during in (False, True):
        # The loss comes with the read after the write, or with the flush itself.
        server = serve(dies_after(bytearray(DISK), {0: 2}))
        with Client.connect(server.uri, reconnect=10) as client:
            client.write(0, b"x" * 512)
            if not during:
                assert client.read(0, 1) == b"x"
            with pytest.raises(BlockIOError, match="not flushed") as raised:
                client.flush()
            assert raised.value.errno == errno.EIO
            client.flush()
        assert server.connections == 2


def test_a_flush_without_such_writes_succeeds(serve: Serve) -> None:
    for change in (
        lambda client: client.write(0, b"x", fua=True),  # stable when it was answered
        lambda client: client.read(0, 1),
        lambda client: (client.write(0, b"x"), client.flush()),
    ):
        with Client.connect(serve(dies_after(bytearray(DISK), {0: 3})).uri, reconnect=10) as client:
            change(client)
            for _ in range(4):
                client.read(0, 1)
            client.flush()
    # A write that was not answered is sent again, so the flush covers it.
    with Client.connect(serve(dies_after(bytearray(DISK), {0: 1})).uri, reconnect=10) as client:
        client.write(0, b"x")
        client.flush()


def test_a_failed_flush_does_not_forget_what_it_should_have_covered(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if asked.command == wire.CMD_READ and not number:
                return
            sock.sendall(simple(asked.cookie, wire.EIO if asked.command == wire.CMD_FLUSH and not number else 0))

    with Client.connect(serve(behave).uri, reconnect=10) as client:
        client.write(0, b"x")
        with pytest.raises(BlockIOError, match="Input"):
            client.flush()
        pending = client.start_read(0, bytearray(1))
        with pytest.raises(LaminaError):
            pending.wait()  # the second server answers a read with a simple reply


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flags": ALL_FLAGS | wire.FLAG_READ_ONLY}, "read-only now"),
        ({"flags": ALL_FLAGS & ~wire.FLAG_SEND_FLUSH}, "lacks features"),
        ({"sizes": (512, 4096, 1 << 25)}, "blocks are larger"),
        ({"sizes": (1, 4096, 4096)}, "takes less"),
        ({"structured": False}, "another form"),
        ({"size": SIZE - 1}, "1048575 bytes now"),
    ],
)
def test_an_export_that_became_worse_is_not_gone_on_with(serve: Serve, options: dict[str, object], words: str) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        now = dict(options) if number else {}
        size = now.pop("size", SIZE)
        shake(sock, size, **now)  # type: ignore[arg-type]
        if not number:
            next(requests(sock))
            return
        list(requests(sock))

    with Client.connect(serve(behave).uri, reconnect=10) as client:
        for _ in range(2):
            with pytest.raises(BlockIOError, match=words) as raised:
                client.read(0, 1)
            assert raised.value.errno == errno.ESTALE


def test_an_export_that_grew_is_used_as_it_was(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE + number)
        if number:
            for asked in requests(sock):
                sock.sendall(answer(bytearray(DISK), asked))

    with Client.connect(serve(behave).uri, reconnect=10) as client:
        assert client.read(1, 3) == DISK[1:4]
        assert client.size == SIZE


def test_patience_ends_and_begins_again(serve: Serve, tmp_path: Path) -> None:
    server = serve(dies_after(bytearray(DISK), {0: 1}))
    with Client.connect(server.uri, reconnect=0.3) as client:
        server.close()
        (tmp_path / "socket0").unlink()
        begun = time.monotonic()
        with pytest.raises(LaminaError):
            client.read(0, 1)
        assert 0.1 < time.monotonic() - begun < 60
        again = FakeServer(tmp_path / "socket0", dies_after(bytearray(DISK), {}))
        try:
            assert client.read(0, 4) == DISK[:4], "the next request tries again"
        finally:
            client.close()
            again.close()


def test_a_request_that_breaks_every_connection_is_given_up(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if asked.offset == 666:
                return
            sock.sendall(answer(bytearray(DISK), asked))

    with Client.connect(serve(behave).uri, reconnect=0.3) as client:
        with pytest.raises(BlockIOError):
            client.read(666, 1)
        assert client.read(0, 1) == DISK[:1]


def test_a_server_that_shuts_down_is_left_in_good_order(serve: Serve) -> None:
    goodbyes = []

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for turn, asked in enumerate(requests(sock)):
            if number == 0 and turn >= 2:
                sock.sendall(CHUNKS.error(wire.ESHUTDOWN, b"bye", cookie=asked.cookie))
            else:
                sock.sendall(answer(bytearray(DISK), asked))
        goodbyes.append(number)

    with Client.connect(serve(behave).uri) as client:
        pending = [client.start_read(number, bytearray(1)) for number in range(4)]
        pending[0].wait()
        pending[1].wait()
        for one in pending[2:]:
            with pytest.raises(BlockIOError, match="bye") as raised:
                one.wait()
            assert raised.value.errno == errno.ESHUTDOWN
        with pytest.raises(BlockIOError, match="shutting down"):
            client.read(0, 1)
    server = serve(behave)
    with Client.connect(server.uri, reconnect=10) as client:
        views = [bytearray(64) for _ in range(6)]
        for one in [client.start_read(64 * number, view) for number, view in enumerate(views)]:
            one.wait()
        assert b"".join(views) == DISK[: 6 * 64]
    assert server.connections == 2
    deadline = time.monotonic() + 5
    while len(goodbyes) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(goodbyes) == [0, 0, 1], "each connection ended with DISC"


def test_a_timeout_counts_as_a_loss(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            if number:
                sock.sendall(answer(bytearray(DISK), asked))

    with Client.connect(serve(behave).uri, reconnect=10, request_timeout=0.2) as client:
        assert client.read(3, 3) == DISK[3:6]


def talk(client: Client) -> None:
    """A short conversation, whose outcome is right or an error."""
    views = [bytearray(40) for _ in range(3)]
    pending = [client.start_read(number * 40, view) for number, view in enumerate(views)]
    pending.append(client.start_write(500, b"w" * 10))
    for one in pending:
        one.wait()
    assert b"".join(views) == DISK[:120]
    client.flush()
    assert client.block_status(0, 500) == {"base:allocation": [(500, 0)]}


def limited(limit: int, said: list[int], *, only_first: bool) -> Behave:
    """Honest for the first `limit` bytes that it sends, then it hangs up."""
    disk = bytearray(DISK[:1000])

    def behave(sock: socket.socket, number: int) -> None:
        left = limit if not only_first or not number else 1 << 30

        def send(data: bytes) -> None:
            nonlocal left
            part = data[:left]
            sock.sendall(part)
            said.append(len(part))
            left -= len(part)
            if not left:
                raise Gone

        shake(sock, len(disk), send=send)
        for asked in requests(sock):
            send(answer(disk, asked))

    return behave


def test_a_conversation_cut_at_every_byte(tmp_path: Path) -> None:
    said: list[int] = []
    whole = FakeServer(tmp_path / "whole", limited(1 << 30, said, only_first=False))
    with whole, Client.connect(whole.uri) as client:
        talk(client)
    total = sum(said)
    assert 400 < total < 2000
    for limit in itertools.chain(range(1, total), [total + 1]):
        server = FakeServer(tmp_path / f"cut{limit}", limited(limit, [], only_first=False))
        with server:
            if limit > total:
                with Client.connect(server.uri, request_timeout=10) as client:
                    talk(client)
                continue
            with pytest.raises(LaminaError) as raised, Client.connect(server.uri, request_timeout=10) as client:
                talk(client)
            assert raised.value.errno in (errno.ECONNRESET, errno.EPIPE), (limit, raised.value)


def test_a_conversation_cut_at_every_byte_and_mended(tmp_path: Path) -> None:
    """With reconnect only the flush may fail, and then only because of a write that was answered before the cut."""
    failed = 0
    for limit in range(1, 560, 3):
        server = FakeServer(tmp_path / f"cut{limit}", limited(limit, [], only_first=True))
        with server, Client.connect(server.uri, open_timeout=10, reconnect=10, request_timeout=10) as client:
            try:
                talk(client)
            except BlockIOError as error:
                failed += 1
                assert "not flushed" in str(error)  # noqa: PT017 - most of them do not fail
                talk(client)
    assert failed < 40


def test_a_list_cut_at_every_byte(tmp_path: Path) -> None:
    """CVE-2021-20286: a server that hangs up between options is an error, whatever was asked."""
    script = greeting() + refusal(11) + refusal(8) + export(b"a", b"one") + option(wire.OPT_LIST)
    script += info_export(number=wire.OPT_INFO) + option(wire.OPT_INFO)
    for length in range(len(script) + 1):

        def behave(sock: socket.socket, number: int, length: int = length) -> None:
            sock.sendall(script[:length])
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass

        with FakeServer(tmp_path / f"cut{length}", behave) as server:
            if length == len(script):
                (found,) = inspect(server.uri, exports=True)
                assert found.as_dict()["export-size"] == SIZE
            else:
                with pytest.raises(BlockIOError) as raised:
                    inspect(server.uri, exports=True)
                assert raised.value.errno in (errno.ECONNRESET, errno.EPIPE)
