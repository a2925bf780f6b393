"""The client over real sockets, against a server that does as the test says: pipelines, threads, splits, ends."""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina.errors import BlockIOError, Closed, LaminaError, NotFound, NotSupported, OutOfRange, ReadOnly
from lamina.nbd import wire
from lamina.nbd.client import Client

from ..nbd_fake_server import CHUNKS, Asked, Behave, FakeServer, Serve, answer, requests, shake, starting
from ..nbd_scripts import ALL_FLAGS, SIZE, greeting, refusal, simple

DISK = bytes(random.Random(7).randbytes(SIZE))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with starting(tmp_path) as start:
        yield start


def honest(disk: bytearray, seen: list[Asked] | None = None, *, structured: bool = True, **options: object) -> Behave:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, len(disk), structured=structured, **options)  # type: ignore[arg-type]
        for asked in requests(sock):
            if seen is not None:
                seen.append(asked)
            sock.sendall(answer(disk, asked, structured=structured))

    return behave


@pytest.mark.parametrize("structured", [True, False])
def test_each_operation(serve: Callable[[Behave], FakeServer], structured: bool) -> None:
    disk, seen = bytearray(DISK), []
    with Client.connect(serve(honest(disk, seen, structured=structured)).uri, structured=structured) as client:
        assert (client.size, client.mode) == (SIZE, "structured" if structured else "simple")
        assert client.read(5, 700) == DISK[5:705]
        view = bytearray(3)
        client.read_into(SIZE - 3, view)
        assert view == DISK[-3:]
        client.write(10, b"abc", fua=True)
        client.zero(20, 5, no_hole=True)
        client.zero(20, 5, fast=True)
        client.trim(0, 10)
        client.cache(0, 4096)
        client.flush()
        assert client.read(0, 0) == b""
        assert disk[10:13] + disk[20:25] == b"abc" + bytes(5)
        if structured:
            assert client.block_status(100, 900) == {"base:allocation": [(900, 0)]}
        else:
            with pytest.raises(NotSupported):
                client.block_status(0, 512)
    flags = {(one.command, one.flags) for one in seen}
    assert (wire.CMD_WRITE, wire.CMD_FLAG_FUA) in flags
    assert (wire.CMD_WRITE_ZEROES, wire.CMD_FLAG_NO_HOLE) in flags
    assert (wire.CMD_WRITE_ZEROES, wire.CMD_FLAG_FAST_ZERO) in flags


def test_requests_that_cannot_be(serve: Callable[[Behave], FakeServer]) -> None:
    bare = wire.FLAG_HAS_FLAGS
    with Client.connect(serve(honest(bytearray(1000), flags=bare)).uri) as client:
        for call in (
            lambda: client.read(-1, 1),
            lambda: client.read(0, -1),
            lambda: client.read(999, 2),
            lambda: client.write(1000, b"x"),
            lambda: client.read(1 << 70, 1),
            lambda: client.block_status(0, 1001),
        ):
            with pytest.raises(OutOfRange):
                call()
        for call in (
            lambda: client.zero(0, 1),
            lambda: client.trim(0, 1),
            lambda: client.cache(0, 1),
            lambda: client.write(0, b"x", fua=True),
            lambda: client.block_status(0, 1, contexts=["x:y"]),
        ):
            with pytest.raises(NotSupported):
                call()
        client.flush()
    with pytest.raises(Closed):
        client.read(0, 1)
    with Client.connect(serve(honest(bytearray(9), flags=ALL_FLAGS | wire.FLAG_READ_ONLY)).uri) as client:
        assert client.read_only
        for call in (lambda: client.write(0, b"x"), lambda: client.zero(0, 1), lambda: client.trim(0, 1)):
            with pytest.raises(ReadOnly):
                call()


def test_one_thread_has_many_requests_on_their_way(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        asked = requests(sock)
        held = [next(asked) for _ in range(64)]  # it answers none before it has all
        for one in reversed(held):
            sock.sendall(answer(bytearray(DISK), one))
        list(asked)

    with Client.connect(serve(behave).uri) as client:
        views = [bytearray(4096) for _ in range(64)]
        pending = [client.start_read(4096 * number, view) for number, view in enumerate(views)]
        for one in pending:
            one.wait()
            one.wait()  # the outcome stays
        assert b"".join(views) == DISK[: 64 * 4096]


@pytest.mark.parametrize("connections", [1, 3])
def test_many_threads_share_the_connections(serve: Callable[[Behave], FakeServer], connections: int) -> None:
    disk, lock = bytearray(SIZE), threading.Lock()

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        held: list[Asked] = []
        for asked in requests(sock):
            held.append(asked)
            # Whoever asks next sets free the one before: never in order, and never without others.
            if len(held) > 1 or asked.command == wire.CMD_FLUSH:
                with lock:
                    out = [answer(disk, one) for one in reversed(held)]
                held.clear()
                sock.sendall(b"".join(out))

    part = SIZE // 8
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            base = number * part
            for turn in range(30):
                content = bytes([number * 16 + turn % 16]) * (1000 + turn)
                one, two = client.start_write(base + turn, content), client.start_flush()
                one.wait()
                two.wait()
                view = bytearray(len(content))
                three, four = client.start_read(base + turn, view), client.start_flush()
                three.wait()
                four.wait()
                assert view == content
        except BaseException as error:
            errors.append(error)
            raise

    with Client.connect(serve(behave).uri, connections=connections, request_timeout=20) as client:
        assert client.connections == connections
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        # Two that came last may hold each other's replies back over several connections: flushes set them free.
        deadline = time.monotonic() + 30
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            for one in [client.start_flush() for _ in range(connections)]:
                one.wait()
            time.sleep(0.01)
        for thread in threads:
            thread.join(1)
    assert not errors


def test_who_leaves_hands_the_receiving_on(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        asked = requests(sock)
        for one in [next(asked) for _ in range(5)]:
            time.sleep(0.05)
            sock.sendall(answer(bytearray(DISK), one))
        list(asked)

    with Client.connect(serve(behave).uri) as client:
        pending = [client.start_read(number, bytearray(1)) for number in range(5)]
        threads = [threading.Thread(target=one.wait, daemon=True) for one in pending]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()


def test_an_export_that_is_not_there_is_not_waited_for(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        sock.sendall(greeting() + b"".join(map(refusal, (11, 8))) + refusal(7, wire.REP_ERR_UNKNOWN))
        while sock.recv(4096):
            pass

    server = serve(behave)
    with pytest.raises(NotFound, match="no export"):
        Client.connect(server.uri, open_timeout=20)
    assert server.connections == 1


def test_full_sockets_do_not_wait_for_each_other(serve: Callable[[Behave], FakeServer]) -> None:
    """A server that takes nothing before it has sent its reply, and a client that starts everything before it waits."""
    disk = bytearray(DISK)
    with Client.connect(serve(honest(disk)).uri, request_timeout=20) as client:
        views = [bytearray(SIZE // 2) for _ in range(20)]
        pending = []
        for view in views:
            pending.append(client.start_read(0, view))
            pending.append(client.start_write(SIZE // 2, DISK[SIZE // 2 :]))
        pending += [client.start_write(SIZE - 16, DISK[-16:]) for _ in range(2000)]
        for one in pending:
            one.wait()
        assert all(view == DISK[: SIZE // 2] for view in views)


def test_what_is_too_long_is_split(serve: Callable[[Behave], FakeServer]) -> None:
    disk, seen = bytearray(DISK), []
    with Client.connect(serve(honest(disk, seen, sizes=(1, 512, 4096))).uri) as client:
        assert client.max_transfer == 4096
        assert client.read(100, 10_000) == DISK[100:10_100]
        client.write(5000, b"w" * 9000)
        assert disk[4999:14001] == DISK[4999:5000] + b"w" * 9000 + DISK[14000:14001]
        client.cache(0, 10_000)
        client.zero(0, 50_000)
    for command, payload in ((wire.CMD_READ, True), (wire.CMD_WRITE, True), (wire.CMD_CACHE, True)):
        found = [one for one in seen if one.command == command]
        assert len(found) >= 3
        assert all(one.length <= 4096 for one in found) is payload
    assert [one.length for one in seen if one.command == wire.CMD_WRITE_ZEROES] == [50_000], "it has no payload"


def test_a_size_that_is_no_multiple_of_the_minimum(serve: Callable[[Behave], FakeServer]) -> None:
    """Usable to the last byte: requests begin on blocks, and end on one or at the end of the export, never past it."""
    content = DISK[:1000]
    for most in (512, 1 << 20):
        disk, seen = bytearray(content), []
        with Client.connect(serve(honest(disk, seen, sizes=(512, 512, most))).uri) as client:
            assert (client.size, client.minimum, client.block_sizes_known) == (1000, 512, True)
            for offset in (0, 1, 511, 512, 513, 999):
                for length in (0, 1, 400, 487, 488, 1000):
                    if offset + length <= 1000:
                        assert client.read(offset, length) == content[offset : offset + length]
                        if length:
                            status = client.block_status(offset, length)["base:allocation"]
                            assert 0 < sum(size for size, _ in status) <= length
            client.write(512, b"t" * 488)
            client.zero(512, 488)
            for call in (lambda: client.write(1, b"x"), lambda: client.zero(0, 100), lambda: client.trim(511, 1)):
                with pytest.raises(BlockIOError, match="whole blocks of 512"):
                    call()
        assert seen
        for one in seen:
            assert one.offset % 512 == 0
            assert one.length % 512 == 0 or one.offset + one.length == 1000
            assert one.length <= most or one.command not in (wire.CMD_READ, wire.CMD_WRITE)


def test_an_error_of_one_part_comes_when_all_parts_are_there(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE, sizes=(1, 512, 4096))
        for asked in requests(sock):
            if asked.offset == 0:
                sock.sendall(CHUNKS.error(wire.EIO, b"bad block", at=7, cookie=asked.cookie))
            else:
                time.sleep(0.05)
                sock.sendall(answer(bytearray(DISK), asked))

    with Client.connect(serve(behave).uri) as client:
        view = bytearray(8192)
        with pytest.raises(BlockIOError, match="bad block") as raised:
            client.read_into(0, view)
        assert (raised.value.errno, raised.value.offset) == (errno.EIO, 7)
        assert view[4096:] == DISK[4096:8192], "it must not be written to later"
        assert client.read(8192, 10) == DISK[8192:8202], "the connection goes on"


def test_a_server_that_breaks_the_protocol_fails_all(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        asked = requests(sock)
        held = [next(asked) for _ in range(3)]
        sock.sendall(CHUNKS.data(0, DISK[:100], cookie=held[1].cookie))  # not all of it, and said to be
        list(asked)

    for reconnect in (0.0, 5.0):
        with Client.connect(serve(behave).uri, reconnect=reconnect) as client:
            pending = [client.start_read(0, bytearray(4096)) for _ in range(3)]
            for one in pending:
                with pytest.raises(BlockIOError, match="not all bytes") as raised:
                    one.wait()
                assert raised.value.errno == errno.EPROTO
            with pytest.raises(BlockIOError, match="not all bytes"):
                client.read(0, 1)


def test_it_says_goodbye_after_what_is_on_its_way(serve: Callable[[Behave], FakeServer]) -> None:
    ended = []

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        disk = bytearray(DISK)
        for asked in requests(sock):
            time.sleep(0.02)
            sock.sendall(answer(disk, asked))
        ended.append(bytes(disk[:4]))

    client = Client.connect(serve(behave).uri)
    view = bytearray(100)
    pending = [client.start_write(0, b"last"), client.start_read(500, view)]
    client.close()
    client.close()
    assert view == DISK[500:600]
    for one in pending:
        one.wait()
    deadline = time.monotonic() + 5
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [b"last"]


def test_several_connections_only_where_they_are_coherent(serve: Callable[[Behave], FakeServer]) -> None:
    alone = serve(honest(bytearray(DISK), flags=ALL_FLAGS & ~wire.FLAG_CAN_MULTI_CONN))
    with Client.connect(alone.uri, connections=4) as client:
        assert client.connections == alone.connections == 1
    shared = serve(honest(bytearray(DISK)))
    with Client.connect(shared.uri, connections=4) as client:
        assert [client.read(number, 1) for number in range(8)] == [DISK[number : number + 1] for number in range(8)]
        assert client.connections == shared.connections == 4


def test_a_second_connection_to_another_export_is_refused(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE - number)
        list(requests(sock))

    with pytest.raises(BlockIOError, match="bytes now"):
        Client.connect(serve(behave).uri, connections=2)


def test_status_only_of_the_contexts_that_were_asked_for(serve: Callable[[Behave], FakeServer]) -> None:
    with Client.connect(serve(honest(bytearray(DISK))).uri) as client:
        assert client.block_status(0, 4096, contexts=["base:allocation"], one=True) == {"base:allocation": [(4096, 0)]}
        assert client.block_status(7, 0) == {"base:allocation": []}


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="cannot connect"):
        Client.connect(f"nbd+unix:///?socket={tmp_path}/none")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(BlockIOError, match="refused"):
            Client.connect(f"nbd://127.0.0.1:{held.getsockname()[1]}/")


def test_it_waits_until_somebody_listens(tmp_path: Path) -> None:
    later: list[FakeServer] = []
    path = tmp_path / "socket"
    timer = threading.Timer(0.2, lambda: later.append(FakeServer(path, honest(bytearray(DISK)))))
    timer.start()
    try:
        with Client.connect(f"nbd+unix:///x?socket={path}", open_timeout=10) as client:
            assert client.read(0, 4) == DISK[:4]
    finally:
        timer.join()
        later[0].close()


def test_silence_ends(serve: Callable[[Behave], FakeServer]) -> None:
    stop = threading.Event()

    def silent(sock: socket.socket, number: int) -> None:
        stop.wait(10)

    def drips(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        reply = answer(bytearray(DISK), next(requests(sock)))
        for byte in reply:
            if stop.wait(0.05):
                return
            sock.sendall(bytes([byte]))

    try:
        begun = time.monotonic()
        with pytest.raises(BlockIOError) as raised:
            Client.connect(serve(silent).uri, handshake_timeout=0.2)
        assert raised.value.errno == errno.ETIMEDOUT
        with Client.connect(serve(drips).uri, request_timeout=0.3) as client:
            with pytest.raises(BlockIOError, match="no reply within") as raised:
                client.read(0, 4096)
            assert raised.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - begun < 60, "the time is that of a byte, not of a reply"
    finally:
        stop.set()


def test_a_write_that_fails_is_no_success_and_no_loss(serve: Callable[[Behave], FakeServer]) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            sock.sendall(simple(asked.cookie, wire.ENOSPC if asked.command == wire.CMD_WRITE else 0))

    with Client.connect(serve(behave).uri) as client:
        with pytest.raises(LaminaError) as raised:
            client.write(0, b"x" * 512)
        assert raised.value.errno == errno.ENOSPC
        client.flush()


def test_effects_do_not_round_over_4_gib(serve: Callable[[Behave], FakeServer]) -> None:
    """CVE-2025-47711: lengths next to 2**32 broke servers. Requests without payload are at most 1 GiB with 32-bit lengths."""
    seen: list[Asked] = []
    size = (6 << 30) + 4096

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, size)
        for asked in requests(sock):
            seen.append(asked)
            status = asked.command == wire.CMD_BLOCK_STATUS
            extents = [(asked.length, 3)]
            sock.sendall(CHUNKS.status(extents, cookie=asked.cookie, done=True) if status else simple(asked.cookie))

    with Client.connect(serve(behave).uri) as client:
        client.zero(0, size)
        client.trim(0, size)
        assert client.block_status(0, size) == {"base:allocation": [(1 << 30, 3)]}
    assert sum(one.length for one in seen) == 2 * size + (1 << 30)
    assert max(one.length for one in seen) == 1 << 30


@pytest.mark.parametrize(
    ("on_the_wire", "here"), [(n, n) for n in (1, 5, 12, 22, 28, 75, 95, 108)] + [(999, 22), (2, 22)]
)
def test_each_error_of_the_wire(serve: Callable[[Behave], FakeServer], on_the_wire: int, here: int) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for asked in requests(sock):
            failed = asked.command == wire.CMD_TRIM
            sock.sendall(simple(asked.cookie, on_the_wire if failed else 0))

    with Client.connect(serve(behave).uri) as client:
        with pytest.raises(LaminaError) as raised:
            client.trim(0, 512)
        assert raised.value.errno == here
        if on_the_wire != wire.ESHUTDOWN:
            client.write(0, b"x")
