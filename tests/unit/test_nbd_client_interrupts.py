"""An exception at any line of a request: the connection is usable or made anew, and the caller's buffers are his own."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, LaminaError
from lamina.nbd import wire
from lamina.nbd.client import Client

from ..nbd_fake_server import CHUNKS, Asked, Serve, answer, requests, shake, starting
from ..nbd_scripts import ALL_FLAGS, SIZE, simple

HOUSE = os.path.dirname(lamina.__file__)
#: Every how many points an exception is raised; each is, in the long form.
STEP = 1 if os.environ.get("LAMINA_HOSTILE_SERVERS") else 5


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with starting(tmp_path) as start:
        yield start


def watched(work: Callable[[], None], seconds: float = 60) -> None:
    """Run `work` in a thread; a hang is a failure, and so is what it raises."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


class Stop(BaseException):
    """What stands for Ctrl-C."""


def interrupted_at(turn: int, call: Callable[[], Any]) -> bool:
    """Run `call` and raise Stop at the event number `turn`: the entry of a function of Lamina, or the return of a function
    in C that one calls. False if there are fewer."""
    left = turn

    def hook(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(HOUSE):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise Stop

    sys.setprofile(hook)
    try:
        call()
    except Stop:
        return True
    finally:
        sys.setprofile(None)
    return False


def late(sock: socket.socket, number: int) -> None:
    """Honest, and a little slow."""
    shake(sock, SIZE)
    disk = DISKS.setdefault(id(sock), SHARED)
    for asked in requests(sock):
        time.sleep(0.0005)
        sock.sendall(answer(disk, asked))


SHARED = bytearray(SIZE)
DISKS: dict[int, bytearray] = {}

OPERATIONS: dict[str, Callable[[Client, bytearray], Any]] = {
    "read": lambda client, view: client.read_into(4096, view),
    "read in pieces": lambda client, view: client.read_into(4096, view, piece=65536),
    "write": lambda client, view: client.write(262144, view),
    "write in pieces": lambda client, view: client.write(262144, view, piece=65536),
    "zero": lambda client, view: client.zero(524288, 4096),
    "flush": lambda client, view: client.flush(),
    "status": lambda client, view: client.block_status(0, SIZE),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_exception_anywhere_in_a_request(serve: Serve, name: str) -> None:
    operation = OPERATIONS[name]
    length = 150_000 if "pieces" in name else 65536
    SHARED[:] = bytes(range(256)) * (SIZE // 256)
    server = serve(late)

    def work() -> None:
        turns = 0
        client = Client.connect(server.uri, request_timeout=10)
        try:
            for turn in range(0, 100_000, STEP):
                view = bytearray(b"\x11" * length)
                if not interrupted_at(turn, lambda view=view: operation(client, view)):
                    break
                turns += 1
                # The caller uses his buffer for something else, while replies may still come.
                view[:] = b"\x22" * length
                mark = bytes([turn % 251]) * 512
                client.write(900_000, mark)
                assert client.read(900_000, 512) == mark
                assert client.read(0, 4096) == bytes(range(256)) * 16
                client.write(262144, b"\x33" * length)
                assert client.read(262144, length) == b"\x33" * length
                try:
                    client.flush()
                except BlockIOError as error:
                    # Said once, where the connection had to be made anew.
                    assert "not flushed" in str(error)  # noqa: PT017 - most of them do not fail
                    client.flush()
                assert view == b"\x22" * length
            assert turns > 5
        finally:
            client.close()

    watched(work, 120)


def test_an_exception_anywhere_in_connecting_leaves_no_socket(serve: Serve) -> None:
    """A socket that is left to its finalizer is told as a ResourceWarning, which fails the test."""
    server = serve(late)
    clients: list[Client] = []
    turn = 0
    while interrupted_at(turn, lambda: clients.append(Client.connect(server.uri, request_timeout=10))):
        turn += STEP
        if not turn % (16 * STEP):  # each collection takes 0.1 s in a process of many tests
            gc.collect()
        while clients:
            clients.pop().close()
    gc.collect()
    assert turn > 100
    clients.pop().close()


def test_threads_go_on_beside_one_that_is_interrupted(serve: Serve) -> None:
    """Each has its own bytes, on connections that they share; none takes the reply to another one's request."""
    SHARED[:] = bytes(SIZE)
    server = serve(late)

    def work() -> None:
        stop = threading.Event()
        failures: list[BaseException] = []
        rounds = [0] * 3

        def go_on(number: int) -> None:
            place = number * 131072
            try:
                while not stop.is_set():
                    data = bytes([rounds[number] % 250 + 1]) * 5000
                    client.write(place, data)
                    assert client.read(place, 5000) == data
                    rounds[number] += 1
            except BaseException as error:  # noqa: BLE001 - it is raised below
                failures.append(error)

        with Client.connect(server.uri, request_timeout=10, connections=2) as client:
            threads = [threading.Thread(target=go_on, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for turn in range(0, 120 * STEP, STEP):
                view = bytearray(b"\x11" * 40_000)
                change = turn % (2 * STEP) == 0
                # Where few events come, since others lead, the call is simply done.
                interrupted_at(
                    turn % 150,
                    lambda view=view, change=change: (client.write if change else client.read_into)(524288, view),
                )
                view[:] = b"\x22" * len(view)
                client.read(900_000, 10)
                assert view == b"\x22" * len(view)
            stop.set()
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
        assert not failures, failures
        assert min(rounds) > 0

    watched(work, 120)


def test_an_interrupted_write_does_not_come_after_the_next_one(serve: Serve) -> None:
    """A server may carry out requests in any order: what touches the same bytes is asked when the first is answered."""
    disk = bytearray(SIZE)
    release, came = threading.Event(), threading.Event()
    order: list[tuple[int, bytes]] = []

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        held: list[Asked] = []
        lock = threading.Lock()

        def later() -> None:
            release.wait(10)
            for one in held:
                order.append((one.offset, one.payload[:1]))
                with lock:
                    sock.sendall(answer(disk, one))

        threads: list[threading.Thread] = []
        for asked in requests(sock):
            if asked.payload[:1] == b"1":
                held.append(asked)
                threads.append(threading.Thread(target=later))
                threads[-1].start()
                came.set()
                continue
            if asked.payload:
                order.append((asked.offset, asked.payload[:1]))
            with lock:
                sock.sendall(answer(disk, asked))
        for thread in threads:
            thread.join(10)

    with Client.connect(serve(behave).uri, request_timeout=10) as client:
        first = client.start_write(4096, b"1" * 4096)
        assert came.wait(10)
        first.leave()
        client.write(65536, b"3" * 4096)  # elsewhere: at once
        timer = threading.Timer(0.2, release.set)
        timer.start()
        client.write(8000, b"2" * 4096)
        timer.join()
        assert [byte for _, byte in order] == [b"3", b"1", b"2"]
        assert client.read(4096, 8000) == b"1" * 3904 + b"2" * 4096
        with pytest.raises(BlockIOError, match="interrupted"):
            first.wait()


def test_a_reply_that_comes_late_goes_nowhere(serve: Serve) -> None:
    """Also the rest of one of which a part has come already."""
    go = threading.Event()

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for turn, asked in enumerate(requests(sock)):
            reply = answer(bytearray(b"x" * SIZE), asked)
            if turn == 0:
                sock.sendall(reply[: len(reply) // 2])
                go.wait(10)
                sock.sendall(reply[len(reply) // 2 :])
            else:
                sock.sendall(reply)

    with Client.connect(serve(behave).uri, request_timeout=10) as client:
        view = bytearray(b"-" * 500_000)
        pending = client.start_read(0, view)
        outcome: list[object] = []

        def wait() -> None:
            try:
                outcome.append(pending.wait())
            except LaminaError as error:
                outcome.append(error)

        helper = threading.Thread(target=wait)
        helper.start()
        deadline = time.monotonic() + 10
        while bytes(view[:1]) != b"x" and time.monotonic() < deadline:
            time.sleep(0.01)
        pending.leave()
        view[:] = b"+" * len(view)
        go.set()
        assert client.read(7, 9) == b"x" * 9
        assert view == b"+" * len(view)
        helper.join(10)
        assert len(outcome) == 1
        assert "interrupted" in str(outcome[0])


COMMAND = "import sys; from lamina.cli.main import run; sys.argv[0] = 'lamina'; run()"


def test_ctrl_c_beside_a_silent_server(tmp_path: Path, serve: Serve) -> None:
    """The command ends soon, with one line, though the server answers nothing."""
    import subprocess

    asked = threading.Event()

    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for one in requests(sock):
            if one.command == wire.CMD_BLOCK_STATUS:
                sock.sendall(CHUNKS.status([(one.length, 0)], cookie=one.cookie, done=True))
            else:
                asked.set()

    for words in (
        ["convert", "-f", "raw", "-O", "raw", "URI", str(tmp_path / "out")],
        ["copy", "URI", str(tmp_path / "out2")],
        ["io", "-f", "raw", "-c", "write 0 64k", "URI"],
    ):
        asked.clear()
        server = serve(behave)
        argv = [sys.executable, "-c", COMMAND, *(server.uri if word == "URI" else word for word in words)]
        child = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert asked.wait(20)
            time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            begun = time.monotonic()
            _, said = child.communicate(timeout=20)
            assert time.monotonic() - begun < 15
        finally:
            child.kill()
            child.wait()
        assert child.returncode == 130, (words, said)
        assert said.count(b"\n") <= 1, said


def test_a_client_that_was_interrupted_waits_a_short_time_only(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE)
        for _ in requests(sock):
            pass

    for options in ({}, {"reconnect": 60.0}):
        client = Client.connect(serve(behave).uri, **options)  # type: ignore[arg-type]
        pending = client.start_read(0, bytearray(512))
        pending.leave()
        begun = time.monotonic()
        with pytest.raises(BlockIOError, match="no reply within 2 s"):
            client.flush()
        client.close()
        assert time.monotonic() - begun < 15


def test_a_flush_that_was_not_sent_covers_what_the_next_one_must(serve: Serve) -> None:
    def behave(sock: socket.socket, number: int) -> None:
        shake(sock, SIZE, flags=ALL_FLAGS)
        for turn, asked in enumerate(requests(sock)):
            if number == 0 and turn == 1:
                return
            sock.sendall(simple(asked.cookie))

    with Client.connect(serve(behave).uri, reconnect=10) as client:
        client.write(0, b"x")
        for turn in range(12):
            interrupted_at(turn, client.flush)
        try:
            client.flush()
            client.flush()
        except BlockIOError as error:
            assert "not flushed" in str(error)  # noqa: PT017 - it depends on where the exceptions came
